"""GroupNorm, dropout and attention as the UNet uses them, with formulations that are fast on a CPU in bf16.

A CPU's convolutions are fastest in bf16 on channels-last tensors, [N, H, W, C] in memory; PyTorch's own GroupNorm and
dropout are the slowest part of a step there (docs/speed.md has the profile). Everything else, float32 and CUDA, takes
PyTorch's own. Results differ by the rounding of bf16 alone. Equations: Wu and He 2018; Srivastava et al. 2014.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_EXPLICIT_TOKENS = 1024  # above this the matrix of attention weights, tokens x tokens, costs too much memory


def wants_channels_last_ops(x: Tensor) -> bool:
    """Whether `x` is what the formulations of this module are for."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.is_contiguous(memory_format=torch.channels_last)


class _ChannelsLastGroupNorm(torch.autograd.Function):
    """GroupNorm in passes over whole rows of channels; statistics in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        n, c, h, w = x.shape
        rows = _rows(x)
        moments = torch.stack([_channel_sums(rows), _channel_sums(rows * rows)]).view(2, n, groups, c // groups)
        mean, square = moments.sum(3, keepdim=True) / (h * w * c // groups)
        rstd = (square - mean * mean).clamp_min(0).add(eps).rsqrt()  # [N, G, 1]
        scale = rstd * weight.view(groups, -1)
        shift = bias.view(groups, -1) - mean * scale
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.groups = groups
        return _image(torch.addcmul(_row(shift, x), rows, _row(scale, x)), x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        n, c, h, w = x.shape
        rows, grad = _rows(x), _rows(grads[0])
        shape = (n, ctx.groups, c // ctx.groups)
        grad_bias = _channel_sums(grad).view(shape)
        grad_weight = (_channel_sums(grad * rows).view(shape) - mean * grad_bias) * rstd
        # grad_x = rstd (weight grad - mean(weight grad) - normalised x mean(weight grad normalised x)), rearranged as
        # a grad + b x + c with one a, b, c a channel, so that it takes two passes.
        per_group = torch.stack([grad_bias, grad_weight]) * weight.view(ctx.groups, -1)
        offset, slope = per_group.sum(3, keepdim=True) * (rstd / (h * w * c // ctx.groups))
        slope = slope * rstd
        grad_x = torch.addcmul(_row(slope * mean - offset, x), rows, _row(-slope, x))
        grad_x = grad_x.addcmul_(grad, _row(rstd * weight.view(ctx.groups, -1), x))
        return _image(grad_x, x), grad_weight.sum(0).flatten(), grad_bias.sum(0).flatten(), None, None


def _rows(x: Tensor) -> Tensor:
    """[N, C, H, W] channels-last as [N, HW, C]: a view (a copy if it is not channels-last)."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _image(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_rows`."""
    n, c, h, w = like.shape
    return rows.view(n, h, w, c).permute(0, 3, 1, 2)


def _row(values: Tensor, like: Tensor) -> Tensor:
    """Values [N, G, 1] or [N, G, C/G] as one row for every image, [N, 1, C], in the dtype of `like`."""
    n, c = like.shape[:2]
    groups = values.shape[1]
    return values.expand(n, groups, c // groups).reshape(n, 1, c).to(like.dtype)


def _channel_sums(rows: Tensor) -> Tensor:
    """Sums of [N, P, C] over P, float32 [N, C].

    In up to 16 parts: each is rounded to bf16, and the rounding averages out. (sum(dtype=float32) would first copy all
    of it to float32, four times slower.)
    """
    n, p, c = rows.shape
    parts = math.gcd(p, 16)
    sums = rows.view(n * parts, p // parts, c).sum(1)
    return sums.view(n, parts, c).sum(1, dtype=torch.promote_types(rows.dtype, torch.float32))


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm; the same parameters and, but for rounding, the same values."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C, H, W]. Returns the same shape."""
        if wants_channels_last_ops(x) and not torch.compiler.is_compiling():
            out: Tensor = _ChannelsLastGroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
            return out
        return super().forward(x)


class _BitDropout(torch.autograd.Function):
    """Dropout as a bitwise and: 16 random bits an element, four elements of one draw of the generator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        dropped = round(p * 2**15)  # of 2**15: p = 0.1 becomes 0.100006
        bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        # All ones where an element is kept, zero where it is dropped.
        keep = bits.bitwise_or_(-(2**15)).add_(dropped).bitwise_right_shift_(15)
        ctx.keep = keep[: x.numel()].view(_rows(x).shape)
        ctx.scale = 1 / (1 - dropped / 2**15)
        return _masked(x, ctx.keep, ctx.scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _masked(grads[0], ctx.keep, ctx.scale), None


def _masked(x: Tensor, keep: Tensor, scale: float) -> Tensor:
    rows = _rows(x).view(torch.int16) & keep
    return _image(rows.view(x.dtype).mul_(scale), x)


class Dropout(nn.Dropout):
    """nn.Dropout; on a CPU its random numbers, one at a time on one core, were 5% of a step."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C, H, W]. Returns the same shape; random in train mode, from PyTorch's default generator."""
        if self.training and self.p and wants_channels_last_ops(x) and not torch.compiler.is_compiling():
            out: Tensor = _BitDropout.apply(x, self.p)
            return out
        return super().forward(x)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention of [N, heads, tokens, D]; the same shape.

    On a CPU two plain matrix products take half the time of PyTorch's fused kernel, forward and backward.
    """
    if q.device.type == "cpu" and q.shape[2] <= MAX_EXPLICIT_TOKENS:
        weights: Tensor = (q * q.shape[3] ** -0.5 @ k.transpose(2, 3)).softmax(3)
        return weights @ v
    return F.scaled_dot_product_attention(q, k, v)
