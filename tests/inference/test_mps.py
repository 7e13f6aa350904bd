"""An Apple GPU, as far as a machine without one can tell: a CPU that refuses float64 on the device, as MPS does.

Whether MPS has every operation, and what it computes, shows on such a machine only.
"""

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from helpers.training import CPU, Recorder, make, weights
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from modeling.evaluation.bits_per_dim import bits_per_dim, held_out_report
from modeling.inference.device import choose_compute, now
from modeling.inference.samples import draw_samples
from modeling.reliability.errors import ConfigError
from modeling.training.at_once import grid_sampler
from modeling.training.batches import draw_timesteps


class Device(TorchFunctionMode):
    """Computes on the CPU what is asked of MPS; knows which tensors would be there, and that none may be float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        asked = [leaf.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)]
        placed = any(getattr(leaf, "on_mps", False) for leaf in tree_leaves((args, kwargs)))
        moves = func is Tensor.cpu or bool(asked)
        args, kwargs = tree_map(
            lambda leaf: CPU.device if isinstance(leaf, torch.device) else leaf, (args, kwargs or {})
        )
        result = func(*args, **kwargs)
        if moves and isinstance(result, Tensor):
            result = result.view_as(result)  # another object, though on a CPU it would be the same
        if "mps" in asked or (placed and not moves):
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    assert leaf.dtype != torch.float64, f"float64 on MPS: {func}"
                    leaf.on_mps = True
        return result


class Generator(torch.Generator):
    """A CPU's, which says that it is of the device that was asked for."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")

    def __init__(self, device="cpu"):
        self.asked = torch.device(device)

    @property
    def device(self):
        return self.asked


@pytest.fixture
def mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lru_cache(lambda: True))  # as PyTorch's is
    monkeypatch.setattr(torch.mps, "synchronize", lambda: None)
    monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: torch.default_generator.manual_seed(seed))
    monkeypatch.setattr(torch, "Generator", Generator)
    with Device():
        yield choose_compute("mps", "auto")


def test_it_is_chosen_by_name_alone(monkeypatch, mps):
    assert (mps.device.type, mps.bf16) == ("mps", False) and mps.describe() == "Apple GPU by MPS, float32"
    assert choose_compute("auto", "fp32") == CPU
    with pytest.raises(ConfigError, match="precision=bf16: not with device=mps"):
        choose_compute("mps", "bf16")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device=mps: PyTorch finds no Apple GPU here; allowed are auto, cpu"):
        choose_compute("mps", "fp32")


def test_the_device_of_these_tests_refuses_float64(mps):
    double = torch.zeros(2, dtype=torch.float64)
    for refused in (lambda: double.to(mps.device), lambda: torch.zeros(1, device=mps.device).double()):
        with pytest.raises(AssertionError, match="float64 on MPS"):
            refused()
    assert double.to(mps.device, torch.float32).cpu().double().dtype == torch.float64
    assert now(mps.device) > 0


@pytest.mark.no_cover
def test_training_is_that_of_a_cpu_and_resumes_its_state(mps, tmp_path):
    other = make(tmp_path / "cpu", Recorder(), steps=8)
    trainer = make(tmp_path / "mps", Recorder(), compute=mps, steps=8)
    for each in (other, trainer):
        each.run()
    assert torch.equal(weights(trainer), weights(other)) and trainer.last_row == pytest.approx(other.last_row)
    other.train_step()
    trainer.state.load_state_dict(other.state.state_dict())
    assert trainer.state.means() == pytest.approx(other.state.means())
    stratified = draw_timesteps(20, 20, True, mps.generator(0))
    assert sorted(stratified.tolist()) == [*range(20)]


def test_samples_and_the_likelihood_are_those_of_a_cpu(mps, tmp_path):
    found = []
    for compute in (CPU, mps):
        trainer = make(tmp_path, Recorder(), compute=compute)
        model, sampler = trainer.model.eval(), replace(grid_sampler(trainer.config), steps=5, num_samples=3)
        images = draw_samples(model, sampler, range(3), (3, 8, 8), compute)
        report = held_out_report(model, trainer.test, 3, compute) | bits_per_dim(model, trainer.test, 3, None, compute)
        found.append((images, report["loss"], report["bits_per_dim"]))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1:] == pytest.approx(found[1][1:])


def test_large_data_stays_in_its_file(mps, monkeypatch):
    images = torch.zeros(3, dtype=torch.uint8)
    assert mps.place(images) is not images
    monkeypatch.setattr("modeling.inference.device.PLACE_AT_MOST", 2)
    assert mps.place(images) is images
