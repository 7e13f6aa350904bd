"""What was measured on: the hardware, the versions, and the speed of its matrix products."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Contestant

PACKAGES = ("torch", "torchvision", "diffusers", "denoising-diffusion-pytorch", "hydra-core", "dvc", "wandb")


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, as a record of results needs it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    probe: Any = getattr(torch.cpu, "get_capabilities", dict)
    features = [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if probe().get(name)]
    found = {
        "cpu": _cpu(),
        "cores": cores,
        "cpu_features": features,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": {name: _version(name) for name in PACKAGES},
    }
    name = found["device"] if device.type == "cuda" else f"{found['cpu']} {cores} cores"
    found["name"] = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def matrix_product(device: torch.device, dtype: torch.dtype, size: int) -> Contestant:
    """A product of two square matrices; returns its floating-point operations."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def work() -> float:
        torch.mm(a, b)
        return 2.0 * size**3

    return work
