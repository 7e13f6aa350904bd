"""One training that dies under `python main.py`, `dvc exp run` and `dvc exp run --temp`, and ends in DVC's queue."""

import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
from helpers.pipeline import copy_repository, environment
from test_faults import launch, weights
from test_kill import RECIPE, hashes, saved_step

STEPS = "trainer.steps=150"


def test_one_training_goes_on_from_one_way_of_running_to_the_next(tmp_path):
    repository = copy_repository(tmp_path)
    env = environment(repository, WANDB_MODE="disabled")
    sets = [word for change in (*RECIPE, STEPS) for word in ("-S", change)]
    plain = [sys.executable, "main.py", *RECIPE, STEPS, f"out_dir={tmp_path / 'plain'}"]
    for stage in ("prepare", "train"):
        assert launch(tmp_path, STEPS, stage=stage).end() == 0
    shutil.copytree(tmp_path / "out/data", tmp_path / "plain/data")

    def interrupted(command, number):
        """Runs until new checkpoints are there, and sends a signal to the training process; its output."""
        log = tmp_path / "log"
        before = saved(repository)
        with log.open("w") as file:
            running = subprocess.Popen(command, cwd=repository, env=env, stdout=file, stderr=subprocess.STDOUT)
            while saved(repository) < before + 14:
                assert running.poll() is None, log.read_text()
                time.sleep(0.01)
            os.kill(training(running.pid).pid, number)
            code = running.wait(300)
        assert code != 0
        return log.read_text()

    first = interrupted([*plain, "stage=train"], signal.SIGKILL)
    assert "going on" not in first
    second = interrupted(["dvc", "exp", "run", *sets, "train"], signal.SIGTERM)
    assert "going on after step" in second and "exited with 75" in second and "the same dvc command" in second
    third = interrupted(["dvc", "exp", "run", "--temp", *sets, "train"], signal.SIGKILL)
    assert "going on after step" in third
    subprocess.run(["dvc", "exp", "run", "--queue", "-n", "last", *sets, "train"], cwd=repository, env=env, check=True)
    subprocess.run(["dvc", "queue", "start"], cwd=repository, env=env, check=True)
    end = time.monotonic() + 300
    while "Success" not in (shown := output(repository, env, "queue", "status")):
        assert "Failed" not in shown and time.monotonic() < end, output(repository, env, "queue", "logs", "last")
        time.sleep(0.3)
    assert "going on after step" in output(repository, env, "queue", "logs", "last")
    output(repository, env, "exp", "apply", "last")  # it misses what evaluate makes, which did not run
    assert weights(repository, ".") == weights(tmp_path)
    assert hashes(repository / "reports") == hashes(tmp_path / "out/reports")


def saved(repository):
    return saved_step(repository, ".")


def training(pid):
    """The process of main.py among the descendants of a process, or the process itself."""
    found = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return next(p for p in found if "main.py" in p.cmdline() and "stage=train" in p.cmdline())


def output(repository, env, *command):
    done = subprocess.run(["dvc", *command], cwd=repository, env=env, capture_output=True, text=True)
    return done.stdout + done.stderr
