"""Equality with diffusers, given the same noise and the same network; where the two differ on purpose, who is right."""

import re

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel, UniPCMultistepScheduler
from helpers.closed_forms import sample

from modeling.diffusion.model import PREDICTION_TYPES, VARIANCES, DiffusionModel
from modeling.diffusion.schedule import NoiseSchedule, cosine_betas, linear_betas, sigmoid_betas
from modeling.diffusion.unet import UNet
from modeling.interop.weight_names import from_diffusers, to_diffusers

LINEAR = linear_betas(1000, 1e-4, 0.02)
SCHEDULES = {"linear": LINEAR, "squaredcos_cap_v2": cosine_betas(1000)}


def mixed(x, t):
    """A network that looks at both of its inputs."""
    return torch.tanh(x) * (1 + wave(x, t)) / 2


def mixed_and_variance(x, t):
    return torch.cat([mixed(x, t), torch.tanh(x + wave(x, t))], dim=1)


def wave(x, t):
    return torch.sin(t.to(x.dtype) / 100).reshape(-1, 1, 1, 1)


def deviation(ours, theirs):
    return (ours.double() - theirs.double()).abs().max().item()


@pytest.fixture
def equal(record_deviation):
    """Asserts that two tensors agree within `bound` times their size (at least 1), and notes how well they do."""

    def check(item, ours, theirs, bound):
        relative = deviation(ours, theirs) / max(theirs.abs().max().item(), 1)
        record_deviation(f"diffusers: {item}", relative)
        assert relative < bound

    return check


def run(scheduler, network, x, steps, **arguments):
    """The library's sampling loop, with the noise of `noise_like(x)`."""
    if not isinstance(scheduler, UniPCMultistepScheduler):  # it takes none
        arguments["generator"] = torch.Generator().manual_seed(3)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, torch.full((len(x),), int(t))), t, x, **arguments).prev_sample
    return x


def noise_like(x):
    draws = torch.Generator().manual_seed(3)
    return lambda: torch.randn(x.shape, generator=draws, dtype=x.dtype)


@pytest.fixture
def x_T(generator):
    return torch.randn(4, 2, 4, 4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name, equal):
    theirs = DDPMScheduler(beta_schedule=name)
    ours = NoiseSchedule(SCHEDULES[name])
    equal(f"betas, {name}", ours.betas, theirs.betas, 2e-7)
    equal(f"alphas_cumprod, {name}", ours.alphas_cumprod, theirs.alphas_cumprod, 1e-6)


def test_the_librarys_sigmoid_is_another_schedule():
    """There the betas are a sigmoid; in Jabri et al. 2022, and here, alphas_cumprod is."""
    assert deviation(sigmoid_betas(1000, -3, 3, 1), DDPMScheduler(beta_schedule="sigmoid").betas) > 0.1


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [20, 1000])
def test_ddpm(name, variance, prediction_type, steps, x_T, equal):
    network, kind = (mixed_and_variance, "learned_range") if variance == "learned" else (mixed, variance)
    model = DiffusionModel(network, NoiseSchedule(SCHEDULES[name]), prediction_type, variance)
    betas = SCHEDULES[name].numpy()
    theirs = DDPMScheduler(trained_betas=betas, prediction_type=prediction_type, variance_type=kind)
    expected = run(theirs, network, x_T, steps)
    ours = sample("ddpm", model, x_T, theirs.timesteps.tolist(), noise_like(x_T))
    # Their tables are float32: alphas_cumprod near 1e-9 at the end of the cosine schedule has few digits there.
    equal(f"DDPM, {name}", ours, expected, 1e-4 if name == "linear" else 5e-3)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [5, 50, 1000])
@pytest.mark.parametrize("clip", [False, True])
def test_ddim(prediction_type, eta, steps, clip, x_T, equal):
    model = DiffusionModel(mixed, NoiseSchedule(LINEAR), prediction_type)
    theirs = DDIMScheduler(trained_betas=LINEAR.numpy(), prediction_type=prediction_type, clip_sample=clip)
    expected = run(theirs, mixed, x_T, steps, eta=eta, use_clipped_model_output=True)
    ours = sample("ddim", model, x_T, theirs.timesteps.tolist(), noise_like(x_T), clip, eta=eta)
    equal("DDIM", ours, expected, 1e-4)


def test_ddim_after_clipping_differs_from_the_librarys_default(x_T):
    """There eps stays the network's after x_0 was clipped, so the two no longer make up x_t; here it is recomputed.

    So does the code of Dhariwal and Nichol 2021; the library's name for it is use_clipped_model_output.
    """
    model = DiffusionModel(mixed, NoiseSchedule(LINEAR))
    theirs = DDIMScheduler(trained_betas=LINEAR.numpy(), clip_sample=True)
    default = run(theirs, mixed, x_T, 10)
    ours = sample("ddim", model, x_T, theirs.timesteps.tolist(), noise_like(x_T))
    assert deviation(ours, default) > 1e-2
    t = torch.full((4,), 900)
    x_0, eps, _ = model.predict(3 * x_T, t)
    assert deviation(model.q_sample(x_0, t, eps), 3 * x_T) < 1e-9


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("steps", [5, 10, 20, 50])
def test_dpm_solver(prediction_type, steps, x_T, equal):
    model = DiffusionModel(mixed, NoiseSchedule(LINEAR), prediction_type)
    theirs = DPMSolverMultistepScheduler(trained_betas=LINEAR.numpy(), prediction_type=prediction_type, solver_order=2)
    expected = run(theirs, mixed, x_T, steps)
    ours = sample("dpm_solver", model, x_T, theirs.timesteps.tolist(), clip_denoised=False)
    equal("DPM-Solver++ 2M", ours, expected, 1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 5, 10, 20, 50])
def test_unipc(name, prediction_type, steps, x_T, equal):
    model = DiffusionModel(mixed, NoiseSchedule(SCHEDULES[name]), prediction_type)
    betas = SCHEDULES[name].numpy()
    theirs = UniPCMultistepScheduler(trained_betas=betas, prediction_type=prediction_type, solver_order=2)
    expected = run(theirs, mixed, x_T, steps)
    ours = sample("unipc", model, x_T, theirs.timesteps.tolist(), clip_denoised=False)
    equal(f"UniPC, {name}", ours, expected, 1e-4)


PAPER = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
"""The configuration of google/ddpm-cifar10-32."""


def test_the_papers_unet_computes_the_same(generator, equal):
    """Weights of the library load into ours and back; outputs agree to 1e-5 of their size."""
    theirs, ours = UNet2DModel(**PAPER).eval(), UNet(32).eval()
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    weights = theirs.state_dict()
    ours.load_state_dict(from_diffusers(weights, 4, 2))
    x, t = torch.randn(2, 3, 32, 32, generator=generator), torch.tensor([3, 777])
    with torch.no_grad():
        equal("UNet", ours(x, t), theirs(x, t).sample, 1e-5)
    back = to_diffusers(ours.state_dict(), 4, 2)
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)


def test_names_of_the_first_published_models_are_read():
    """Attention was called query, key, value and proj_attn when google/ddpm-cifar10-32 was published."""
    weights = UNet2DModel(**PAPER | {"block_out_channels": (32, 64, 64, 64)}).state_dict()
    first = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    pattern = re.compile(rf"(?<=attentions\.\d\.)({'|'.join(first)})(?=\.)")
    old = {pattern.sub(lambda found: first[found[1]], name): tensor for name, tensor in weights.items()}
    assert any("proj_attn" in name for name in old)
    read, expected = from_diffusers(old, 4, 2), from_diffusers(weights, 4, 2)
    assert read.keys() == expected.keys() and all(torch.equal(read[k], expected[k]) for k in read)
