"""Faults injected for real: signals, full and read-only disks, damaged files, two runs at once, no memory."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from helpers.once import once
from helpers.pipeline import copy_repository, environment
from helpers.processes import ROOT
from helpers.runs import RECIPE, curves, finish, hashes, launch, run_folder, weights

from modeling.checkpoints.checkpoint import checkpoints, read_checkpoint, step_of

STAGES = ["prepare", "train", "sample", "evaluate"]
DEMO = ["experiment=demo", "data.num_train=400", "data.num_test=500"]  # the demo but for the number of its images


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with prepared data and a model of 40 undisturbed steps."""

    def make(folder):
        for stage in ("prepare", "train"):
            finish(folder, stage=stage)

    return once(tmp_path_factory, "base", make)


@pytest.fixture
def folder(base, tmp_path):
    """A folder with prepared data."""
    shutil.copytree(base / "out/data", tmp_path / "out/data")
    return tmp_path


@pytest.fixture
def resumed(base, folder):
    """A folder with prepared data and the state of the undisturbed run."""
    shutil.copytree(run_folder(base), folder / "root/runs" / run_folder(base).name)
    return folder


@pytest.fixture
def disk(tmp_path):
    """A file system of 8 MB of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root mounts a small disk; test_a_file_that_cannot_grow needs no root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)], check=True)
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def fill(disk):
    with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


# Signals


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    few = ["trainer.steps=2", "trainer.sample_every=2", "trainer.sample_steps=2"]

    def make(folder):
        for stage in ("prepare", "train"):
            finish(folder, *few, stage=stage, recipe=DEMO)

    return once(tmp_path_factory, "demo", make)


@pytest.mark.parametrize(
    ("place", "stage", "message"),
    [
        ("train_step", "train", "after step"),
        ("unipc_sample", "train", "after step"),
        ("held_out_losses", "train", "after step"),
        ("bits_per_dim", "evaluate", "stopped"),
        ("held_out_report", "evaluate", "stopped"),
        ("kept_samples", "evaluate", "stopped"),
        ("draw_shapes", "prepare", "stopped"),
    ],
)
def test_a_signal_stops_the_demo_within_five_seconds_anywhere(demo, place, stage, message):
    often = ["trainer.steps=1500", "trainer.sample_every=3", "trainer.evaluate_every=3"]
    out = "out"
    if stage == "prepare":
        often, out = [*often, "data.num_train=10000"], "elsewhere"
    run = launch(demo, *often, stage=stage, recipe=DEMO, out=out)
    assert run.wait_until_in(place), run.printed()
    begin = time.monotonic()
    run.send_signal(signal.SIGINT if stage == "evaluate" else signal.SIGTERM)
    assert run.end() == 75, run.printed()
    assert time.monotonic() - begin < 5
    assert message in run.last_line()
    assert f"to go on: python {shlex.quote(str(ROOT / 'main.py'))} experiment=demo" in run.last_line()
    assert not list((demo / out).rglob(".*.partial"))


@pytest.mark.measured
def test_a_stop_while_sampling_or_evaluating_loses_nothing(base, folder):
    for place in ("draw_samples", "held_out_losses"):
        run = launch(folder)
        assert run.wait_until_in(place)
        run.send_signal(signal.SIGTERM)
        assert run.end() == 75, run.printed()
    assert "going on after step" in finish(folder)
    assert hashes(folder / "out") == hashes(base / "out")


def test_the_second_signal_ends_at_once(folder):
    """One step on a hundred thousand images takes long, and the first signal waits for its end."""
    run = launch(folder, "trainer.batch_size=100000")
    assert run.wait_until_in("train_step")
    run.send_signal(signal.SIGTERM)
    assert run.wait_for(lambda: not caught(run, signal.SIGTERM)), "the first signal waited for the end of the step"
    run.send_signal(signal.SIGTERM)
    assert run.end(1) == -signal.SIGTERM


def caught(run, number):
    """Whether the process has a handler for a signal."""
    status = Path(f"/proc/{run.process.pid}/status").read_text()
    mask = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return bool(mask >> (number - 1) & 1)


# Losses that are not finite


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_evidence(folder):
    wild = ["optimizer.lr=1e4", "optimizer.grad_clip=null", "trainer.checkpoint_every=2", "optimizer.warmup_steps=40"]
    line = finish(folder, *wild, code=1)
    bad = next(run_folder(folder).glob("bad-step-*.pt"))
    step = int(bad.stem.split("-")[-1])
    assert f"step {step} is not finite (last losses" in line and "learning rate" in line
    assert "lower optimizer.lr" in line and str(bad) in line
    batch = torch.load(bad, weights_only=True)
    assert batch["step"] == step and batch["x_0"].shape == (4, 3, 8, 8) and len(batch["t"]) == 4
    assert batch["lr"] == pytest.approx(1e4 * step / 40)
    good = checkpoints(bad.parent)
    assert good and all(step_of(path) < step for path in good)
    assert f"trainer.resume={good[-1]}" in line
    assert all(tensor.isfinite().all() for tensor in read_checkpoint(good[-1])["model"].values())
    assert f"step {step} is not finite" in finish(folder, *wild, code=1)


# Disks


@pytest.mark.parametrize(
    ("often", "steps", "name"),
    [
        ("checkpoint_every", 40, "/step-"),
        ("log_every", 120, "train.csv"),  # rows of several pages
        ("sample_every", 40, "/samples/"),
    ],
)
def test_a_full_disk_is_one_line_and_a_rerun_resumes(base, folder, disk, often, steps, name):
    """The disk fills up while training runs, which then has nothing to write but the file that is named."""
    kept = [f"trainer.{key}_every=1000" for key in ("checkpoint", "log", "evaluate", "sample")] + [f"trainer.{often}=1"]
    finish(folder, *kept, "trainer.steps=7", DVC_ROOT=str(disk))
    kept.append(f"trainer.steps={steps}")
    run = launch(folder, *kept, DVC_ROOT=str(disk))
    assert run.wait_until_in("train_step"), run.printed()
    run.send_signal(signal.SIGSTOP)
    fill(disk)
    saved = {path: read_checkpoint(path)["step"] for path in disk.glob("runs/*/step-*.pt")}
    run.send_signal(signal.SIGCONT)
    assert run.end() == 1, run.printed()
    line = run.last_line()
    assert line.startswith("error: ") and "cannot be written" in line and "o space left" in line and name in line
    assert saved and {path: read_checkpoint(path)["step"] for path in disk.glob("runs/*/step-*.pt")} == saved
    (disk / "filler").unlink()
    assert f"going on after step {max(saved.values())}" in finish(folder, *kept, DVC_ROOT=str(disk))
    assert steps > 40 or weights(folder / "out") == weights(base / "out")


@pytest.mark.parametrize("stage", STAGES)
def test_an_output_on_a_full_disk_is_one_line_and_the_earlier_output_is_intact(base, disk, stage):
    shutil.copytree(base / "out", disk / "out")
    options = {"stage": stage, "out": "disk/out", "DVC_ROOT": str(base / "root")}
    if stage == "sample":
        finish(disk.parent, "sampler.num_samples=70", **options)
    before = hashes(disk / "out")
    fill(disk)
    changes = ["data.num_train=3000"] if stage == "prepare" else []
    line = finish(disk.parent, *changes, code=1, **options)
    assert "cannot be written" in line and "o space left" in line
    assert hashes(disk / "out") == before
    (disk / "filler").unlink()
    finish(disk.parent, *changes, **options)


@pytest.mark.parametrize("stage", STAGES)
def test_a_read_only_disk_is_one_line(base, disk, stage):
    shutil.copytree(base / "out", disk / "out")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    line = finish(disk.parent, stage=stage, out="disk/out", code=1, DVC_ROOT=str(base / "root"))
    assert "cannot be written" in line and "Read-only file system" in line


def test_a_file_that_cannot_grow(folder):
    """The same without root: the system refuses files above 100 kB, and a checkpoint has more."""
    line = finish(folder, limits={"RLIMIT_FSIZE": 100_000}, code=1)
    assert "step-000000007.pt cannot be written: File too large" in line
    assert not list(folder.glob("root/runs/*/.step*"))


# Checkpoints; each kind of damage is in tests/checkpoints/test_checkpoint.py


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def test_a_damaged_checkpoint_is_skipped_and_nothing_changes(base, resumed):
    older, newer = checkpoints(run_folder(resumed))
    truncate(newer)
    printed = finish(resumed)
    assert f"{newer} is damaged" in printed and f"going on after step {step_of(older)}" in printed
    assert hashes(resumed / "out") == hashes(base / "out")


@pytest.mark.measured
def test_if_all_checkpoints_are_damaged_training_does_not_start_from_step_0_unasked(base, resumed):
    for path in checkpoints(run_folder(resumed)):
        truncate(path)
    line = finish(resumed, code=1)
    assert "none of the 2 checkpoints" in line and "trainer.resume=never" in line
    printed = finish(resumed, "trainer.resume=never")
    assert "going on" not in printed and "the earlier state is in" in printed
    assert weights(resumed / "out") == weights(base / "out")


# Resuming


def test_resume_from_a_path(base, folder):
    finish(folder, "trainer.steps=14")
    keep = folder / "kept.pt"
    shutil.copy(checkpoints(run_folder(folder))[-1], keep)
    # Another learning rate from there: its own run, and the new rate is in force.
    other = [f"trainer.resume={keep}", "trainer.steps=20", "optimizer.lr=1e-5"]
    assert "going on after step 14" in finish(folder, *other)
    assert set(curves(folder / "out")["lr"].values()) == {1e-5}
    assert "going on after step 20" in finish(folder, *other)
    # The same configuration from there is the whole run again.
    finish(folder, f"trainer.resume={keep}")
    assert weights(folder / "out") == weights(base / "out")
    for wrong, reason in (
        (["trainer.resume=absent"], "there is no "),
        ([f"trainer.resume={keep}", "trainer.steps=7"], "it is of step 14"),
        ([f"trainer.resume={keep}", "model.model_channels=16"], "size mismatch"),
        ([f"trainer.resume={keep}", "optimizer=sgd"], "of another optimizer"),
    ):
        assert reason in finish(folder, *wrong, code=2)


def test_another_configuration_never_resumes_a_checkpoint_and_other_code_is_mentioned(resumed):
    for change in ("seed=1", "optimizer.lr=2e-3", "trainer.batch_size=5", "optimizer.lr_decay=cosine"):
        printed = finish(resumed, "trainer.steps=1", change)
        assert "going on" not in printed and "has changed" not in printed
    copy = copy_repository(resumed)
    with (copy / "modeling/training/ema.py").open("a") as file:
        file.write("\n# a change\n")
    command = [sys.executable, "main.py", *RECIPE, "stage=train", "trainer.steps=1", f"out_dir={resumed / 'out'}"]
    env = environment(resumed / "root", WANDB_MODE="disabled")
    printed = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, cwd=copy, check=True).stdout
    assert printed.count("code that training imports has changed since step 40") == 1
    assert "going on after" not in printed


def test_the_second_of_two_equal_runs_refuses(base, folder):
    first = launch(folder)
    assert first.wait_until_in("train_step")
    first.send_signal(signal.SIGSTOP)
    line = finish(folder, code=1)
    assert f"process {first.process.pid} on" in line and "is working in" in line
    first.send_signal(signal.SIGCONT)
    assert first.end() == 0 and hashes(folder / "out") == hashes(base / "out")


def test_two_runs_that_need_the_same_data_prepare_it_once(tmp_path):
    changes = ["trainer.steps=1", "out_dir=null"]
    runs = [
        launch(tmp_path / seed, *changes, f"seed={seed}", f"hydra.run.dir={seed}", DVC_ROOT=str(tmp_path))
        for seed in "12"
    ]
    assert [run.end() for run in runs] == [0, 0], [run.printed() for run in runs]
    assert "".join(run.printed() for run in runs).count("data: shapes, 64 + 16 images") == 1


# Memory, W&B


def test_no_memory_is_one_line_that_says_what_to_lower(folder):
    big = ["trainer.batch_size=30000", "model.model_channels=128"]
    line = finish(folder, *big, limits={"RLIMIT_AS": 7 << 30}, code=1)
    assert "out of memory in stage train" in line and "lower trainer.batch_size" in line


def test_training_goes_on_when_wandbs_process_is_killed(base, folder):
    run = launch(folder, WANDB_MODE="offline")
    assert run.wait_until_in("train_step")
    children = psutil.Process(run.process.pid).children(recursive=True)
    assert children
    for child in children:
        child.kill()
    assert run.end(60) == 0, run.printed()
    assert hashes(folder / "out") == hashes(base / "out")
