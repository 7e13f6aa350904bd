"""The weights of our UNet under the names of diffusers' UNet2DModel, and back.

The two networks compute the same function; only the names differ, and our attention keeps query, key and value in one
matrix.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

BLOCK = {"norm1": "norm1", "conv1": "conv1", "time_proj": "time_emb_proj", "norm2": "norm2", "conv2": "conv2"}
BLOCK |= {"shortcut": "conv_shortcut"}
ATTENTION = {"attention.norm": "group_norm", "attention.qkv": "", "attention.proj": "to_out.0"}
QKV = (("to_q", "to_k", "to_v"), ("query", "key", "value"))  # today's names, and those of the first published models
OLD = {"to_out.0": "proj_attn"}


def module_names(levels: int, num_res_blocks: int) -> Iterator[tuple[str, str]]:
    """(our name, the library's name) of every module with weights that a network may have."""
    yield from {"time_mlp.0": "time_embedding.linear_1", "time_mlp.2": "time_embedding.linear_2"}.items()
    yield from {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}.items()

    def block(ours: str, theirs: str, k: int) -> Iterator[tuple[str, str]]:
        yield from ((f"{ours}.{a}", f"{theirs}.resnets.{k}.{b}") for a, b in BLOCK.items())
        yield from ((f"{ours}.{a}", f"{theirs}.attentions.{k}.{b}".rstrip(".")) for a, b in ATTENTION.items())

    position = 0
    for level in range(levels):
        if level:
            yield f"down.{position}.conv", f"down_blocks.{level - 1}.downsamplers.0.conv"
            position += 1
        for k in range(num_res_blocks):
            yield from block(f"down.{position}", f"down_blocks.{level}", k)
            position += 1
    for k in range(2):
        yield from block(f"middle.{k}", "mid_block", k)
    position = 0
    for level in range(levels):
        for k in range(num_res_blocks + 1):
            yield from block(f"up.{position}", f"up_blocks.{level}", k)
            position += 1
        if level < levels - 1:
            yield f"up.{position}.conv", f"up_blocks.{level}.upsamplers.0.conv"
            position += 1


def to_diffusers(weights: Mapping[str, Tensor], levels: int, num_res_blocks: int) -> dict[str, Tensor]:
    """The weights of our UNet under the library's names."""
    found: dict[str, Tensor] = {}
    for ours, theirs in module_names(levels, num_res_blocks):
        for leaf in ("weight", "bias"):
            tensor = weights.get(f"{ours}.{leaf}")
            if tensor is not None and ours.endswith("qkv"):
                found |= {f"{theirs}.{n}.{leaf}": part for n, part in zip(QKV[0], tensor.chunk(3), strict=True)}
            elif tensor is not None:
                found[f"{theirs}.{leaf}"] = tensor
    return found


def from_diffusers(weights: Mapping[str, Tensor], levels: int, num_res_blocks: int) -> dict[str, Tensor]:
    """The inverse of `to_diffusers`; it also reads the names of the first published models."""
    found: dict[str, Tensor] = {}
    for ours, theirs in module_names(levels, num_res_blocks):
        for leaf in ("weight", "bias"):
            if ours.endswith("qkv"):
                for names in QKV:
                    keys = [f"{theirs}.{name}.{leaf}" for name in names]
                    if all(key in weights for key in keys):
                        found[f"{ours}.{leaf}"] = torch.cat([weights[key] for key in keys])
                continue
            old = next((theirs.removesuffix(new) + name for new, name in OLD.items() if theirs.endswith(new)), theirs)
            for key in (f"{theirs}.{leaf}", f"{old}.{leaf}"):
                if key in weights:
                    found[f"{ours}.{leaf}"] = weights[key]
    return found
