"""How the processes of a job find each other: a device for each, a network, and a store that they alone use."""

import os
import secrets
import socket
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from modeling.reliability.errors import ConfigError
from modeling.reliability.signals import JOB

TIMEOUT = timedelta(hours=6)  # for what one process does alone, such as a download; a dead process is noticed at once
PrefixStore: Any = dist.PrefixStore  # type: ignore[attr-defined]  # public, but torch's __init__ does not re-export it


def prepare_machine(cuda: bool) -> None:
    """Gives this process its CUDA device, and gloo and NCCL the settings that this project needs."""
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


def connect() -> tuple[Any, int, int]:
    """A store that this start of the job alone uses, the rank and the number of processes; returns when all have it.

    After a restart, torchrun's store still holds what dead processes have written, and its count of restarts differs
    from machine to machine (pytorch/pytorch#135712). So each process writes a random word, and all wait until all of
    them see the same words. A process that sees my word lives, so the word that it has written is no dead one's either.

    Raises:
        RuntimeError: the others do not come.
    """
    url = f"file://{os.environ[JOB]}/store" if JOB in os.environ else "env://"
    store, rank, size = next(rendezvous(url, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout=TIMEOUT))
    words, views = ([f"{name}/{k}" for k in range(size)] for name in ("word", "view"))
    store.set(words[rank], secrets.token_hex(8))
    end = time.monotonic() + TIMEOUT.total_seconds()
    while time.monotonic() < end:  # heeds no request to stop: a process that left here would leave the others waiting
        if store.check(words):
            seen = store.multi_get(words)
            store.set(views[rank], b" ".join(seen))
            if store.check(views) and {*store.multi_get(views)} == {b" ".join(seen)}:
                return PrefixStore(seen[0].decode(), store), rank, size
        time.sleep(0.02)
    raise RuntimeError("the other processes do not come")
