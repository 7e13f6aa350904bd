"""The weights of our UNet under the names of diffusers' UNet2DModel, and back.

Only the names differ, and our attention keeps query, key and value in one matrix.
"""

from collections.abc import Iterator, Mapping
from itertools import count

import torch
from torch import Tensor

MODULES = {
    "time_mlp.0": "time_embedding.linear_1",
    "time_mlp.2": "time_embedding.linear_2",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
BLOCK = {"norm1": "norm1", "conv1": "conv1", "time_proj": "time_emb_proj", "norm2": "norm2", "conv2": "conv2"}
BLOCK |= {"shortcut": "conv_shortcut"}
ATTENTION = {"norm": ("group_norm",), "qkv": ("to_q", "to_k", "to_v"), "proj": ("to_out.0",)}
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # in the first published models


def module_names(levels: int, num_res_blocks: int) -> Iterator[tuple[str, list[str]]]:
    """Every module with weights that a network may have, and the library's modules that it holds one below another."""

    def block(ours: str, theirs: str, k: int) -> Iterator[tuple[str, list[str]]]:
        yield from ((f"{ours}.{a}", [f"{theirs}.resnets.{k}.{b}"]) for a, b in BLOCK.items())
        for a, parts in ATTENTION.items():
            yield f"{ours}.attention.{a}", [f"{theirs}.attentions.{k}.{b}" for b in parts]

    yield from ((ours, [theirs]) for ours, theirs in MODULES.items())
    down, up = count(), count()
    for level in range(levels):
        if level:
            yield f"down.{next(down)}.conv", [f"down_blocks.{level - 1}.downsamplers.0.conv"]
        for k in range(num_res_blocks):
            yield from block(f"down.{next(down)}", f"down_blocks.{level}", k)
    for k in range(2):
        yield from block(f"middle.{k}", "mid_block", k)
    for level in range(levels):
        for k in range(num_res_blocks + 1):
            yield from block(f"up.{next(up)}", f"up_blocks.{level}", k)
        yield f"up.{next(up)}.conv", [f"up_blocks.{level}.upsamplers.0.conv"]


def to_diffusers(weights: Mapping[str, Tensor], levels: int, num_res_blocks: int) -> dict[str, Tensor]:
    """The weights of our UNet under the library's names."""
    found: dict[str, Tensor] = {}
    for ours, theirs in module_names(levels, num_res_blocks):
        for leaf in ("weight", "bias"):
            if f"{ours}.{leaf}" in weights:
                parts = weights[f"{ours}.{leaf}"].chunk(len(theirs))
                found |= {f"{name}.{leaf}": part for name, part in zip(theirs, parts, strict=True)}
    return found


def from_diffusers(weights: Mapping[str, Tensor], levels: int, num_res_blocks: int) -> dict[str, Tensor]:
    """The inverse of `to_diffusers`; it also reads the names of the first published models."""
    current = {".".join(OLD.get(word, word) for word in name.split(".")): tensor for name, tensor in weights.items()}
    found: dict[str, Tensor] = {}
    for ours, theirs in module_names(levels, num_res_blocks):
        for leaf in ("weight", "bias"):
            parts = [current[key] for name in theirs if (key := f"{name}.{leaf}") in current]
            if len(parts) == len(theirs):
                found[f"{ours}.{leaf}"] = torch.cat(parts)
    return found
