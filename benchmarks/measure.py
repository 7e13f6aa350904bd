"""Times by turns: A, B, A, B, so that a machine that slows down slows all of them down and the ratios hold.

One round times every contestant once; a ratio is formed within a round, and its median and range are taken over rounds.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, get_start_method, set_start_method
from types import TracebackType
from typing import Any

import torch

Contestant = Callable[[], float]
"""Does some work and returns how much: images, floating-point operations, ..."""

NOISY = "(diffusers|accelerate|torch).*"  # modules whose warnings are not about what is measured
_hosted: list[Contestant] = []  # in the process of an Elsewhere


def wait(device: torch.device) -> None:
    """Returns when the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def turn(work: Contestant, device: torch.device, seconds: float, warm: bool = False) -> float:
    """Work per second: called until so many seconds have passed, at least once; the device is waited for.

    `warm`: once before that, for a contestant that finds memory and caches as another one has left them.
    """
    if warm:
        work()
    wait(device)
    start, done = time.perf_counter(), 0.0
    while True:
        done += work()
        if time.perf_counter() - start >= seconds:
            break
    wait(device)
    return done / (time.perf_counter() - start)


@dataclass
class Hosted:
    """A contestant in another process."""

    pool: ProcessPoolExecutor
    position: int

    def turn(self, device: torch.device, seconds: float, warm: bool = False) -> float:
        """As the function."""
        return self.pool.submit(_hosted_turn, self.position, device, seconds, warm).result()


class Elsewhere:
    """A process for contestants that are to run as their users have them, whatever this project sets for its own."""

    def __init__(self) -> None:
        self.pool = ProcessPoolExecutor(1, get_context("spawn"), _begin, (get_start_method(),))

    def contestant(self, make: Callable[..., Contestant], *arguments: Any) -> Hosted:
        """What make(*arguments) makes there."""
        return Hosted(self.pool, self.pool.submit(_host, make, arguments).result())

    def clear(self) -> None:
        """Drops all of them, and their memory."""
        self.pool.submit(_hosted.clear).result()

    def __enter__(self) -> "Elsewhere":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.pool.shutdown(cancel_futures=True)


def _begin(start_method: str) -> None:
    set_start_method(start_method, force=True)  # of a DataLoader's workers, as it is where nobody has spawned anything
    warnings.filterwarnings("ignore", module=NOISY)


def _host(make: Callable[..., Contestant], arguments: Sequence[Any]) -> int:
    _hosted.append(make(*arguments))
    return len(_hosted) - 1


def _hosted_turn(position: int, device: torch.device, seconds: float, warm: bool) -> float:
    return turn(_hosted[position], device, seconds, warm)


def rates(
    contestants: Mapping[str, Contestant | Hosted],
    rounds: int,
    device: torch.device,
    seconds: float = 0.0,
    warm: bool = False,
) -> dict[str, list[float]]:
    """Work per second of each contestant in each round, after one call of each that is not timed.

    Args:
        contestants: by name.
        rounds: at least 1; the order turns round from one to the next.
        device: waited for at both ends of a timing.
        seconds: of a turn, at least, and warm: see turn.
    """
    turns = {name: work.turn if isinstance(work, Hosted) else partial(turn, work) for name, work in contestants.items()}
    for take in turns.values():
        take(device, 0.0, False)
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for k in range(rounds):
        for name in list(turns)[:: -1 if k % 2 else 1]:
            found[name].append(turns[name](device, seconds, warm))
    return found


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, smallest, largest and number."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def ratio(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """The spread of a / b over the rounds."""
    return spread([x / y for x, y in zip(a, b, strict=True)])
