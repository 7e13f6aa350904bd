"""The group of a job's processes and its collectives, which no other module calls.

Every function is right in a single process too, where it does nothing. All of them must be called by all processes, in
the same order. Randomness is not shared out here: every process knows what is drawn for the whole batch or for sample
k, and takes its share. Tensors of the CPU travel by gloo, those of CUDA by NCCL: a flag costs no wait for the device.
"""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from modeling.distributed.rendezvous import TIMEOUT, connect, prepare_machine
from modeling.reliability.errors import ConnectionLost, Stopped, UserError, short
from modeling.reliability.signals import stop_workers

T = TypeVar("T")


def rank() -> int:
    """Of this process, in [0, world_size())."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes that work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes files, reports and W&B."""
    return rank() == 0


def share(n: int) -> range:
    """Which of n things are this process's: contiguous, and the shares of any two differ by at most one thing."""
    return range(n * rank() // world_size(), n * (rank() + 1) // world_size())


@contextmanager
def group(device: str) -> Iterator[None]:
    """Within the context, the processes that torchrun or the launcher has started, if it has, are one group.

    Unless `device` is cpu, every process of a machine takes a CUDA device of its own, where there are any.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    cuda = device != "cpu" and torch.cuda.is_available()
    prepare_machine(cuda)
    with _connection():
        store, index, size = connect()
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=index, world_size=size, timeout=TIMEOUT)
    yield
    # Not after a failure: it would wait for what is gone.
    barrier()
    dist.destroy_process_group()


@contextmanager
def _connection() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # whatever the backend calls it
        raise ConnectionLost(
            f"another process of this job has ended or cannot be reached ({short(error)}); the last "
            "checkpoint is kept, the same command goes on from it"
        ) from None


def barrier() -> None:
    """Waits for all processes."""
    any_process(False)


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process. Takes about 0.1 ms on one machine, and no wait for the device."""
    return any_process_each(flag)[0]


def any_process_each(*flags: bool) -> list[bool]:
    """Of each flag, whether it is set in any process."""
    if world_size() == 1:
        return list(flags)
    values = torch.tensor(flags, dtype=torch.int32)
    with _connection():
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]


def sum_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replaces float tensors of one device by their sums over the processes: the same bits in each of them."""
    if world_size() == 1:
        return
    flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
    with _connection():
        dist.all_reduce(flat)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    torch._foreach_copy_(list(tensors), [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)])


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, where alone it is called. Tensors arrive on the CPU.

    Plain types and tensors only, as in a checkpoint: nothing is unpickled.
    """
    if world_size() == 1:
        return make()
    value: T = _broadcast(make() if is_first() else None, 0)
    return value


def sharded(n: int, work: Callable[[range], Tensor]) -> Tensor:
    """The rows 0 to n - 1 of a table, each process having made its share of them; on the CPU, in all processes.

    Args:
        n: number of rows.
        work: makes the given rows, in order, on the CPU; the rows may be none. Calls no function of this module. If it
            raises Stopped in one process, all processes raise it.
    """
    if world_size() == 1:
        return work(range(n))
    part, stopped = torch.empty(0), False
    try:
        part = work(share(n))
    except Stopped:
        stopped = True
        stop_workers()  # the others need not finish their shares
    if any_process(stopped):
        raise Stopped("stopped")
    return torch.cat([_broadcast(part, k) for k in range(world_size())])


def sharded_batches(n: int, batch_size: int, work: Callable[[range], Tensor], empty: Tensor) -> Tensor:
    """As sharded, with `work` called for at most `batch_size` rows at a time; `empty` is the table without rows."""

    def all_batches(rows: range) -> Tensor:
        starts = range(rows.start, rows.stop, batch_size)
        return torch.cat([empty, *(work(range(k, min(k + batch_size, rows.stop))) for k in starts)])

    return sharded(n, all_batches)


def _broadcast(value: Any, source: int) -> Any:
    """The value of the process of rank `source`, in all processes."""
    packed = torch.empty(0, dtype=torch.uint8)
    if rank() == source:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        packed = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
    size = torch.tensor([len(packed)])
    with _connection():
        dist.broadcast(size, source)
        packed = packed if rank() == source else torch.empty(int(size.item()), dtype=torch.uint8)
        dist.broadcast(packed, source)
    return torch.load(io.BytesIO(packed.numpy().tobytes()), map_location="cpu", weights_only=True)


def check_same(tensors: Sequence[Tensor], what: str) -> None:
    """Raises UserError if float32 tensors differ in any bit between the processes, by a checksum."""
    if world_size() == 1:
        return
    sums = torch.stack([t.detach().reshape(-1).view(torch.int32).sum(dtype=torch.int64) for t in tensors]).cpu()
    mine = (sums * torch.arange(1, len(sums) + 1)).sum().reshape(1)  # modulo 2**64
    both = torch.cat([mine, -mine])
    with _connection():
        dist.all_reduce(both, dist.ReduceOp.MAX)
    if both[0] != -both[1]:
        raise UserError(
            f"{what} differ between the processes: one of the machines computes wrongly, or they are of two kinds; "
            "the last checkpoint is kept, the same command goes on from it"
        )
