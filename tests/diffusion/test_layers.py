"""The fast formulations of dropout, attention and upsampling against their definitions and PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modeling.diffusion.layers import Dropout, attention, upsampled_conv
from modeling.diffusion.unet import UNet
from modeling.inference.device import Compute


def test_dropout_drops_its_share_and_keeps_the_mean():
    x = torch.ones(8, 64, 32, 32, dtype=torch.bfloat16, requires_grad=True)
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
    flat = dropped.flatten()
    assert (flat[1:] & flat[:-1]).float().mean().item() == pytest.approx(0.01, abs=8e-4)


def test_dropout_is_a_function_of_the_seed_and_off_in_eval():
    x = torch.randn(3, 5, 7, 3).bfloat16()  # 315 elements: not a multiple of four
    layer = Dropout(0.5)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(layer(x))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_none_and_all_is_pytorchs(p):
    x = torch.ones(4, 4, dtype=torch.bfloat16)
    assert torch.equal(Dropout(p)(x), F.dropout(x, p))


@pytest.mark.parametrize("tokens", [1, 16, 1500])
def test_attention_is_pytorchs(tokens, generator):
    q, k, v = torch.randn(3, 2, 2, tokens, 8, generator=generator).unbind()
    torch.testing.assert_close(attention(q, k, v), F.scaled_dot_product_attention(q, k, v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (5, 7)])
def test_upsampled_convolution_is_its_definition(size, generator):
    """Values and all three gradients, border included."""
    shapes = (2, 4, *size), (6, 4, 3, 3), (6,)
    inputs = [torch.randn(s, generator=generator, dtype=torch.double, requires_grad=True) for s in shapes]
    x, weight, bias = inputs
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
    found = upsampled_conv(x, weight, bias)
    direction = torch.randn(expected.shape, generator=generator, dtype=torch.double)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad((out * direction).sum(), inputs) for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_network_in_bf16_is_the_float32_one():
    """Output and gradients of the whole network, to the rounding of bf16."""
    net = UNet(16, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(8,), dropout=0.0)
    for parameter in (p for p in net.parameters() if p.dim() > 1):
        nn.init.xavier_uniform_(parameter)
    x, t = torch.randn(4, 3, 16, 16), torch.tensor([0, 10, 500, 999])
    outputs, gradients = [], []
    for bf16 in (False, True):
        compute = Compute(torch.device("cpu"), bf16)
        net = compute.place_model(net)
        net.zero_grad()
        with compute.autocast():
            outputs.append(net(x, t).float())
        outputs[-1].square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    for (exact, fast), bound in ((outputs, 0.02), (gradients, 0.03)):
        assert (fast - exact).norm() < bound * exact.norm()
