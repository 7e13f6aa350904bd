"""SIGKILL at random moments, and in the middle of every kind of work, compared with an undisturbed run."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time

import torch
from helpers.runs import finish, hashes, launch, run_folder, saved_step

from modeling.checkpoints.checkpoint import checkpoints, read_checkpoint

STEPS = 100
OFTEN = [f"trainer.steps={STEPS}", "trainer.log_every=3", "trainer.checkpoint_every=4"]
SEED = 4
RANDOM_KILLS = 12
AIMED_KILLS = ["save_checkpoint", "held_out_losses", "draw_samples", "train_step"] * 2  # functions on the stack


def test_killed_at_any_moment_the_result_is_the_same(tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for stage in ("prepare", "train"):
        finish(undisturbed, *OFTEN, stage=stage, WANDB_MODE="offline")
    shutil.copytree(undisturbed / "out/data", killed / "out/data")
    moments = random.Random(SEED)
    aims = [*AIMED_KILLS, *[None] * RANDOM_KILLS]
    moments.shuffle(aims)
    places, reached = [], [0]
    for aim in [*aims, "publish"]:
        run = launch(killed, *OFTEN, WANDB_MODE="offline")
        wanted = min(reached[-1] + 1 + moments.randrange(4), STEPS - 20)
        early = aim is None and moments.random() < 0.25  # before training begins again
        assert early or run.wait_for(lambda wanted=wanted: saved_step(killed) >= wanted), run.printed()
        if aim is None:
            time.sleep(moments.uniform(0, 0.1))
            places.append(run.stack())
        else:
            assert run.wait_until_in(aim), run.printed()
            places.append([aim])
        run.send_signal(signal.SIGKILL)
        assert run.end() == -signal.SIGKILL, run.printed()
        reached.append(saved_step(killed))
    finish(killed, *OFTEN, WANDB_MODE="offline")
    print(f"{len(places)} kills (seed {SEED}), in: {count(places)}; checkpoints after them: {reached}")
    assert len(places) >= 20 and len(set(reached)) > 8, "the kills must be spread over the run"
    assert hashes(killed / "out") == hashes(undisturbed / "out")
    assert not list(run_folder(killed).glob(".step*")), "what a kill left half-written is removed"
    a, b = (read_checkpoint(checkpoints(run_folder(root))[-1]) for root in (killed, undisturbed))
    for key in ("step", "images", "sums", "count", "model", "ema", "optimizer"):
        assert same(a[key], b[key]), key
    assert wandb_history(killed / "root") == wandb_history(undisturbed / "root")


def count(places):
    kinds = ["save_checkpoint", "held_out_losses", "draw_samples", "train_step", "publish", "_report", "run"]
    found = [next((kind for kind in kinds if kind in place), "start") for place in places]
    return {kind: found.count(kind) for kind in dict.fromkeys(found)}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def wandb_history(root):
    """What W&B's offline files of a run hold: [(step, values)], without times."""
    rows = []
    for folder in sorted((root / "wandb").glob("offline-run-*")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
        for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
            item = json.loads(line).get("history", {}).get("item")
            if item:
                timed = ("_runtime", "_timestamp", "train/images_per_second")
                rows.append((item["_step"], {k: v for k, v in item.items() if not k.startswith(timed)}))
    assert rows
    return rows
