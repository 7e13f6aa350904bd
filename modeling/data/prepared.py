"""A prepared folder: train.npy and test.npy (uint8 [N, H, W, C]), their labels, and data.json that describes them.

data.json holds counts, image shape, class names, the settings of the source and the SHA-256 of each file. Images are
not normalised here: see inference/images.py.
"""

import hashlib
import json
import logging
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from modeling.data import shapes, sources
from modeling.reliability.errors import ConfigError, UserError, short
from modeling.reliability.files import existing, locked, replacing_folder, state_root
from modeling.reliability.signals import poll
from modeling.settings import Config, DataConfig, own_keys

log = logging.getLogger(__name__)


class LabelledImages(NamedTuple):
    """A split as the model sees it."""

    images: Tensor  # uint8 [N, C, H, W]
    labels: Tensor  # int64 [N]

    def first(self, count: int | None) -> "LabelledImages":
        """The first `count`; None: all."""
        return LabelledImages(self.images[:count], self.labels[:count])


class Prepared:
    """A prepared folder; UserError if it is missing or damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            meta = json.loads((folder / "data.json").read_text())
            self.source: dict[str, Any] = dict(meta["source"])  # the settings that it was made with
            self.classes: list[str] = meta["classes"]
            self.shape: list[int] = meta["shape"]  # (H, W, C) of one image
            self.sha256: dict[str, str] = meta["sha256"]
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise UserError(f"no prepared data in {folder} ({error}): run stage=prepare first") from None

    @cached_property
    def train(self) -> LabelledImages:
        """The images to train on, memory-mapped; UserError unless their SHA-256 is that of data.json."""
        return self._load("train")

    @cached_property
    def test(self) -> LabelledImages:
        """The images that are never trained on, as `train`."""
        return self._load("test")

    def _load(self, split: str) -> LabelledImages:
        return LabelledImages(self._array(split).permute(0, 3, 1, 2), self._array(f"{split}_labels"))

    def _array(self, stem: str) -> Tensor:
        path = self.folder / f"{stem}.npy"
        try:
            if _sha256(path) != self.sha256[stem]:
                raise ValueError("its SHA-256 is not the one in data.json")
            return torch.from_numpy(np.load(path, "c"))  # copy-on-write: the tensor may be written to, not the file
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({short(error)}): run stage=prepare again") from None


def write_prepared(target: Path, source: sources.Source, made_from: dict[str, Any]) -> Prepared:
    """Writes a prepared folder whole or not at all, else raises UserError; `made_from` are the source's settings."""
    train, test, classes = source
    arrays = {"train": train[0], "train_labels": train[1], "test": test[0], "test_labels": test[1]}
    counts = {"num_train": len(train[0]), "num_test": len(test[0])}
    meta: dict[str, Any] = {"source": made_from, "classes": list(classes), "shape": list(train[0].shape[1:]), **counts}
    with replacing_folder(target) as partial:
        for stem, array in arrays.items():
            poll()
            np.save(partial / f"{stem}.npy", np.ascontiguousarray(array))
        meta["sha256"] = {stem: _sha256(partial / f"{stem}.npy") for stem in arrays}
        (partial / "data.json").write_text(json.dumps(meta, indent=2) + "\n")
    return Prepared(target)


def prepared_folder(config: Config, data: DataConfig) -> Path:
    """Where the prepared arrays are: under `out_dir` if that is set, else in a cache keyed by their source."""
    if config.out_dir is not None:
        return Path(config.out_dir) / "data" / data.name
    # Whatever kind of path a source has: a file, or the files of a folder.
    found = [existing("data.path", keys["path"])] if "path" in (keys := own_keys(data)) else []
    files = sorted(p for path in found for p in (path, *path.rglob("*")) if p.is_file())
    key = asdict(data) | {"files": [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]}
    key["code"] = [Path(str(module.__file__)).read_text() for module in (shapes, sources)]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    return state_root() / "runs" / "data" / f"{data.name}-{digest}"


def prepare(config: Config, data: DataConfig, again: bool) -> Prepared:
    """The prepared folder of `data`, made if it is missing or if it is to be made `again`; one process at a time."""
    target = prepared_folder(config, data)
    with locked(target.with_name(f".{target.name}.lock"), wait=True):
        if again or not (target / "data.json").exists():
            train, test, classes = sources.SOURCES[data.name](**own_keys(data))
            prepared = write_prepared(target, (train, test, classes), asdict(data))
            size = " x ".join(map(str, prepared.shape))
            log.info("data: %s, %d + %d images of %s, in %s", data.name, len(train[0]), len(test[0]), size, target)
            return prepared
        return Prepared(target)


def ensure_prepared(config: Config, data: DataConfig) -> Prepared:
    """The prepared folder of `data`; a plain run makes it if it is missing, a run with an `out_dir` must have it."""
    target = prepared_folder(config, data)
    missing = config.out_dir is None and not (target / "data.json").exists()
    prepared = prepare(config, data, again=False) if missing else Prepared(target)
    for key, value in asdict(data).items():
        if (made := prepared.source.get(key, value)) != value:
            raise ConfigError(f"data.{key}={value}: {target} was made with {key}={made}: run stage=prepare again")
    return prepared


def _sha256(path: Path) -> str:
    return hashlib.sha256(np.memmap(path, mode="r").data).hexdigest()
