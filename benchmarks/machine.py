"""What was measured on: the hardware and the versions."""

import platform
import re
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from modeling.inference.device import computes_in_bf16
from modeling.reliability.container import cores

PACKAGES = ("torch", "torchvision", "diffusers", "denoising-diffusion-pytorch", "hydra-core", "dvc", "wandb")


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, as a record of results needs it."""
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    versions = {found.name.replace("_", "-"): found.version for found in distributions()}
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    found = {
        "cpu": match.group(1).strip() if match else platform.processor() or platform.machine(),
        "cores": cores(),
        "cpu_features": [f for f in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if capabilities.get(f)],
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": {name: versions.get(name, "not installed") for name in PACKAGES},
    }
    bf16 = "" if computes_in_bf16(device) else " float32"
    name = found["device"] if device.type == "cuda" else f"{found['cpu']} {found['cores']} cores{bf16}"
    return found | {"name": re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")}
