"""Times by turns: A, B, A, B, so that a machine that slows down slows all of them down and the ratios hold.

One round times every contestant once; a ratio is formed within a round, and its median and range are taken over rounds.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Contestant = Callable[[], float]
"""Does some work and returns how much: images, floating-point operations, ..."""


def wait(device: torch.device) -> None:
    """Returns when the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rates(
    contestants: Mapping[str, Contestant], rounds: int, device: torch.device, seconds: float = 0.0
) -> dict[str, list[float]]:
    """Work per second of each contestant in each round, after one call of each that is not timed.

    Args:
        contestants: by name.
        rounds: at least 1; the order turns round from one to the next.
        device: waited for at both ends of a timing.
        seconds: a contestant is called until so much time has passed in its turn, at least once.
    """
    for work in contestants.values():
        work()
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for k in range(rounds):
        for name in list(contestants)[:: -1 if k % 2 else 1]:
            wait(device)
            start, done = time.perf_counter(), 0.0
            while True:
                done += contestants[name]()
                if time.perf_counter() - start >= seconds:
                    break
            wait(device)
            found[name].append(done / (time.perf_counter() - start))
    return found


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, smallest, largest and number."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def ratio(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """The spread of a / b over the rounds."""
    return spread([x / y for x, y in zip(a, b, strict=True)])
