"""The process group: how the processes of a job find each other, and all collectives of the project.

Every function also works in a single process. All processes must call it, in the same order. CPU tensors use gloo, CUDA
tensors use NCCL, so a flag never waits for the device.
"""

import io
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from modeling.reliability.container import cores
from modeling.reliability.errors import ConnectionLost, UserError, require, short
from modeling.reliability.signals import JOB, TORCHRUN

T = TypeVar("T")
TIMEOUT = timedelta(hours=6)  # for what one process does alone, such as a download; a dead process is noticed at once


def rank() -> int:
    """The index of this process, in [0, world_size())."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes that work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes files, reports and W&B."""
    return rank() == 0


@contextmanager
def group(device: str) -> Iterator[None]:
    """Within the context, the processes of this job, if it has several, form one group; see job.py.

    Unless `device` is cpu, every process of a machine with CUDA takes a device of its own.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    require(device != "mps", "device", device, "for one process only; several of them use cpu or cuda")
    with _connection():
        store, index, size = connect()
        local_rank, local_size = _place(store, index, size)
        sharing = _sharing(store, index, size)
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        _take_device(local_rank, local_size)
    if "OMP_NUM_THREADS" not in os.environ:  # which torchrun and the launcher set
        torch.set_num_threads(max(1, cores() // sharing))
    if local_size == size:
        # gloo looks up the host name, which may not resolve; a single machine needs no network.
        loopback = (name for _, name in socket.if_nameindex() if name.startswith("lo"))
        os.environ.setdefault("GLOO_SOCKET_IFNAME", next(loopback, ""))
    with _connection():
        dist.init_process_group(backend, store=store, rank=index, world_size=size, timeout=TIMEOUT)
    yield
    # Not after a failure: it would wait for a process that has ended.
    barrier()
    dist.destroy_process_group()


def _place(store: Any, index: int, size: int) -> tuple[int, int]:
    """The index of this process among those of its machine, and their number."""
    if "LOCAL_RANK" in os.environ:
        return int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    store.set(f"host/{index}", socket.gethostname())
    hosts = [store.get(f"host/{k}") for k in range(size)]
    return hosts[:index].count(hosts[index]), hosts.count(hosts[index])


def _sharing(store: Any, index: int, size: int) -> int:
    """How many processes may use the cores of this one: srun gives each its own, mpirun may give all of them all."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    store.set(f"cores/{index}", f"{socket.gethostname()} {allowed}")
    found = [store.get(f"cores/{k}") for k in range(size)]
    return found.count(found[index])


def _take_device(local_rank: int, local_size: int) -> None:
    """Makes this process's CUDA device the current one; ConfigError if there are too few."""
    have = torch.cuda.device_count()
    # srun --gpus-per-task shows each process its own one only; torchrun and the launcher show all to all.
    if have == 1 and not {JOB, TORCHRUN} & {*os.environ}:
        local_rank, local_size = 0, 1
    allowed = f"this machine has {have} CUDA devices, one for each process; allowed are 1 to {have}, or device=cpu"
    require(have >= local_size, "trainer.nproc", local_size, allowed)
    torch.cuda.set_device(local_rank)
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink SHARP's sums differ from call to call


def connect() -> tuple[Any, int, int]:
    """A store that only this start of the job uses, the rank and the number of processes; waits for all of them.

    After a restart, torchrun's store still holds what dead processes have written, and its count of restarts differs
    from machine to machine (pytorch/pytorch#135712). So each process writes a random word, and all wait until all of
    them see the same words. A process that sees my word is alive, so the word that it has written is valid too.
    """
    url = f"file://{os.environ[JOB]}/store" if JOB in os.environ else "env://"
    store, index, size = next(rendezvous(url, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout=TIMEOUT))
    words, views = ([f"{name}/{k}" for k in range(size)] for name in ("word", "view"))
    store.set(words[index], secrets.token_hex(8))
    end = time.monotonic() + TIMEOUT.total_seconds()
    while time.monotonic() < end:  # ignores requests to stop: a process that left here would leave the others waiting
        if store.check(words):
            seen = store.multi_get(words)
            store.set(views[index], b" ".join(seen))
            if store.check(views) and {*store.multi_get(views)} == {b" ".join(seen)}:
                # Public, but torch's __init__ does not re-export it.
                return dist.PrefixStore(seen[0].decode(), store), index, size  # type: ignore[attr-defined]  # see above
        time.sleep(0.02)
    raise RuntimeError("the other processes do not come")


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
    """Calls `make` in the first process only and returns its result, plain types and CPU tensors, in all of them."""
    if world_size() == 1:
        return make()
    value: T = broadcast(make() if is_first() else None, 0)
    return value


def broadcast(value: Any, source: int) -> Any:
    """The value of rank `source`, in all processes; like a checkpoint it is never unpickled."""
    buffer = io.BytesIO()
    torch.save(value if rank() == source else None, buffer)
    packed = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
    size = torch.tensor([len(packed)])
    with _connection():
        dist.broadcast(size, source)
        packed = packed if rank() == source else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(packed, source)
    return torch.load(io.BytesIO(packed.numpy().tobytes()), map_location="cpu", weights_only=True)


def check_same(tensors: Sequence[Tensor], what: str) -> None:
    """Raises UserError if float32 tensors differ in any bit between the processes, by a checksum."""
    if world_size() == 1:
        return
    sums = torch.stack([t.detach().reshape(-1).view(torch.int32).sum(dtype=torch.int64) for t in tensors]).cpu()
    mine = (sums * torch.arange(1, len(sums) + 1)).sum()  # modulo 2**64
    both = torch.stack([mine, -mine])
    with _connection():
        dist.all_reduce(both, dist.ReduceOp.MAX)
    if both[0] != -both[1]:
        raise UserError(
            f"{what} differ between the processes: one of the machines computes wrongly, or they are of two kinds; "
            "the last checkpoint is kept, the same command goes on from it"
        )
