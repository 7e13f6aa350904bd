"""SIGKILL at random moments, and in the middle of every kind of work, against a run that nothing happened to."""

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers.processes import Launched

from modeling.checkpoints.checkpoint import checkpoints, read_checkpoint

STEPS = 240
RECIPE = [
    "data=shapes",
    "data.num_train=64",
    "data.num_test=16",
    "data.image_size=8",
    "model=tiny",
    "model.model_channels=8",
    "model.channel_mult=[1,2]",
    "model.attention_resolutions=[4]",
    "model.dropout=0.1",
    "diffusion.num_timesteps=20",
    "optimizer.warmup_steps=10",
    "optimizer.lr=1e-3",
    "sampler=ddim",
    "sampler.steps=3",
    f"trainer.steps={STEPS}",
    "trainer.batch_size=4",
    "trainer.log_every=5",
    "trainer.evaluate_every=10",
    "trainer.evaluate_images=16",
    "trainer.sample_every=20",
    "trainer.sample_images=4",
    "trainer.sample_steps=20",
    "trainer.checkpoint_every=7",
]
SEED = 4
RANDOM_KILLS = 16
# In the middle of what, by the function on the stack; at last, while the products are written.
AIMED = ["save_checkpoint", "held_out_losses", "draw_samples", "_train_step"] * 2


def start(folder, stage="train"):
    out = folder / "out"
    command = [*RECIPE, f"stage={stage}", f"out_dir={out}"]
    return Launched(folder, command, folder, {"WANDB_MODE": "offline"})


def hashes(out):
    files = [p for p in out.rglob("*") if p.is_file() and p.name not in ("train.json",) and not p.name.startswith(".")]
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def history(root):
    """What W&B's offline files of a run hold: [(step, values)], without times."""
    rows = []
    for folder in sorted((root / "wandb").glob("offline-run-*")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
        for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
            item = json.loads(line).get("history", {}).get("item")
            if item:
                timed = ("_runtime", "_timestamp", "train/images_per_second")
                rows.append((item["_step"], {k: v for k, v in item.items() if not k.startswith(timed)}))
    return rows


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    for stage in ("prepare", "train"):
        run = start(folder, stage)
        assert run.end() == 0, run.printed()
    return folder


def test_killed_at_any_moment_the_result_is_the_same(undisturbed, tmp_path):
    moments = random.Random(SEED)
    shutil.copytree(undisturbed / "out/data", tmp_path / "out/data")
    aims = [*AIMED, *[None] * RANDOM_KILLS]
    moments.shuffle(aims)
    places, reached = [], [0]
    for aim in [*aims, "publish"]:
        run = start(tmp_path)
        wanted = min(reached[-1] + moments.randrange(20), STEPS - 20)
        early = aim is None and moments.random() < 0.25  # before training begins again
        assert early or run.wait_for(lambda wanted=wanted: saved_step(tmp_path) >= wanted), run.printed()
        if aim is not None:
            assert run.wait_until_in(aim), run.printed()
            places.append([aim])
        else:
            time.sleep(moments.uniform(0, 0.1))
            places.append(run.where())
        run.send(signal.SIGKILL)
        assert run.end() == -signal.SIGKILL, run.printed()
        reached.append(saved_step(tmp_path))
    run = start(tmp_path)
    assert run.end() == 0, run.printed()
    print(f"{len(places)} kills (seed {SEED}), in: {count(places)}; checkpoints after them: {reached}")
    assert len(places) >= 20 and len(set(reached)) > 8, "the kills must be spread over the run"
    assert hashes(tmp_path / "out") == hashes(undisturbed / "out")
    (mine,), (theirs,) = ([p for p in f.glob("root/runs/*") if p.name != "data"] for f in (tmp_path, undisturbed))
    assert not list(mine.glob(".step*")), "what a kill left half-written is removed"
    a, b = (read_checkpoint(checkpoints(folder)[-1]) for folder in (mine, theirs))
    for key in ("step", "images", "sums", "model", "ema", "optimizer"):
        assert same(a[key], b[key]), key
    told, expected = history(tmp_path / "root"), history(undisturbed / "root")
    assert [step for step, _ in told] == [step for step, _ in expected] and told == expected


def saved_step(folder, root="root"):
    """The newest checkpoint's step."""
    return max((int(path.stem.split("-")[1]) for path in (folder / root / "runs").glob("*/step-*.pt")), default=0)


def count(places):
    kinds = ["save_checkpoint", "held_out_losses", "draw_samples", "_train_step", "publish", "_report", "run"]
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
