"""The UNet's layers: PyTorch's own, except where another formulation of the same function is faster on a CPU.

A convolution in bf16 runs close to the CPU's peak, so the layers between convolutions decide the time of a step
(docs/speed.md has the profile). Dropout: Srivastava et al. 2014; attention: Vaswani et al. 2017.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_EXPLICIT_TOKENS = 1024  # above this the matrix of attention weights, tokens x tokens, costs too much memory


class _BitDropout(torch.autograd.Function):
    """Dropout of bf16 as a bitwise and: 16 random bits an element, four elements of one draw of a generator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        dropped = round(p * 2**15)  # of 2**15: p = 0.1 becomes 0.100006
        # SFC64, seeded by PyTorch's generator, takes half the time of that generator.
        source = np.random.Generator(np.random.SFC64(int(torch.empty((), dtype=torch.int64).random_())))
        drawn = source.integers(2**64 - 1, size=(x.numel() + 3) // 4, dtype=np.uint64, endpoint=True)
        bits = torch.from_numpy(drawn.view(np.int16))
        # All ones where an element is kept, zero where it is dropped.
        keep = bits.bitwise_or_(-(2**15)).add_(dropped).bitwise_right_shift_(15)
        ctx.keep = keep[: x.numel()].view(x.shape)
        ctx.scale = 1 / (1 - dropped / 2**15)
        return _masked(x, ctx.keep, ctx.scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _masked(grads[0], ctx.keep, ctx.scale), None


def _masked(x: Tensor, keep: Tensor, scale: float) -> Tensor:
    return (x.view(torch.int16) & keep).view(torch.bfloat16).mul_(scale)


class Dropout(nn.Dropout):
    """nn.Dropout; in bf16 on a CPU, its random numbers, drawn one at a time on one core, were 5 % of a step."""

    def forward(self, x: Tensor) -> Tensor:
        bits = x.device.type == "cpu" and x.dtype == torch.bfloat16 and 2**-16 < self.p < 1 - 2**-16
        if self.training and bits and not torch.compiler.is_compiling():
            out: Tensor = _BitDropout.apply(x, self.p)
            return out
        return super().forward(x)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention of [N, heads, tokens, D].

    On a CPU two plain matrix products take half the time of PyTorch's fused kernel, forward and backward.
    """
    if q.device.type == "cpu" and q.shape[2] <= MAX_EXPLICIT_TOKENS:
        weights: Tensor = (q * q.shape[3] ** -0.5 @ k.transpose(2, 3)).softmax(3)
        return weights @ v
    return F.scaled_dot_product_attention(q, k, v)


def upsampled_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Nearest-neighbour upsampling by 2, then a 3 x 3 convolution with zero padding of 1; weight [C_out, C_in, 3, 3].

    On a CPU as one transposed convolution, with 4 instead of 9 products a pixel and channel: of the nine pixels below
    the kernel only four differ, so the weights of equal ones are added up beforehand. The same sum, in another order.
    """
    if x.device.type != "cpu":
        return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
    padded = F.pad(weight.transpose(0, 1).flip(2, 3), (1, 1, 1, 1))  # a transposed convolution turns its kernel round
    rows = padded[:, :, 1:] + padded[:, :, :-1]
    return F.conv_transpose2d(x, rows[..., 1:] + rows[..., :-1], bias, stride=2, padding=1)
