"""Faults injected for real: signals, full and read-only disks, damaged files, two runs at once, no memory."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers.processes import ROOT, Launched
from test_kill import RECIPE, hashes

from modeling.checkpoints.checkpoint import checkpoints, read_checkpoint

DEMO = ["experiment=demo", "data.num_train=400", "data.num_test=500"]  # the demo but for the number of its images


def launch(folder, *changes, stage="train", recipe=RECIPE, limits=None, out="out", **environment):
    command = [*recipe, f"stage={stage}", f"out_dir={folder / out}", *changes]
    return Launched(folder, command, folder, environment, limits)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with prepared data and a trained model, and the hashes of what 40 undisturbed steps give."""
    folder = tmp_path_factory.mktemp("base")
    for stage in ("prepare", "train"):
        run = launch(folder, "trainer.steps=40", stage=stage)
        assert run.end() == 0, run.printed()
    return folder


@pytest.fixture
def folder(base, tmp_path):
    shutil.copytree(base / "out/data", tmp_path / "out/data")
    return tmp_path


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
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


# Signals


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    few = ["trainer.steps=2", "trainer.sample_every=2", "trainer.sample_steps=2"]
    for stage in ("prepare", "train"):
        run = launch(folder, *few, stage=stage, recipe=DEMO)
        assert run.end() == 0, run.printed()
    return folder


STOPS = {
    "_train_step": ("train", "after step"),
    "ddim_sample": ("train", "after step"),
    "held_out_losses": ("train", "after step"),
    "bits_per_dim": ("evaluate", "stopped"),
    "held_out_report": ("evaluate", "stopped"),
    "asked_samples": ("evaluate", "stopped"),
    "draw_shapes": ("prepare", "stopped"),
}


@pytest.mark.parametrize("place", STOPS)
def test_a_signal_stops_the_demo_within_five_seconds_wherever_it_is(demo, place):
    stage, said = STOPS[place]
    often = ["trainer.steps=1500", "trainer.sample_every=3", "trainer.evaluate_every=3", "data.num_train=10000"]
    often[3:] = [] if stage != "prepare" else often[3:]
    out = "out" if stage != "prepare" else "elsewhere"
    run = launch(demo, *often, stage=stage, recipe=DEMO, out=out)
    assert run.wait_until_in(place), run.printed()
    begin = time.monotonic()
    run.send(signal.SIGINT if stage == "evaluate" else signal.SIGTERM)
    assert run.end() == 75, run.printed()
    assert time.monotonic() - begin < 5
    (last,) = run.lines()
    assert said in last and f"to go on: python {ROOT / 'main.py'} experiment=demo" in last
    assert not list((demo / out).rglob(".*.partial"))


def test_stopped_while_sampling_or_evaluating_loses_nothing(base, folder):
    for place in ("draw_samples", "held_out_losses"):
        run = launch(folder, "trainer.steps=40")
        assert run.wait_until_in(place)
        run.send(signal.SIGTERM)
        assert run.end() == 75, run.printed()
    run = launch(folder, "trainer.steps=40")
    assert run.end() == 0 and "going on after step" in run.printed()
    assert hashes(folder / "out") == hashes(base / "out")


def test_the_second_signal_ends_at_once(folder):
    """One step on a hundred thousand images takes long, and the first signal waits for its end."""
    run = launch(folder, "trainer.steps=100", "trainer.batch_size=100000")
    assert run.wait_until_in("_train_step")
    run.send(signal.SIGTERM)
    assert run.wait_for(lambda: not caught(run, signal.SIGTERM)), "the request was not heard before the step's end"
    run.send(signal.SIGTERM)
    assert run.end(1) == -signal.SIGTERM


def caught(run, number):
    """Whether the process has a handler for a signal."""
    status = Path(f"/proc/{run.process.pid}/status").read_text()
    mask = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return bool(mask >> (number - 1) & 1)


# Losses that are not finite


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_evidence(folder):
    wild = ["trainer.steps=40", "optimizer.lr=1e4", "optimizer.grad_clip=null", "trainer.checkpoint_every=2"]
    run = launch(folder, *wild, "optimizer.warmup_steps=40")
    assert run.end() == 1, run.printed()
    (last,) = run.lines()
    bad = next((folder / "root/runs").glob("*/bad-step-*.pt"))
    step = int(bad.stem.split("-")[-1])
    assert f"step {step} is not finite (last losses" in last and "learning rate" in last
    assert "lower optimizer.lr" in last and str(bad) in last
    batch = torch.load(bad, weights_only=True)
    assert batch["step"] == step and batch["x_0"].shape == (4, 3, 8, 8) and len(batch["t"]) == 4
    assert batch["lr"] == pytest.approx(1e4 * step / 40)
    good = checkpoints(bad.parent)
    assert all(int(path.stem[5:]) < step for path in good)
    if good:
        assert f"trainer.resume={good[-1]}" in last
        state = read_checkpoint(good[-1])
        assert all(tensor.isfinite().all() for tensor in state["model"].values())
    again = launch(folder, *wild, "optimizer.warmup_steps=40")
    assert again.end() == 1 and f"step {step} is not finite" in again.printed()


# Disks


@pytest.mark.parametrize("written", ["checkpoint", "metrics", "samples"])
def test_a_full_disk_is_one_line_and_a_rerun_goes_on(base, folder, disk, written):
    """The disk fills up while training runs, which then has nothing to write but the one thing that is named."""
    kept, steps = {name: f"trainer.{name}_every=1000" for name in ("checkpoint", "log", "evaluate", "sample")}, 40
    if written == "metrics":
        kept["log"], steps = "trainer.log_every=1", 120  # rows of several pages
    else:
        name = {"checkpoint": "checkpoint", "samples": "sample"}[written]
        kept[name] = f"trainer.{name}_every=1"
    short = launch(folder, "trainer.steps=7", *kept.values(), DVC_ROOT=str(disk))
    assert short.end() == 0, short.printed()
    run = launch(folder, f"trainer.steps={steps}", *kept.values(), DVC_ROOT=str(disk))
    assert run.wait_until_in("_train_step"), run.printed()
    run.send(signal.SIGSTOP)
    fill(disk)
    before = {path: read_checkpoint(path)["step"] for path in disk.glob("runs/*/step-*.pt")}
    run.send(signal.SIGCONT)
    assert run.end() == 1, run.printed()
    (last,) = run.lines()
    assert last.startswith("error: ") and "cannot be written" in last and "o space left" in last
    assert {"checkpoint": "/step-", "metrics": "train.csv", "samples": "/samples/"}[written] in last
    assert before and {path: read_checkpoint(path)["step"] for path in disk.glob("runs/*/step-*.pt")} == before
    (disk / "filler").unlink()
    run = launch(folder, f"trainer.steps={steps}", *kept.values(), DVC_ROOT=str(disk))
    assert run.end() == 0 and f"going on after step {max(before.values())}" in run.printed()
    assert steps > 40 or weights(folder) == weights(base)


def weights(folder, out="out"):
    from safetensors.torch import load_file

    found = load_file(folder / out / "models/model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in found.items()}


@pytest.mark.parametrize("stage", ["prepare", "train", "sample", "evaluate"])
def test_an_output_on_a_full_disk_is_one_line_and_what_was_there_is_intact(base, tmp_path, disk, stage):
    shutil.copytree(base / "out", disk / "out")
    if stage == "sample":
        run = launch(disk.parent, "sampler.num_samples=70", stage=stage, out="disk/out", DVC_ROOT=str(base / "root"))
        assert run.end() == 0, run.printed()
    before = hashes(disk / "out")
    fill(disk)
    changes = ["data.num_train=3000"] if stage == "prepare" else ["trainer.steps=40"]
    args = (disk.parent, *changes)
    run = launch(*args, stage=stage, out="disk/out", DVC_ROOT=str(base / "root"))
    assert run.end() == 1, run.printed()
    (last,) = run.lines()
    assert "cannot be written" in last and "o space left" in last
    assert hashes(disk / "out") == before
    (disk / "filler").unlink()
    run = launch(*args, stage=stage, out="disk/out", DVC_ROOT=str(base / "root"))
    assert run.end() == 0, run.printed()


@pytest.mark.parametrize("stage", ["prepare", "train", "sample", "evaluate"])
def test_a_read_only_disk_is_one_line(base, disk, stage):
    shutil.copytree(base / "out", disk / "out")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    run = launch(disk.parent, "trainer.steps=40", stage=stage, out="disk/out", DVC_ROOT=str(base / "root"))
    assert run.end() == 1, run.printed()
    (last,) = run.lines()
    assert "cannot be written" in last and "Read-only file system" in last


def test_a_file_that_cannot_grow(folder):
    """The same without root: the system refuses files above 100 kB, and a checkpoint has more."""
    run = launch(folder, "trainer.steps=40", limits={"RLIMIT_FSIZE": 100_000})
    assert run.end() == 1, run.printed()
    (last,) = run.lines()
    assert "step-000000007.pt cannot be written: File too large" in last
    assert not list(folder.glob("root/runs/*/.step*"))


# Checkpoints


def damage(path, how):
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "of another version":
        torch.save(read_checkpoint(path) | {"version": 999}, path)
    elif how == "of another network":
        state = read_checkpoint(path)
        state["model"].popitem()
        torch.save(state, path)
    else:  # the system refuses to open it
        path.unlink()
        path.symlink_to(path.name)


DAMAGES = ["truncated", "flipped", "empty", "of another version", "of another network", "unreadable"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_nothing_changes(base, folder, how):
    shutil.copytree(base / "root/runs", folder / "root/runs")
    older, newer = checkpoints(next(p for p in (folder / "root/runs").iterdir() if p.name != "data"))
    damage(newer, how)
    run = launch(folder, "trainer.steps=40")
    assert run.end() == 0 and f"{newer} is damaged" in run.printed()
    assert f"going on after step {int(older.stem[5:])}" in run.printed()
    assert hashes(folder / "out") == hashes(base / "out")


def test_where_all_are_damaged_nobody_starts_afresh_unasked(base, folder):
    shutil.copytree(base / "root/runs", folder / "root/runs")
    for path in checkpoints(next(p for p in (folder / "root/runs").iterdir() if p.name != "data")):
        damage(path, "truncated")
    run = launch(folder, "trainer.steps=40")
    assert run.end() == 1
    (last,) = run.lines()
    assert "none of the 2 checkpoints" in last and "trainer.resume=never" in last
    run = launch(folder, "trainer.steps=40", "trainer.resume=never")
    assert run.end() == 0 and "going on" not in run.printed() and "the earlier state is in" in run.printed()
    assert weights(folder) == weights(base)


# Going on


def test_resume_never_and_from_a_path(base, folder):
    run = launch(folder, "trainer.steps=14")
    assert run.end() == 0
    (old,) = (folder / "root/runs").glob("*/step-000000014.pt")
    keep = folder / "kept.pt"
    shutil.copy(old, keep)
    run = launch(folder, "trainer.steps=14", "trainer.resume=never")
    assert run.end() == 0 and "going on" not in run.printed()
    # Another learning rate from there: its own run, and the new rate is in force.
    other = [f"trainer.resume={keep}", "trainer.steps=20", "optimizer.lr=1e-5"]
    run = launch(folder, *other)
    assert run.end() == 0 and "going on after step 14" in run.printed()
    with (folder / "out/reports/train.csv").open() as file:
        assert {row["lr"] for row in csv.DictReader(file)} == {"1e-05"}
    run = launch(folder, *other)
    assert run.end() == 0 and "going on after step 20" in run.printed()
    # The same configuration from there is the whole run again.
    run = launch(folder, f"trainer.resume={keep}", "trainer.steps=40")
    assert run.end() == 0 and weights(folder) == weights(base)
    for wrong, why in (
        ("trainer.resume=absent", "no such file"),
        (f"trainer.resume={keep} trainer.steps=7", "it is of step 14"),
        (f"trainer.resume={keep} model.model_channels=16", "size mismatch"),
        (f"trainer.resume={keep} optimizer=sgd", "of another optimizer"),
    ):
        run = launch(folder, *wrong.split())
        assert run.end() == 2 and why in run.lines()[-1] and len(run.lines()) == 1, run.printed()


def test_another_configuration_never_takes_up_a_checkpoint_and_other_code_says_so(base, folder):
    shutil.copytree(base / "root/runs", folder / "root/runs")
    for change in ("seed=1", "optimizer.lr=2e-3", "trainer.batch_size=5", "optimizer.lr_decay=cosine"):
        run = launch(folder, "trainer.steps=7", change)
        assert run.end() == 0 and "going on" not in run.printed() and "has changed" not in run.printed()
    # A copy of the repository with one other line of code.
    copy = folder / "copy"
    for name in ("modeling", "conf"):
        shutil.copytree(ROOT / name, copy / name)
    shutil.copy(ROOT / "main.py", copy)
    with (copy / "modeling/ema.py").open("a") as file:
        file.write("\n# a change\n")
    command = [*RECIPE, "stage=train", "trainer.steps=7", f"out_dir={folder / 'out'}"]
    environment = os.environ | {"DVC_ROOT": str(folder / "root"), "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(copy / "main.py"), *command], env=environment, capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if "code that training imports has changed" in line]
    assert len(told) == 1 and "since step 40" in told[0] and "going on after" not in done.stdout


def test_the_second_of_two_equal_runs_refuses(base, folder):
    first = launch(folder, "trainer.steps=40")
    assert first.wait_until_in("_train_step")
    first.send(signal.SIGSTOP)
    second = launch(folder, "trainer.steps=40")
    assert second.end() == 1
    (last,) = second.lines()
    assert f"process {first.process.pid} on" in last and "is working in" in last
    first.send(signal.SIGCONT)
    assert first.end() == 0 and hashes(folder / "out") == hashes(base / "out")


def test_two_runs_that_prepare_the_same_data_take_turns(tmp_path):
    runs = [
        Launched(tmp_path / str(k), [*RECIPE, "stage=train", "trainer.steps=7", f"seed={k}", f"hydra.run.dir={k}"],
                 tmp_path, {"DVC_ROOT": str(tmp_path)})
        for k in (1, 2)
    ]  # fmt: skip
    assert [run.end() for run in runs] == [0, 0], [run.printed() for run in runs]
    assert "".join(run.printed() for run in runs).count("data: shapes, 64 + 16 images") == 1


# Memory, W&B


def test_no_memory_is_one_line_that_says_what_to_lower(folder):
    limit = {"RLIMIT_AS": 7 << 30}
    big = ["trainer.steps=40", "trainer.batch_size=30000", "model.model_channels=128"]
    run = launch(folder, *big, limits=limit)
    assert run.end() == 1, run.printed()
    (last,) = run.lines()
    assert "out of memory in stage train" in last and "lower trainer.batch_size" in last


def test_training_goes_on_when_wandbs_process_is_killed(base, folder):
    run = launch(folder, "trainer.steps=40", WANDB_MODE="offline")
    assert run.wait_until_in("_train_step")
    killed = [child for child in psutil.Process(run.process.pid).children(recursive=True)]
    assert killed
    for child in killed:
        child.kill()
    assert run.end(60) == 0, run.printed()
    assert hashes(folder / "out") == hashes(base / "out")
