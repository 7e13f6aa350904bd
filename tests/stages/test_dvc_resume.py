"""One training that is stopped under `python main.py`, `dvc exp run`, `dvc exp run --temp`, and ends in DVC's queue."""

import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
from helpers.pipeline import copy_repository, environment
from helpers.runs import RECIPE, finish, hashes, saved_step, weights

CHANGES = ["trainer.steps=100", "trainer.checkpoint_every=4"]


def test_one_training_goes_on_from_one_way_of_running_to_the_next(tmp_path):
    repository = copy_repository(tmp_path)
    env = environment(repository, WANDB_MODE="disabled")
    sets = [word for change in (*RECIPE, *CHANGES) for word in ("-S", change)]
    plain = [sys.executable, "main.py", *RECIPE, *CHANGES, f"out_dir={tmp_path / 'plain'}", "stage=train"]
    for stage in ("prepare", "train"):
        finish(tmp_path, *CHANGES, stage=stage)
    shutil.copytree(tmp_path / "out/data", tmp_path / "plain/data")

    def interrupt(command, number, victim=lambda pid: training(pid)):
        """Runs until there are new checkpoints, sends a signal to a process, by default the training, gives the output.

        Both the command and the training have ended then.
        """
        log = tmp_path / "log"
        before = saved_step(repository, ".")
        with log.open("w") as file:
            running = subprocess.Popen(command, cwd=repository, env=env, stdout=file, stderr=subprocess.STDOUT)
            while saved_step(repository, ".") < before + 8:
                assert running.poll() is None, log.read_text()
                time.sleep(0.01)
            trainer = psutil.Process(training(running.pid))
            os.kill(victim(running.pid), number)
            assert running.wait(300) != 0
            psutil.wait_procs([trainer], 60)
            assert not trainer.is_running()
        return log.read_text()

    def dvc(*command):
        done = subprocess.run(["dvc", *command], cwd=repository, env=env, capture_output=True, text=True)
        return done.stdout + done.stderr

    assert "going on" not in interrupt(plain, signal.SIGKILL)
    orphan = interrupt(["dvc", "exp", "run", *sets, "train"], signal.SIGTERM, lambda pid: pid)
    assert "going on after step" in orphan and "DVC has ended: this stage stops too" in orphan
    assert "all work is saved; to go on: the same dvc command" in orphan
    subprocess.run(["git", "switch", "-q", "master"], cwd=repository, env=env, check=True)  # DVC has detached HEAD
    third = interrupt(["dvc", "exp", "run", "--temp", *sets, "train"], signal.SIGTERM)
    assert "going on after step" in third and "exited with 75" in third and "the same dvc command" in third
    dvc("exp", "run", "--queue", "-n", "last", *sets, "train")
    dvc("queue", "start", "-j2")
    end = time.monotonic() + 300
    while "Success" not in (status := dvc("queue", "status")):
        assert "Failed" not in status and time.monotonic() < end, dvc("queue", "logs", "last")
        time.sleep(3)  # to ask costs a second of work
    assert "going on after step" in dvc("queue", "logs", "last")
    dvc("exp", "apply", "last")  # without the outputs of evaluate, which did not run
    assert weights(repository) == weights(tmp_path / "out")
    assert hashes(repository / "reports") == hashes(tmp_path / "out/reports")


def training(pid):
    """The training process among a process and its descendants."""
    found = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return next(p.pid for p in found if "main.py" in p.cmdline() and "stage=train" in p.cmdline())
