"""Which sampler a stage uses: what the user named, else what the model's recipe named."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.configs import group, load
from helpers.training import CPU

from modeling.inference.device import Compute
from modeling.reliability.errors import UserError
from modeling.stages import train
from modeling.stages.sample import as_recipe

METHOD = group("sampler", "ddim", steps=50, eta=0.5, guidance_scale=3.0).method()


def chosen(*typed, recipe=METHOD, named=()):
    config = load(*typed)
    config.named |= {*named}
    sampler = as_recipe(config, {"config": {"sampler": json.loads(json.dumps(recipe))} if recipe else {}}).sampler
    assert sampler.spacing == ("log_snr" if sampler.name in ("dpm_solver", "unipc") else "uniform")
    return sampler.name, sampler.steps, sampler.guidance_scale, getattr(sampler, "eta", None)


def test_the_recipe_of_the_model_decides_what_the_user_did_not_name():
    assert "num_samples" not in METHOD and "seed" not in METHOD
    assert chosen() == ("ddim", 50, 3.0, 0.5)
    assert chosen("sampler.steps=20", "sampler.seed=3", "sampler.guidance_scale=1") == ("ddim", 20, 1.0, 0.5)
    assert chosen("sampler=dpm_solver") == ("dpm_solver", 20, 1.0, None)
    assert chosen(recipe=group("sampler", "unipc").method()) == ("unipc", 20, 1.0, None)
    assert chosen("experiment=cifar10_cpu") == ("unipc", 20, 2.5, None)
    assert chosen(recipe=None) == ("ddpm", 1000, 1.0, None)  # of an old file, or another library
    assert chosen(named=["sampler"]) == ("ddpm", 1000, 1.0, None)  # of params.yaml, see main.py


def test_a_file_from_before_there_were_spacings_is_sampled_as_it_was():
    old = {key: value for key, value in METHOD.items() if key != "spacing"} | {"name": "dpm_solver"}
    del old["eta"]
    config = load("sampler.steps=5")
    config.sampler.spacing = "karras"  # whatever conf/ says of another sampler
    meta = {"config": {"sampler": old}}
    assert as_recipe(config, meta).sampler.spacing == "uniform"
    config.named |= {"sampler.spacing"}
    assert as_recipe(config, meta).sampler.spacing == "karras"


@pytest.mark.parametrize(
    ("scales", "evaluations", "text"),
    [
        ((1.0, 1.0), 4, ""),
        ((2.5, 1.0), 8, ", guidance 2.5"),
        ((1.0, 3.0), 8, ", autoguidance 3"),
        ((0.0, 0.0), 12, ", guidance 0, autoguidance 0"),
    ],
)
def test_what_guidance_costs_and_is_called(scales, evaluations, text):
    guidance, autoguidance = scales
    made = group("sampler", "ddim", steps=4, guidance_scale=guidance, autoguidance_scale=autoguidance)
    assert made.evaluations() == evaluations and made.caption() == f"ddim, 4 steps{text}, seed 0"


@pytest.mark.parametrize(
    "lie",
    [
        {"name": "x"},
        {"eta": 5.0},
        {"steps": 0},
        {"steps": "2"},
        {"eta": None},
        {"more": 1},
        {"guidance_scale": -1.0},
        {"spacing": "x"},
    ],
)
def test_a_recipe_that_cannot_be_is_one_line(lie):
    with pytest.raises(UserError, match=r"names no valid sampler: .*; name one: sampler=ddim"):
        chosen(recipe=METHOD | lie)


def test_a_training_says_which_others_use_its_cores(monkeypatch, caplog):
    monkeypatch.setattr(train, "cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    lines = []
    cases = [([], CPU), ([7], CPU), ([7, 8], CPU), ([7, 8], Compute(torch.device("cuda"), False))]
    for others, compute in cases:
        monkeypatch.setattr(train, "sharers", lambda locks, others=others: others)
        caplog.clear()
        train._mention_sharers(SimpleNamespace(folder=Path("runs/x")), compute)
        lines.append(caplog.messages)
    assert lines == [[], [], ["other trainings run on the same cores (process 7, 8): threads=1 in each is faster"], []]
    monkeypatch.setattr(train, "sharers", lambda locks: [7])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    train._mention_sharers(SimpleNamespace(folder=Path("runs/x")), CPU)
    assert caplog.messages == ["another training runs on the same cores (process 7): threads=2 in each is faster"]
