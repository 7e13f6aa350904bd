"""Where results come from: code, data, weights, device and versions."""

import json
import os
import platform
import subprocess
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "torchvision", "numpy", "hydra-core", "dvc", "wandb")
OWN = (":!params.yaml", ":!dvc.lock", ":!reports")  # what a run itself writes and Git tracks


def git(*arguments: str) -> str | None:
    """What Git says about the code that runs; None without a repository."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def uncommitted() -> list[str]:
    """The tracked files with changes that are in no commit, those apart that a run itself writes."""
    return (git("diff", "--name-only", "HEAD", "--", ".", *OWN) or "").splitlines()


def model_metadata(path: Path) -> dict[str, Any]:
    """What a model file says about itself (stages/train.py); nothing if there is no readable file."""
    try:
        with safe_open(path, framework="np") as file:  # reads no tensor, and needs no torch
            return dict(json.loads((file.metadata() or {})["config"]))
    except (KeyError, OSError, SafetensorError, TypeError, ValueError):
        return {}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # DVC, where main.py runs without it
        return "not installed"


def provenance(meta: dict[str, Any], data: dict[str, Any], details: dict[str, Any]) -> dict[str, str]:
    """Facts by their names, from the metadata of the model and of the data, and from the details of training."""
    changed = uncommitted()
    hashes = {"model weights, SHA-256": meta.get("sha256")}
    hashes |= {f"{split} images, SHA-256": data.get("sha256", {}).get(split) for split in ("train", "test")}
    seconds = details.get("seconds")
    facts = {
        "DVC experiment": os.environ.get("DVC_EXP_NAME"),
        "Git commit": git("rev-parse", "HEAD") or "the code is in no Git repository",
        "changes in no commit": f"{', '.join(changed)}: the commit alone does not give these results"
        if changed
        else None,
        "device": details.get("made_on"),
        "time of training": None if seconds is None else str(timedelta(seconds=round(seconds))),
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "packages": ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
    }
    return {name: value for name, value in (facts | hashes).items() if value}
