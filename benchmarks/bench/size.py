"""How much is measured in each mode."""

from dataclasses import dataclass, replace

import torch


@dataclass
class Size:
    """How much is measured."""

    model: str
    batch: int
    sample_batch: int
    evaluations: int  # of the network, for each sample
    rounds: int
    matrix: int  # rows of the matrix product that stands for the peak
    data_batch: int = 128
    seconds: float = 0.5  # of a turn, at least
    commands: bool = True  # whether whole stages are timed too
    processes: tuple[int, ...] = (1, 2)  # counts of them
    batches: tuple[int, ...] = (1, 4, 16, 64)  # of the small network


SIZES = {
    "full": Size("ddpm", 32, 8, 5, 5, 2048),
    "quick": Size("ddpm", 4, 2, 3, 3, 2048),
    "tiny": Size("tiny", 2, 1, 2, 1, 64, data_batch=8, seconds=0, commands=False, processes=(1,), batches=(2,)),
    "gpu": Size("ddpm", 128, 64, 50, 7, 8192),
}


def sized(device: torch.device, mode: str) -> Size:
    """The size of a mode; a GPU gets enough work."""
    if device.type == "cuda" and mode != "tiny":
        return replace(SIZES["gpu"], rounds=3) if mode == "quick" else SIZES["gpu"]
    return SIZES[mode]
