"""What this process may use of its machine: a container shows all cores and all memory, and may have a part of them.

The limits are those of Linux's control groups, of version 1 or 2, which Docker and Kubernetes set.
"""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
CPU = (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))  # of version 2, of version 1
MEMORY = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def cores() -> int:
    """The cores that this process may use at a time, at least 1: those it is bound to, within its quota, rounded down.

    The threads of a step wait for each other, so a quota that stops one of them for a while stops all.
    """
    found: list[float] = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    found += [quota / period for _, (quota, period) in _limits("cpu", CPU) if quota > 0]  # -1: none
    return max(1, int(min(found)))


def memory_left() -> float:
    """Bytes to the limit of this process's memory, or infinity; cached files, which the system gives up, are free."""
    found = [math.inf]
    for group, (limit, used) in _limits("memory", MEMORY):
        with suppress(OSError, KeyError):
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            found.append(limit - used + int(stat.get("total_inactive_file") or stat["inactive_file"]))
    return min(found)


def _limits(controller: str, names: tuple[tuple[str, ...], ...]) -> Iterator[tuple[Path, list[float]]]:
    """Each control group of this process, and above, that has numbers in the files of one version."""
    for group in _groups(controller):
        for files in names:
            with suppress(OSError, ValueError):  # not these files; "max", which is no limit, is no number
                yield group, [float(word) for file in files for word in (group / file).read_text().split()]


def _groups(controller: str) -> Iterator[Path]:
    with suppress(OSError):  # not Linux
        for line in OWN.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or controller in controllers.split(","):
                root = CGROUPS / controller if controllers else CGROUPS
                group = root / path.lstrip("/")  # in a container, it may be one that only the machine shows
                yield from (each for each in (group, *group.parents) if each.is_relative_to(root))
