"""Tensors that long work has made, kept under runs/, so that work that was stopped goes on from them."""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modeling.distributed.collectives import from_first, is_first
from modeling.inference.samples import SAMPLING
from modeling.reliability.files import replacing
from modeling.reliability.terminal import progress

log = logging.getLogger(__name__)


def kept_samples(folder: Path, count: int, shard: int, draw: Callable[[range], Tensor]) -> Iterator[Tensor]:
    """Samples 0 to count - 1 in batches of `shard`, uint8 [B, C, H, W], kept in `folder`, which is of one sampler."""
    batches = [range(start, min(start + shard, count)) for start in range(0, count, shard)]
    paths = {rows: folder / f"{rows.start:07}-{rows.stop:07}.npy" for rows in batches}
    before = from_first(lambda: sum(len(rows) for rows, path in paths.items() if path.exists()))
    if before:
        log.info("%d of %d samples are kept in %s", before, count, folder)
    with progress(SAMPLING, count, done=before):
        for rows, path in paths.items():
            images = from_first(partial(read_kept, path))
            if images is None:
                images = draw(rows)
                keep(path, images)
            yield images


def keep(path: Path, tensor: Tensor) -> None:
    """Writes a tensor in the first process, else raises UserError."""
    if is_first():
        with replacing(path) as partial_path, partial_path.open("wb") as file:
            np.save(file, tensor.numpy())


def read_kept(path: Path) -> Tensor | None:
    """What `keep` has written, or None; a damaged file is as good as none."""
    try:
        return torch.from_numpy(np.load(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        log.warning("%s is damaged (%s): computing it again", path, error)
        return None
