"""A prepared folder: train.npy and test.npy (uint8 [N, H, W, C]), their labels, and data.json that describes them.

data.json holds counts, image shape, class names, the settings of the source and the SHA-256 of each file. Images are
not normalised here: see inference/images.py.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from modeling.data import folder, pictures, published, reading, shapes, sources
from modeling.data.pictures import GREY
from modeling.data.splits import Arrays, Source
from modeling.reliability.container import cores
from modeling.reliability.errors import ConfigError, UserError, short
from modeling.reliability.files import existing, locked, replacing_folder, state_root
from modeling.reliability.signals import poll
from modeling.reliability.terminal import counts
from modeling.settings.groups import Config, DataConfig
from modeling.settings.keys import affects, own_keys

log = logging.getLogger(__name__)


class LabelledImages(NamedTuple):
    """A split as the model sees it."""

    images: Tensor  # uint8 [N, C, H, W]
    labels: Tensor  # int64 [N]

    def first(self, count: int | None) -> "LabelledImages":
        """The first `count`; None: all."""
        return LabelledImages(self.images[:count], self.labels[:count])


class Prepared:
    """A prepared folder; UserError, which says what it is `made_by`, if it is missing or damaged."""

    def __init__(self, folder: Path, made_by: str = "stage=prepare") -> None:
        self.folder = folder
        try:
            self.meta: dict[str, Any] = json.loads((folder / "data.json").read_text())
            meta = self.meta
            self.source: dict[str, Any] = dict(meta["source"])  # the settings that it was made with
            self.classes: list[str] = meta["classes"]
            height, width, channels = meta["shape"]
            self.shape: list[int] = [channels, height, width]  # of one image
            self.sha256: dict[str, str] = meta["sha256"]
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise UserError(f"no prepared data in {folder} ({error}): run {made_by} first") from None

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


def write_prepared(target: Path, source: Source, made_from: dict[str, Any], threads: int = 1) -> Prepared:
    """Writes a prepared folder whole or not at all, else raises UserError; `made_from` are the source's settings."""
    train, test, classes = source
    notes: Counter[str] = Counter()
    sizes: Counter[int] = Counter()
    meta: dict[str, Any] = {"source": made_from, "classes": list(classes)}
    with replacing_folder(target) as partial:
        for stem, split in (("train", train), ("test", test)):
            parts = [split] if isinstance(split, tuple) else split(threads, notes)
            shape, labels = _write_images(partial / f"{stem}.npy", parts)
            np.save(partial / f"{stem}_labels.npy", labels)
            sizes.update(labels.tolist())
            meta |= {"shape": shape, f"num_{stem}": len(labels)}
        meta |= {"images_of_classes": {name: sizes[k] for k, name in enumerate(classes)}, "notes": dict(notes)}
        meta["sha256"] = {path.stem: _sha256(path) for path in sorted(partial.glob("*.npy"))}
        (partial / "data.json").write_text(json.dumps(meta, indent=2) + "\n")
    return Prepared(target)


def _write_images(path: Path, parts: Iterable[Arrays]) -> tuple[list[int], npt.NDArray[np.int64]]:
    """Appends images to one .npy file, so that only a part is in the memory; the shape of one, and all labels."""
    shape: list[int] = []
    labels: list[npt.NDArray[np.int64]] = []

    def write_header() -> None:  # as long as the first one: NumPy leaves room for a larger count
        form = {"descr": "|u1", "fortran_order": False, "shape": (sum(map(len, labels)), *shape)}
        np.lib.format.write_array_header_1_0(file, form)

    with path.open("wb") as file:
        for images, of_them in parts:
            poll()
            if not labels:
                shape += images.shape[1:]
                write_header()
            file.write(np.ascontiguousarray(images).data)
            labels.append(of_them)
        if not labels:
            raise UserError(f"no image for {path.stem}ing can be read")
        file.seek(0)
        write_header()
    return shape, np.concatenate(labels)


def prepared_folder(config: Config, data: DataConfig) -> Path:
    """Where the prepared arrays are: under `out_dir` if that is set, else in a cache keyed by their source."""
    if config.out_dir is not None:
        return Path(config.out_dir) / "data" / data.name
    # Whatever kind of path a source has: a file, or the files of a folder.
    found = [existing("data.path", keys["path"])] if "path" in (keys := own_keys(data)) else []
    key = affects(data, "weights") | {"files": [(str(path), folder.listing(path)) for path in found]}
    code = (folder, pictures, published, reading, shapes, sources)
    key["code"] = [Path(str(module.__file__)).read_text() for module in code]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    return state_root() / "runs" / "data" / f"{data.name}-{digest}"


def prepare(config: Config, data: DataConfig, again: bool) -> Prepared:
    """The prepared folder of `data`, made if it is missing or if it is to be made `again`; one process at a time."""
    target = prepared_folder(config, data)
    with locked(target.with_name(f".{target.name}.lock"), wait=True):
        if again or not (target / "data.json").exists():
            source = sources.SOURCES[data.name](**own_keys(data))
            threads = config.threads or min(torch.get_num_threads(), cores())
            prepared = write_prepared(target, source, affects(data, "weights"), threads)
            _tell(prepared)
            return prepared
        return Prepared(target)


def _tell(prepared: Prepared) -> None:
    """Says once what was done to the images, and what there is now."""
    meta, notes = prepared.meta, prepared.meta["notes"]
    train, test = meta["num_train"], meta["num_test"]
    if notes:
        log.info("of %s images: %s", f"{train + test:,}", counts(notes))
    if notes.get(GREY) == train + test and prepared.shape[0] == 3:
        log.info("all images are grey: data.channels=1 makes one channel of three")
    size = " x ".join(map(str, meta["shape"]))
    log.info("data: %s, %d + %d images of %s, in %s", prepared.source["name"], train, test, size, prepared.folder)
    if len(sizes := meta["images_of_classes"]) > 1:
        log.info("%d classes: %s", len(sizes), counts(sizes))


def ensure_prepared(config: Config, data: DataConfig) -> Prepared:
    """The prepared folder of `data`; a plain run makes it if it is missing, a run with an `out_dir` must have it."""
    target = prepared_folder(config, data)
    missing = config.out_dir is None and not (target / "data.json").exists()
    made_by = "stage=prepare" if config.out_dir is None else f"stage=prepare out_dir={config.out_dir}"
    prepared = prepare(config, data, again=False) if missing else Prepared(target, made_by)
    for key, value in affects(data, "weights").items():
        if (made := prepared.source.get(key, value)) != value:
            raise ConfigError(f"data.{key}={value}: {target} was made with {key}={made}: run stage=prepare again")
    return prepared


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):  # of a file that may be larger than the memory
            digest.update(part)
    return digest.hexdigest()
