"""The fast formulations of GroupNorm, dropout and attention against PyTorch's own and their definitions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modeling.device import Compute
from modeling.layers import Dropout, GroupNorm, _ChannelsLastGroupNorm, attention, wants_channels_last_ops
from modeling.unet import UNet

SHAPES = [(2, 8, 4, 4), (3, 12, 5, 7), (2, 8, 1, 1), (2, 16, 16, 16)]


def channels_last(*shape, dtype=torch.bfloat16, offset=0.0):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) + offset
    return x.to(dtype, memory_format=torch.channels_last)


def norm(channels):
    layer = GroupNorm(4, channels, eps=1e-6)
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0.5, 0.3, generator=generator)
    return layer


@pytest.mark.parametrize("shape", SHAPES)
def test_group_norm_is_its_definition_in_double(shape):
    """The formulation itself, apart from bf16: values and all three gradients, to 1e-9."""
    layer = norm(shape[1]).double()
    x = channels_last(*shape, dtype=torch.float64).requires_grad_()
    inputs = (x, layer.weight, layer.bias)
    expected = F.group_norm(x, 4, layer.weight, layer.bias, 1e-6)
    found = _ChannelsLastGroupNorm.apply(*inputs, 4, 1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    grad = channels_last(*shape, dtype=torch.float64).cos()
    for a, b in zip(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("offset", [0.0, 3.0])
@pytest.mark.parametrize("shape", [*SHAPES[:2], SHAPES[3]])
def test_group_norm_in_bf16_is_right_to_its_rounding(shape, offset):
    layer = norm(shape[1])
    x = channels_last(*shape, offset=offset)
    assert wants_channels_last_ops(x)
    found, exact = layer(x), layer.double()(x.double())
    assert found.is_contiguous(memory_format=torch.channels_last) and found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=0.02, atol=0.02 * (1 + offset))


def test_group_norm_elsewhere_is_pytorchs():
    layer = norm(8)
    x = torch.randn(2, 8, 4, 4)
    assert not wants_channels_last_ops(x)
    assert torch.equal(layer(x), F.group_norm(x, 4, layer.weight, layer.bias, 1e-6))


def test_dropout_drops_its_share_and_keeps_the_mean():
    x = torch.ones(8, 64, 32, 32, dtype=torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_()
    torch.manual_seed(0)
    out = Dropout(0.1)(x)
    dropped = out == 0
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=2e-3)  # 4 standard errors: 1.7e-3
    assert torch.equal(out[~dropped], torch.full_like(out[~dropped], 1 / 0.9))
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad == 0, dropped) and torch.equal(grad, out)
    # No row, column or channel is more often dropped than others: 5 standard errors of each.
    for dims, n in (((0, 1, 2), 8 * 64 * 32), ((0, 1, 3), 8 * 64 * 32), ((0, 2, 3), 8 * 1024)):
        assert (dropped.float().mean(dims) - 0.1).abs().max() < 5 * (0.09 / n) ** 0.5
    # Neighbours in memory come from one draw of the generator and are still independent: P(both) = 0.01.
    flat = dropped.permute(0, 2, 3, 1).flatten()
    assert (flat[1:] & flat[:-1]).float().mean().item() == pytest.approx(0.01, abs=8e-4)


def test_dropout_is_a_function_of_the_seed_and_off_in_eval():
    x = channels_last(3, 5, 7, 3)
    layer = Dropout(0.5)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(layer(x))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize("tokens", [1, 16, 1500])
def test_attention_is_pytorchs(tokens):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, tokens, 8, generator=generator).unbind()
    torch.testing.assert_close(attention(q, k, v), F.scaled_dot_product_attention(q, k, v), rtol=1e-4, atol=1e-5)


def test_network_in_its_fast_layout_is_the_float32_one():
    """Output and gradients of the whole network, to the rounding of bf16."""
    torch.manual_seed(0)
    net = UNet(16, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(8,), dropout=0.0)
    for parameter in net.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    x, t = torch.randn(4, 3, 16, 16), torch.tensor([0, 10, 500, 999])
    results = []
    for bf16 in (False, True):
        compute = Compute(torch.device("cpu"), bf16)
        net = compute.place_model(net)
        net.zero_grad()
        with compute.autocast():
            out = net(x, t).float()
        out.square().mean().backward()
        gradient = torch.cat([p.grad.flatten() for p in net.parameters()])
        results.append((out.detach(), gradient))
    (exact, exact_gradient), (fast, fast_gradient) = results
    assert net.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert (fast - exact).norm() < 0.02 * exact.norm()
    assert (fast_gradient - exact_gradient).norm() < 0.03 * exact_gradient.norm()
