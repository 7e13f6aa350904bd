"""Stage `check`: before a long job, whether it can run, how long it will take and what it needs.

Each line has a mark: ok, note (worth knowing) or BAD (it cannot run), and says what to type. It measures a few real
training steps and leaves nothing behind.
"""

import itertools
import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from omegaconf import OmegaConf

from modeling.build import build_model
from modeling.checkpoints.checkpoint import checkpoints, step_of
from modeling.checkpoints.run_folder import Run
from modeling.data.prepared import Prepared, prepared_folder, write_prepared
from modeling.evaluation import fid
from modeling.inference.device import Compute, choose_compute, now
from modeling.recipe import check_keys
from modeling.reliability.container import memory_left
from modeling.reliability.errors import ConfigError, UserError, explain, short
from modeling.reliability.files import sharers, state_root
from modeling.reliability.signals import poll
from modeling.reliability.terminal import duration
from modeling.reporting.progress import LONG, SETTLED, SHORTER
from modeling.reporting.wandb_mode import wanted_mode
from modeling.reporting.wandb_run import has_key
from modeling.settings.groups import Config
from modeling.settings.keys import affects
from modeling.stages import validate
from modeling.training.state import CheckpointFolder
from modeling.training.trainer import Reporter, Trainer

log = logging.getLogger(__name__)
MEASURE = (2, 5.0)  # steps after the first, and seconds, of which the speed is measured at least
OK, NOTE, BAD = "ok  ", "note", "BAD "
STATE_COPIES = 4  # of the weights in a checkpoint of Adam: the weights, the EMA, two moments


class Finding(NamedTuple):
    mark: str
    text: str


def run(config: Config, out: Path) -> None:
    """Prints the findings; UserError if one of them says that the job cannot run."""
    bad = 0
    for finding in _findings(config, out):
        poll()
        log.info("%s %s", *finding)
        bad += finding.mark == BAD
    if bad:
        raise UserError(f"{bad} of these must be mended before the job can run")
    log.info("the job can run: leave out stage=check, or give the same keys to dvc exp run by -S")


def _findings(config: Config, out: Path) -> Iterator[Finding]:
    try:
        with tempfile.TemporaryDirectory() as scratch:
            validate.run(config, Path(scratch))
        compute = choose_compute(config.device, config.precision, config.deterministic, config.threads)
    except UserError as error:
        yield Finding(BAD, f"configuration: {error}")
        return
    yield Finding(OK, "configuration: all values are allowed and fit together")
    yield Finding(OK, f"device: {compute.describe()}")
    if compute.device.type == "cpu" and (others := sharers((state_root() / "runs").glob("*/lock"))):
        yield Finding(NOTE, f"cores: {len(others)} other trainings use them (process {others[0]}); see threads")
    prepared, finding = _data(config)
    yield finding
    yield from _speed_and_memory(config, compute, prepared)
    yield _wandb(config)
    yield _inception(config)
    yield from _repository()


def _data(config: Config) -> tuple[Prepared | None, Finding]:
    name = config.data.name
    own, of_dvc = prepared_folder(config, config.data), state_root() / "data" / name
    for folder in (own, of_dvc):
        if not (folder / "data.json").exists():
            continue
        try:
            prepared = Prepared(folder)
            if prepared.source == affects(config.data, "weights"):
                counts = f"{len(prepared.train.images):,} + {len(prepared.test.images):,}"  # the checksums are verified
                sha256 = prepared.sha256["train"][:12]
                text = f"data: {name}, {counts} images, SHA-256 {sha256}, in {folder}"
                return prepared, Finding(OK, text)
        except UserError as error:
            if folder == own:  # DVC makes its own anew
                return None, Finding(BAD, f"data: {error}")
    return None, Finding(NOTE, f"data: {name} is not prepared yet, which the first run does")


def _speed_and_memory(config: Config, compute: Compute, prepared: Prepared | None) -> Iterator[Finding]:
    """What a few steps on the data, or on noise of its shape, take; and what the whole run takes from where it is."""
    form = validate.known_form(config)
    if form is None:
        yield Finding(NOTE, "speed, memory and disk: known once stage=prepare has prepared the data")
        return
    with tempfile.TemporaryDirectory() as folder:
        data = prepared or _noise(Path(folder), *form, config.trainer.batch_size)
        free = _free_memory(compute)
        try:
            model = build_model(config.model, config.diffusion, data.shape, len(data.classes), config.seed)
            trainer = Trainer(config, compute.place_model(model), data, compute, CheckpointFolder(), Reporter())
            per_step = _seconds_per_step(trainer)
        except Exception as error:  # of the device, its memory or its compiler
            if not (why := explain(error, "train")):
                raise
            yield Finding(BAD, why)
            return
    used = _used_memory(compute)
    yield Finding(NOTE if used > free else OK, f"memory: {used / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
    t, done = config.trainer, 0
    if prepared is not None and t.resume != "never":
        kept = checkpoints(Run(config, compute.bf16, prepared.sha256).folder)
        done = min(t.steps, max(map(step_of, kept), default=0))
    seconds = per_step * (t.steps - done)
    text = f"training: {t.batch_size / per_step:.1f} images/s, {duration(seconds)} for {t.steps - done:,} steps"
    if done:
        text += f" after the {done:,} that are done"
    if seconds > LONG and compute.device.type == "cpu":
        yield Finding(NOTE, f"{text}; {SHORTER}")
    else:
        yield Finding(OK, f"{text}; evaluation and sampling come on top")
    guides = config.trainer.guide_at is not None
    copies = 3 * (STATE_COPIES + guides) + 1 + guides  # two checkpoints, one in writing, and the model file
    size = sum(p.numel() for p in model.parameters()) * 4 * copies
    space = shutil.disk_usage(state_root()).free
    mark, more = (OK, "") if size < space else (BAD, "; python -m modeling.commands.runs lists what may go")
    yield Finding(mark, f"disk: {size / 1e9:.2f} GB needed, {space / 1e9:.1f} GB free in {state_root()}{more}")


def _noise(folder: Path, shape: list[int], classes: list[str], count: int) -> Prepared:
    channels, height, width = shape
    images = np.random.default_rng(0).integers(0, 256, (count, height, width, channels), np.uint8)
    split = images, np.arange(count) % max(len(classes), 1)
    return write_prepared(folder / "noise", (split, split, classes), {"name": "noise"})


def _seconds_per_step(trainer: Trainer) -> float:
    trainer.model.train()
    device = trainer.compute.device
    for _ in range(1 if device.type == "cpu" else SETTLED):  # they take longer
        trainer.train_step()
    start = now(device)
    for steps in itertools.count(1):
        poll()
        trainer.train_step()
        if (passed := now(device) - start) > MEASURE[1] and steps >= MEASURE[0]:
            return passed / steps
    raise AssertionError


def _free_memory(compute: Compute) -> int:
    if compute.device.type == "cuda":
        return torch.cuda.mem_get_info(compute.device)[0]
    available = min(psutil.virtual_memory().available, memory_left())
    return int(available) + int(psutil.Process().memory_info().rss)


def _used_memory(compute: Compute) -> int:
    if compute.device.type == "cuda":
        return torch.cuda.max_memory_reserved(compute.device)
    return int(psutil.Process().memory_info().rss)


def _wandb(config: Config) -> Finding:
    mode = wanted_mode(config.wandb)
    if mode == "online":
        try:
            why = "" if has_key() else "there is no API key: set WANDB_API_KEY"
        except Exception as error:  # of a key that cannot be one; each part of W&B has its own kinds
            why = short(error)
        if why:
            return Finding(NOTE, f"W&B: online, but {why}, or the run is kept offline")
    return Finding(OK, f"W&B: {mode}")


def _inception(config: Config) -> Finding:
    e = config.evaluation
    if e.fid_samples is None:
        return Finding(OK, "FID: left out, evaluation.fid_samples=null")
    path = fid.cached_weights() if e.inception_weights is None else Path(e.inception_weights)
    if e.inception_weights is not None or path.exists():
        return Finding(OK, f"FID: of {e.fid_samples:,} samples, weights in {path}")
    return Finding(
        NOTE, f"FID: its weights are downloaded on first use into {path}; evaluation.inception_weights=<file>"
    )


def _repository() -> Iterator[Finding]:
    """Git and DVC: what an experiment would record."""
    root = state_root()
    with suppress(OSError):
        try:
            check_keys(OmegaConf.to_container(OmegaConf.load(root / "params.yaml")))  # type: ignore[arg-type]  # a mapping
            yield Finding(OK, "DVC: params.yaml has the keys of conf/")
        except ConfigError as error:
            yield Finding(NOTE, f"DVC: {error}")

    def git(*arguments: str) -> str:
        env = os.environ | {"LC_ALL": "C"}
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True, env=env).stdout

    try:
        changed = git("status", "--porcelain", "--", "modeling", "conf", "main.py", "dvc.yaml").splitlines()
        commit = git("rev-parse", "--short", "HEAD").strip()
    except (OSError, subprocess.CalledProcessError) as error:
        if found := re.search("git config .*safe.directory.*", getattr(error, "stderr", None) or ""):
            yield Finding(NOTE, f"Git: the repository is another user's: {found[0]}")
            return
        yield Finding(NOTE, "Git: dvc exp run needs a commit: git init && git add -A && git commit -m start")
        return
    if changed:
        more = f"{changed[0][3:]} and {len(changed) - 1} more" if len(changed) > 1 else changed[0][3:]
        yield Finding(NOTE, f"Git: changed since {commit}: {more}; git commit keeps what makes the run")
    else:
        yield Finding(OK, f"Git: at {commit}, code and conf/ unchanged")
