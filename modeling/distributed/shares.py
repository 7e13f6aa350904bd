"""Which part of the work each process of a job does.

Random numbers are never exchanged: each process knows those of the whole batch, or of sample k, and takes its share.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from modeling.distributed.collectives import any_process, broadcast, rank, world_size
from modeling.reliability.errors import Stopped
from modeling.reliability.signals import stop_workers
from modeling.reliability.terminal import progress


def share(n: int) -> range:
    """The indices of n items that this process works on: contiguous, and any two shares differ by at most one item."""
    return range(n * rank() // world_size(), n * (rank() + 1) // world_size())


def sharded(n: int, work: Callable[[range], Tensor]) -> Tensor:
    """The rows 0 to n - 1 of a table on the CPU, in all processes; each of them makes its share.

    `work` makes the given rows, perhaps none, and calls no collective. Stopped in one process is raised in all.
    """
    if world_size() == 1:
        return work(range(n))
    part = None
    try:
        part = work(share(n))
    except Stopped:
        stop_workers()  # the others need not finish their shares
    if any_process(part is None):
        raise Stopped("stopped")
    return torch.cat([broadcast(part, k) for k in range(world_size())])


def sharded_batches(
    what: str, n: int, batch_size: int, work: Callable[[range, Callable[[float], None]], Tensor], empty: Tensor
) -> Tensor:
    """As sharded, with `work` called for at most `batch_size` rows at a time; `empty` is the table without rows.

    Shows the progress of `what`. `work` may tell which part of its rows is done, from 0 to 1.
    """

    def all_batches(rows: range) -> Tensor:
        parts = [empty]
        with progress(what, n) as shown:
            begun, scale = shown.done, n / max(len(rows), 1)  # all processes are about as fast

            for k in range(0, len(rows), batch_size):
                batch = rows[k : k + batch_size]

                def tell(part: float, before: int = k, size: int = len(batch)) -> None:
                    shown.to(begun + scale * (before + min(part, 1.0) * size))

                parts.append(work(batch, tell))
                tell(1.0)
        return torch.cat(parts)

    return sharded(n, all_batches)
