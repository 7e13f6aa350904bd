"""docs/extending.md: every patch applies to the code as it is, and what it adds works from the command line."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers.pipeline import ROOT, copy_repository, environment

PAGE = (ROOT / "docs/extending.md").read_text()
MOST_FILES = {
    "A sampler": 3,
    "A noise schedule": 3,
    "A data source": 3,
    "An optimizer": 3,
    "A metric of the evaluation": 1,
    "A key of the trainer": 4,
    "A value that training logs": 2,
}
PATCHES = {
    section.partition("\n")[0]: re.findall("^```diff\n(.*?)^```$", section, re.M | re.S)
    for section in PAGE.split("\n## ")[1:]
}


def apply(folder, patch, *options):
    """Applies a patch; the message of a failure names the file and the line of each hunk that does not fit."""
    command = ["git", "apply", "--verbose", *options]
    done = subprocess.run(command, cwd=folder, input=patch, capture_output=True, text=True)
    assert done.returncode == 0, f"mend this patch in docs/extending.md:\n{done.stderr}\n{patch}"


def test_the_page_has_one_patch_for_each_promise():
    assert {section: len(patches) for section, patches in PATCHES.items()} == dict.fromkeys(MOST_FILES, 1)


@pytest.mark.parametrize("section", MOST_FILES)
def test_a_patch_applies_by_itself_and_touches_few_files(section):
    (patch,) = PATCHES[section]
    apply(ROOT, patch, "--check")
    assert len(set(re.findall(r"^\+\+\+ b/(.+)$", patch, re.M))) <= MOST_FILES[section]


@pytest.fixture
def copy(tmp_path):
    """A copy of the repository with all patches."""
    copy = copy_repository(tmp_path)
    for (patch,) in PATCHES.values():
        apply(copy, patch)
    return copy


@pytest.mark.dev
def test_what_the_page_adds_is_in_style(copy):
    for check in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *check, "--config", ROOT / "pyproject.toml", "modeling"]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_what_the_page_adds_works(copy, tmp_path):
    """One process for all of it."""
    random, arrays = np.random.default_rng(0), {}
    for split, n in ("train", 40), ("test", 16):
        arrays[f"{split}_images"] = random.integers(0, 256, (n, 8, 8, 3), np.uint8)
        arrays[f"{split}_labels"] = np.arange(n)[:, None] % 3
    np.savez(tmp_path / "images.npz", **arrays)
    env = environment(copy, PYTHONPATH=f"{copy}{os.pathsep}{ROOT / 'tests'}", WANDB_MODE="disabled")
    command = [sys.executable, ROOT / "tests/helpers/extended.py", tmp_path / "images.npz", tmp_path / "out"]
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])

    # The sampler: of data from N(0, I) the ODE moves nothing; the error of first order halves with the step.
    x_0, exact = found["standard_normal"]
    assert x_0 == pytest.approx(exact, rel=1e-12)
    errors = [abs(x_0 / exact - 1) for x_0, exact in found["euler"]]
    assert errors[0] < 0.1 and errors[1] < 0.55 * errors[0] and errors[2] < 0.55 * errors[1]
    # The schedule, which diffusers does not know, goes there and back by its betas.
    assert found["exported"] == found["betas"]
    alphas_cumprod = np.cumprod(1 - np.array(found["betas"]))
    assert np.allclose(np.log(alphas_cumprod / (1 - alphas_cumprod)), np.linspace(13.3, -5, 20))
    # The data source.
    assert json.loads((tmp_path / "out/data/npz/data.json").read_text())["classes"] == ["0", "1", "2"]
    assert np.array_equal(np.load(tmp_path / "out/data/npz/train.npy"), arrays["train_images"])
    # The optimizer: another loss after the first step.
    assert found["radam"]["loss"].keys() == {"2", "4"} and found["radam"]["loss"]["4"] != found["adam"]["loss"]["4"]
    # The metric: of images whose values are all equally likely, 2 of 256.
    assert found["evaluate"]["saturated_of_test_images"] == np.isin(arrays["test_images"], (0, 255)).mean()
    assert 0 <= found["evaluate"]["saturated"] <= 1
    # The key of the trainer: every second of four steps updates the average.
    assert found["ema_updates"] == [2, 2]
    # The logged value.
    assert all(value > 1 for value in found["radam"]["weight_norm"].values())
