"""Times by turns: A, B, B, A, so that a machine that slows down slows all of them down and the ratios hold.

One round times every contestant once; a ratio is formed within a round, and its median and range are taken over rounds.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, get_start_method, set_start_method
from typing import Any, NamedTuple, TypeVar

import torch

from modeling.reliability.terminal import counted

Result = TypeVar("Result")
Contestant = Callable[[], float]
"""Does some work and returns how much: images, floating-point operations, ..."""

NOISY = "(diffusers|accelerate|torch).*"  # modules whose warnings are not about what is measured
_hosted: list[Contestant] = []  # in the process of an Elsewhere


class Elsewhere(ProcessPoolExecutor):
    """A process of its own for contestants that run as their users have them, whatever this project sets for itself."""

    def __init__(self) -> None:
        super().__init__(1, get_context("spawn"), _begin, (get_start_method(),))

    def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """What function(*arguments) returns there."""
        return self.submit(function, *arguments).result()

    def contestant(self, make: Callable[..., Contestant], *arguments: Any) -> "Hosted":
        """What make(*arguments) makes there."""
        return Hosted(self, self.run(_host, make, arguments))

    def clear(self) -> None:
        """Drops all contestants and their memory."""
        self.run(_clear)


class Hosted(NamedTuple):
    """A contestant in another process."""

    elsewhere: Elsewhere
    position: int


def _begin(start_method: str) -> None:
    set_start_method(start_method, force=True)  # of a DataLoader's workers, which is not spawn by default
    warnings.filterwarnings("ignore", module=NOISY)


def _host(make: Callable[..., Contestant], arguments: Sequence[Any]) -> int:
    _hosted.append(make(*arguments))
    return len(_hosted) - 1


def _clear() -> None:
    _hosted.clear()


def _hosted_turn(position: int, device: torch.device, seconds: float, warm: bool) -> float:
    return turn(_hosted[position], device, seconds, warm)


def wait(device: torch.device) -> None:
    """Returns when the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def turn(work: Contestant | Hosted, device: torch.device, seconds: float = 0.0, warm: bool = False) -> float:
    """Work per second: called until so many seconds have passed, at least once; the device is waited for.

    `warm`: once before that, for a contestant that finds memory and caches as another one has left them.
    """
    if isinstance(work, Hosted):
        return work.elsewhere.run(_hosted_turn, work.position, device, seconds, warm)
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


def by_turns(names: Sequence[str], rounds: int, measure: Callable[[str], Result]) -> dict[str, list[Result]]:
    """What `measure` returns for each name in each round; the order is reversed from one round to the next."""
    found: dict[str, list[Result]] = {name: [] for name in names}
    turns = [name for k in range(rounds) for name in names[:: -1 if k % 2 else 1]]
    for name in counted("measuring", turns, "turns"):
        found[name].append(measure(name))
    return found


def rates(
    contestants: Mapping[str, Contestant | Hosted],
    rounds: int,
    device: torch.device,
    seconds: float = 0.0,
    warm: bool = False,
) -> dict[str, list[float]]:
    """Work per second of each contestant in each round, see `turn`, after one call of each that is not timed."""
    for work in contestants.values():
        turn(work, device)
    return by_turns([*contestants], rounds, lambda name: turn(contestants[name], device, seconds, warm))


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, smallest, largest and number."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def spreads(found: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The spread of each."""
    return {name: spread(values) for name, values in found.items()}


def ratio(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """The spread of a / b over the rounds."""
    return spread([x / y for x, y in zip(a, b, strict=True)])
