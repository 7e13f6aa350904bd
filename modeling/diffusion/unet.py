"""The UNet of Ho et al. 2020 (appendix B), which predicts from a noisy image x_t and its time step t.

Residual blocks with GroupNorm and SiLU, each with the time embedding as input; self-attention at chosen resolutions;
skip connections from every block of the way down to one of the way up. conf/model/ddpm.yaml is the paper's CIFAR-10
network. A class-conditional network adds an embedding of the label to that of the time (Dhariwal and Nichol 2021,
https://arxiv.org/abs/2105.05233).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.diffusion.layers import Dropout, attention, upsampled_conv

NORM_EPS = 1e-6  # of the original implementation; PyTorch's default is 1e-5


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal features of time steps [N] (Vaswani et al. 2017, as spaced by Ho et al.), float32 [N, dim].

    The first half are sines, the second cosines, with frequencies from 1 down to 1e-4 radians a step; dim is even.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / (half - 1)
    angles = t.float()[:, None] * torch.exp(-math.log(10_000) * exponent)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class ResBlock(nn.Module):
    """norm, SiLU, conv; plus the time embedding; norm, SiLU, dropout, conv; plus the input; then optional attention.

    With `scale_shift` the embedding scales and shifts what the second norm returns, in place of the addition before it.
    Maps x [N, c_in, H, W] and the embedding after its SiLU, [N, c_emb], to [N, c_out, H, W]. `heads` = 0: no attention.
    """

    def __init__(
        self, c_in: int, c_out: int, c_emb: int, groups: int, dropout: float, heads: int, scale_shift: bool
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = nn.GroupNorm(groups, c_in, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_proj = nn.Linear(c_emb, 2 * c_out if scale_shift else c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=NORM_EPS)
        self.dropout = Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
        self.attention = AttentionBlock(c_out, heads, groups) if heads else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        projected = self.time_proj(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = projected.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + projected)
        h = self.conv2(self.dropout(F.silu(h)))
        out: Tensor = self.attention(self.shortcut(x) + h)
        return out


class AttentionBlock(nn.Module):
    """Self-attention over the pixels of [N, C, H, W], with a residual connection."""

    def __init__(self, channels: int, num_heads: int, groups: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [N, HW, C]
        q, k, v = self.qkv(tokens).view(n, height * width, 3, self.num_heads, c // self.num_heads).unbind(2)
        out = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        out = self.proj(out.transpose(1, 2).reshape(n, height * width, c))
        residual: Tensor = out.transpose(1, 2).reshape(n, c, height, width)
        return x + residual


class Downsample(nn.Module):
    """Halves height and width by a strided convolution; does not use the embedding."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        # "Same" padding of the original for an even size: nothing before, one pixel behind.
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a convolution; does not use the embedding."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        assert self.conv.bias is not None
        return upsampled_conv(x, self.conv.weight, self.conv.bias)


class UNet(nn.Module):
    """Maps noisy images [N, C, H, W], time steps [N] and, with classes, labels [N] to predictions [N, C_out, H, W].

    Args:
        image_size: height and width of the images in pixels; divisible by patch_size * 2 ** (len(channel_mult) - 1).
        patch_size: the network sees each square of so many pixels as one, with all their values as channels.
        model_channels: channels at the first resolution; a multiple of `norm_groups`.
        channel_mult: channels at each resolution as a multiple of `model_channels`; one entry a resolution.
        num_res_blocks: residual blocks a resolution on the way down (one more on the way up).
        attention_resolutions: heights in pixels at which every residual block is followed by self-attention.
        num_heads: of the attention; divides the channels there.
        out_channels: of the prediction; by default those of the images.
        num_classes: 0: unconditional; else the label `num_classes` means "no label".
        scale_shift: the time embedding scales and shifts (adaptive group normalisation, Dhariwal and Nichol 2021).
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int = 3,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        num_heads: int = 1,
        dropout: float = 0.1,
        norm_groups: int = 32,
        out_channels: int | None = None,
        num_classes: int = 0,
        patch_size: int = 1,
        scale_shift: bool = False,
    ) -> None:
        super().__init__()
        self.model_channels = model_channels
        self.num_classes = num_classes
        self.patch_size = patch_size
        c_emb = 4 * model_channels
        self.time_mlp = nn.Sequential(nn.Linear(model_channels, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        if num_classes:
            self.class_embedding = nn.Embedding(num_classes + 1, c_emb)
        self.conv_in = nn.Conv2d(in_channels * patch_size**2, model_channels, 3, padding=1)

        def block(c_in: int, c_out: int, attend: bool) -> ResBlock:
            return ResBlock(c_in, c_out, c_emb, norm_groups, dropout, num_heads if attend else 0, scale_shift)

        channels, size = model_channels, image_size // patch_size
        skips = [channels]
        self.down = nn.ModuleList()
        for level, mult in enumerate(channel_mult):
            if level:
                self.down.append(Downsample(channels))
                skips.append(channels)
                size //= 2
            for _ in range(num_res_blocks):
                self.down.append(block(channels, mult * model_channels, size in attention_resolutions))
                channels = mult * model_channels
                skips.append(channels)

        # The paper attends in the middle at every configuration.
        self.middle = nn.ModuleList([block(channels, channels, True), block(channels, channels, False)])

        self.up = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for _ in range(num_res_blocks + 1):
                self.up.append(block(channels + skips.pop(), mult * model_channels, size in attention_resolutions))
                channels = mult * model_channels
            if level:
                self.up.append(Upsample(channels))
                size *= 2

        self.norm_out = nn.GroupNorm(norm_groups, channels, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(channels, (out_channels or in_channels) * patch_size**2, 3, padding=1)
        self._initialise()

    def _initialise(self) -> None:
        """The whole initialisation policy: Xavier weights, zero biases, and zero weights where a branch ends.

        So every residual branch starts as the identity and the network's first output is exactly 0 (Ho et al.).
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, AttentionBlock):
                for matrix in module.qkv.weight.chunk(3):  # each by itself: the bound of the fused matrix is smaller
                    nn.init.xavier_uniform_(matrix)
        if self.num_classes:
            nn.init.normal_(self.class_embedding.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith(("conv2.weight", "attention.proj.weight", "conv_out.weight")):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        emb = self.time_mlp(timestep_embedding(t, self.model_channels).to(x.dtype))
        if self.num_classes:
            assert y is not None, "a class-conditional network needs labels"
            emb = emb + self.class_embedding(y)
        emb = F.silu(emb)
        h = self.conv_in(F.pixel_unshuffle(x, self.patch_size))
        skips = [h]
        for layer in self.down:
            h = layer(h, emb)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, emb)
        for layer in self.up:
            h = layer(h if isinstance(layer, Upsample) else torch.cat([h, skips.pop()], dim=1), emb)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch_size)
