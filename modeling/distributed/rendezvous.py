"""How the processes of a job find each other: a device each, a network, and a store of their own to meet in."""

import os
import secrets
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from modeling.reliability.errors import ConfigError

TIMEOUT = timedelta(hours=6)  # for what one process does alone, such as a download; a dead process is noticed at once
PrefixStore: Any = dist.PrefixStore  # type: ignore[attr-defined]  # public, but torch's __init__ does not re-export it


def prepare_machine(cuda: bool) -> None:
    """Gives this process its CUDA device, and gloo and NCCL the settings that this project needs.

    Raises:
        ConfigError: fewer CUDA devices than processes on this machine.
    """
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    if cuda:
        devices = torch.cuda.device_count()
        if devices < local:
            raise ConfigError(
                f"trainer.nproc={local}: this machine has {devices} CUDA devices, one for each process; allowed are 1 "
                f"to {devices}, or device=cpu"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # whose sums differ from call to call
    if local == int(os.environ["WORLD_SIZE"]):
        # One machine: its name in the network, by which gloo looks for itself, may not resolve.
        loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0] if loopback else "")


def meet(folder: str | None) -> tuple[Any, int, int]:
    """The store of this start of the job, the rank and the number of processes; returns when all are there.

    Args:
        folder: where they meet if they are all on this machine; None: by the environment variables of torchrun.

    Raises:
        RuntimeError: the others do not come.
    """
    url = "env://" if folder is None else f"file://{folder}/store"
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, index, count = next(rendezvous(url, rank, size, timeout=TIMEOUT))
    return own_part(store, index, count), index, count


def own_part(store: Any, rank: int, size: int) -> Any:
    """The part of a store that this start of the job alone uses.

    After a restart, torchrun's store still holds what the processes before have written, and its count of restarts
    differs from machine to machine (pytorch/pytorch#135712). So the first process names the part, and tells the name to
    each of the others under a word that only a living one can know.
    """
    word = secrets.token_hex(8)
    if rank > 0:
        store.set(f"here/{rank}", word)
        _wait_until(lambda: store.check([f"part/{word}"]))
        name = store.get(f"part/{word}").decode()
        store.set(f"{name}/joined/{rank}", "")
        return PrefixStore(name, store)
    absent = set(range(1, size))

    def all_joined() -> bool:
        for k in [*absent]:
            if store.check([f"{word}/joined/{k}"]):
                absent.remove(k)
            elif store.check([f"here/{k}"]):  # it may be the word of a dead process: then it will come again
                store.set(f"part/{store.get(f'here/{k}').decode()}", word)
        return not absent

    _wait_until(all_joined)
    return PrefixStore(word, store)


def _wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT.total_seconds()
    while not condition():  # no poll here: who leaves before all have met leaves the others waiting
        if time.monotonic() > end:
            raise RuntimeError("the other processes do not come")
        time.sleep(0.02)
