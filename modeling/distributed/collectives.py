"""The processes of one job and what they tell each other: the only module that calls its collectives.

Every function is right in a single process too, where it does nothing. All of them must be called by all processes, in
the same order. Randomness is not shared out here: every process knows what is drawn for the whole batch or for sample
k, and takes its share. Tensors of the CPU travel by gloo, those of CUDA by NCCL: a flag costs no wait for the device.
"""

import io
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from modeling.distributed.rendezvous import TIMEOUT, meet, prepare_machine
from modeling.reliability.errors import ConfigError, Lost, Stopped, UserError
from modeling.reliability.signals import STOP_FILE, stop_requested_elsewhere

T = TypeVar("T")
ASK_EVERY = 0.5  # seconds between looks whether another process was asked to stop
_store: Any = None


def rank() -> int:
    """Of this process, in [0, world_size())."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process writes files, reports and W&B: one of them does."""
    return rank() == 0


def share(n: int) -> range:
    """Which of n things are this process's: contiguous, and the shares of any two differ by at most one thing."""
    return range(n * rank() // world_size(), n * (rank() + 1) // world_size())


@contextmanager
def group(device: str, folder: str | None) -> Iterator[None]:
    """Within the context, the processes that torchrun or the launcher has started are one group.

    Args:
        device: as configured: auto, cpu or cuda. Every process of a machine takes a CUDA device of its own.
        folder: where they meet if they are all on this machine; None: by the environment variables of torchrun.

    Raises:
        ConfigError: fewer CUDA devices than processes on this machine.
        Lost: the others do not come.
    """
    global _store
    cuda = device != "cpu" and torch.cuda.is_available()
    prepare_machine(cuda)
    with _lost_if_it_fails():
        _store, index, size = meet(folder)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=_store, rank=index, world_size=size, timeout=TIMEOUT)
    with stop_requested_elsewhere(_others_asked(None if folder is None else Path(folder) / STOP_FILE)):
        yield
    # Not after a failure: it would wait for what is gone.
    dist.destroy_process_group()
    _store = None


@contextmanager
def _lost_if_it_fails() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # whatever the backend calls it
        reason = " ".join(str(error).split())[:160]
        raise Lost(
            f"another process of this job has ended or cannot be reached ({reason}); the last checkpoint is kept, the "
            "same command goes on from it"
        ) from None


def _others_asked(file: Path | None) -> Callable[[], bool]:
    """Whether another process, or the launcher by its file, wants all to stop."""
    looked = time.monotonic()

    def ask() -> bool:
        nonlocal looked
        if time.monotonic() - looked < ASK_EVERY:
            return False
        looked = time.monotonic()
        with _lost_if_it_fails():
            return (file is not None and file.exists()) or bool(_store.check(["stop"]))

    return ask


def is_first_to_tell(error: Exception) -> bool:
    """Whether no other process has asked this before.

    Before there is a group, one a machine is told yes, if the error is one that all of them have.
    """
    if _store is None:
        return os.environ.get("LOCAL_RANK") == "0" or not isinstance(error, ConfigError)
    try:
        return bool(_store.add("told", 1) == 1)
    except RuntimeError:  # the store went with the process that held it
        return True


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
    with _lost_if_it_fails():
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]


def sum_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replaces float tensors of one device by their sums over the processes: the same bits in each of them."""
    if world_size() == 1:
        return
    flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
    with _lost_if_it_fails():
        dist.all_reduce(flat)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    torch._foreach_copy_(list(tensors), [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)])


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, where alone it is called. Tensors arrive on the CPU.

    Plain types and tensors only, as in a checkpoint: nothing is unpickled.
    """
    if world_size() == 1:
        return make()
    packed = _pack(make()) if is_first() else torch.empty(0, dtype=torch.uint8)
    size = torch.tensor([len(packed)])
    with _lost_if_it_fails():
        dist.broadcast(size, 0)
        packed = packed if is_first() else torch.empty(int(size.item()), dtype=torch.uint8)
        dist.broadcast(packed, 0)
    value: T = _unpack(packed)
    return value


def sharded(n: int, work: Callable[[range], Tensor]) -> Tensor:
    """The rows 0 to n - 1 of a table, each process having made its share of them; on the CPU, in all processes.

    Args:
        n: number of rows.
        work: makes the given rows, in order, on the CPU; the rows may be none. Calls no function of this module.

    Raises:
        Stopped: in all processes, if it is raised by `work` in one.
    """
    if world_size() == 1:
        return work(range(n))
    part = torch.empty(0)
    stopped = False
    try:
        part = work(share(n))
    except Stopped:
        stopped = True
        with _lost_if_it_fails():
            _store.set("stop", "1")
    if any_process(stopped):
        raise Stopped("stopped")
    packed = _pack(part)
    sizes = [torch.tensor([0]) for _ in range(world_size())]
    with _lost_if_it_fails():
        dist.all_gather(sizes, torch.tensor([len(packed)]))
        longest = int(max(sizes).item())
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
        dist.all_gather(parts, torch.nn.functional.pad(packed, (0, longest - len(packed))))
    return torch.cat([_unpack(part[: int(size)]) for part, size in zip(parts, sizes, strict=True)])


def sharded_batches(n: int, batch_size: int, work: Callable[[range], Tensor], empty: Tensor) -> Tensor:
    """As sharded, with `work` called for at most `batch_size` rows at a time.

    Args:
        empty: the table without rows.
    """

    def all_batches(rows: range) -> Tensor:
        starts = range(rows.start, rows.stop, batch_size)
        return torch.cat([empty, *(work(range(k, min(k + batch_size, rows.stop))) for k in starts)])

    return sharded(n, all_batches)


def check_same(tensors: Sequence[Tensor], what: str) -> None:
    """Compares the bits of float32 tensors over the processes, by a checksum.

    Raises:
        UserError: they differ: a process computes wrongly.
    """
    if world_size() == 1:
        return
    sums = torch.stack([t.detach().reshape(-1).view(torch.int32).sum(dtype=torch.int64) for t in tensors]).cpu()
    mine = (sums * torch.arange(1, len(sums) + 1)).sum().reshape(1)  # modulo 2**64
    both = torch.cat([mine, -mine])
    with _lost_if_it_fails():
        dist.all_reduce(both, dist.ReduceOp.MAX)
    if both[0] != -both[1]:
        raise UserError(
            f"{what} differ between the processes: one of the machines computes wrongly, or they are of two kinds; "
            "the last checkpoint is kept, the same command goes on from it"
        )


def _pack(value: Any) -> Tensor:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


def _unpack(packed: Tensor) -> Any:
    return torch.load(io.BytesIO(packed.numpy().tobytes()), map_location="cpu", weights_only=True)
