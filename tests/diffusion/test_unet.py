"""The network: size, initialisation, time embedding, shapes."""

import pytest
import torch
from torch.nn.functional import silu

from modeling.diffusion.unet import UNet, timestep_embedding

TINY = {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "dropout": 0.0}


def perturbed(**kwargs):
    """A network whose zero-initialised ends have weights, so that its output depends on its input."""
    net = UNet(8, **{**TINY, **kwargs})
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net.eval()


def test_the_papers_network_has_its_parameter_count():
    with torch.device("meta"):
        net = UNet(32)
    assert sum(p.numel() for p in net.parameters()) == 35_746_307


def test_queries_keys_and_values_are_initialised_as_three_matrices():
    net = UNet(8, **TINY, attention_resolutions=(8,))
    for name, parameter in net.named_parameters():
        if name.endswith("qkv.weight"):
            channels = parameter.shape[1]
            for matrix in parameter.chunk(3):
                assert 0.95 < matrix.abs().max() / (6 / (2 * channels)) ** 0.5 <= 1  # the bound of Xavier


def test_the_network_runs_in_float64(generator):
    net = perturbed(attention_resolutions=(4,), num_classes=2).double()
    x, t = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64), torch.tensor([0, 9])
    y = torch.tensor([0, 1])
    torch.testing.assert_close(net(x, t, y), net.float()(x.float(), t, y).double(), rtol=1e-3, atol=1e-3)
    assert net.double()(x, t, y).dtype == torch.float64


def test_timestep_embedding_closed_form():
    first, last = timestep_embedding(torch.tensor([0, 7]), 8)
    assert first.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    angles = torch.tensor([7 * 10_000 ** (-i / 3) for i in range(4)])
    torch.testing.assert_close(last, torch.cat([angles.sin(), angles.cos()]))


def test_every_sample_is_embedded_by_its_own_time(generator):
    """A batch with different times gives what each sample gives alone."""
    net = perturbed(attention_resolutions=(4,))
    x, t = torch.randn(3, 3, 8, 8, generator=generator), torch.tensor([0, 400, 999])
    alone = torch.cat([net(x[i : i + 1], t[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(net(x, t), alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(net(x, t), net(x, t.flip(0)), atol=1e-3)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [8, 12])
def test_any_size_and_channel_count(channels, size):
    net = UNet(size, in_channels=channels, attention_resolutions=(size // 2,), num_heads=2, **TINY)
    assert net(torch.zeros(2, channels, size, size), torch.zeros(2)).shape == (2, channels, size, size)


def test_patches_are_channels(generator):
    """A network of patches is that of the patches' values as channels, and its output their pixels again."""
    torch.manual_seed(0)
    net = perturbed(patch_size=2, attention_resolutions=(4,), out_channels=6)
    plain = UNet(4, 12, out_channels=24, attention_resolutions=(4,), **TINY).eval()
    plain.load_state_dict(net.state_dict())
    x, t = torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([3, 50])
    squares = torch.stack([x[:, c, i::2, j::2] for c in range(3) for i in range(2) for j in range(2)], dim=1)
    out = torch.zeros(2, 6, 8, 8)
    for k, square in enumerate(plain(squares, t).unbind(1)):
        out[:, k // 4, k % 4 // 2 :: 2, k % 2 :: 2] = square
    torch.testing.assert_close(net(x, t), out)


def test_the_embedding_scales_and_shifts(generator):
    """Every block is norm, SiLU, conv; norm, scaled and shifted, SiLU, conv; plus the input."""
    block = perturbed(scale_shift=True).down[0]
    x, emb = torch.randn(2, 32, 8, 8, generator=generator), torch.randn(2, 128, generator=generator)
    scale, shift = block.time_proj(emb)[..., None, None].split(32, dim=1)
    h = block.norm2(block.conv1(silu(block.norm1(x)))) * (1 + scale) + shift
    torch.testing.assert_close(block(x, emb), x + block.conv2(silu(h)))


def test_gradients_reach_every_parameter(generator):
    net = perturbed(attention_resolutions=(8, 4)).train()
    net(torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([1, 2])).square().mean().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


@pytest.mark.parametrize(
    "options", [{}, {"num_heads": 2, "num_classes": 5, "out_channels": 6, "patch_size": 2, "scale_shift": True}]
)
def test_what_runs_where_there_is_no_cpu(options):
    """On a device without memory: the branches for CUDA, and that none of them makes a tensor on the CPU."""
    with torch.device("meta"):
        net = UNet(8, attention_resolutions=(4, 2), **(TINY | {"dropout": 0.1}), **options).train()
        x, t = torch.empty(2, 3, 8, 8, requires_grad=True), torch.empty(2, dtype=torch.int64)
        labels = [torch.empty(2, dtype=torch.int64)] if "num_classes" in options else []
    out = net(x, t, *labels)
    assert out.device.type == "meta" and out.shape == (2, options.get("out_channels", 3), 8, 8)
    out.sum().backward()
    assert x.grad.device.type == "meta" and x.grad.shape == x.shape
