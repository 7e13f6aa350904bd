"""Thousands of hostile inputs to every reader: each gives a value or one line, in time, and nothing in it is run."""

import copy
import dataclasses
import functools
import io
import json
import pickle
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
import torch
from helpers.configs import composed
from helpers.images import png, read_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from torchvision.datasets import CIFAR10

from modeling.checkpoints.checkpoint import VERSION, Damaged, read_checkpoint, save_checkpoint
from modeling.checkpoints.model_file import load_model, load_trained, save_model
from modeling.config import load_config
from modeling.data.sources import cifar10
from modeling.reliability.errors import ConfigError, UserError
from modeling.settings.groups import Config

FAST = {"deadline": 5000, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}

junk = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(10**18, 10**40), st.floats(), st.text(max_size=8),
    st.sampled_from(["", "???", "${x}", "${seed}", "1e400", "nan", "[1,", "auto", "../..", "\x00"]),
    st.lists(st.integers(-2, 300) | st.floats() | st.none(), max_size=4),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)  # fmt: skip


@pytest.fixture(scope="module")
def plain():
    return OmegaConf.to_container(composed("data=shapes"))


def paths(node, at=()):
    for key, value in node.items():
        yield (*at, key)
        if isinstance(value, dict):
            yield from paths(value, (*at, key))


@settings(max_examples=250, **FAST)
@given(data=st.data())
def test_configurations(plain, data):
    values = copy.deepcopy(plain)
    for _ in range(data.draw(st.integers(1, 3))):
        *inner, last = data.draw(st.sampled_from(sorted(paths(values))))
        node = functools.reduce(dict.__getitem__, inner, values)
        node[last if data.draw(st.integers(0, 9)) else data.draw(st.text(min_size=1, max_size=5))] = data.draw(junk)
    try:
        config = load_config(OmegaConf.create(values))
        assert isinstance(config, Config) and isinstance(config.out_dir, str | None)
        json.dumps(dataclasses.asdict(config), default=sorted, allow_nan=False)  # all numbers are finite
    except (ConfigError, OmegaConfBaseException) as error:  # main.py makes one line of both
        assert str(error)


def mutated(data, content):
    """The bytes with some changed, removed, doubled or cut off."""
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(content) - 1, 0)))
        kind = data.draw(st.sampled_from(["flip", "set", "cut", "remove", "double", "grow"]))
        length = data.draw(st.integers(1, 64))
        if kind == "flip" and content:
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "set":
            content[at : at + 4] = data.draw(st.binary(min_size=4, max_size=4) | st.just(b"\xff" * 4))
        elif kind == "cut":
            del content[at:]
        elif kind == "remove":
            del content[at : at + length]
        elif kind == "double":
            content[at:at] = content[at : at + length]
        else:
            content += data.draw(st.binary(max_size=64))
    return bytes(content)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with one good file of each kind, on a disk that is not waited for."""
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        tensors = {"w": torch.arange(64.0), "n": torch.zeros(2, dtype=torch.int64)}
        save_checkpoint(folder, 1, {"step": 1, "model": tensors})
        save_model(folder / "good.safetensors", {"w": torch.arange(64.0)}, {"config": {"seed": 1}})
        (folder / "images").mkdir()
        for name in ("a", "b"):
            (folder / f"images/{name}.png").write_bytes(IMAGES["PNG"])
        yield folder


def encoded(kind):
    image = Image.fromarray((np.arange(12 * 12 * 3) % 256).astype(np.uint8).reshape(12, 12, 3))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


IMAGES = {kind: encoded(kind) for kind in ("PNG", "JPEG", "BMP", "WEBP")}


def read_or_refused(path):
    """A checkpoint is read, or refused in one line; anything else that comes out of it is a failure."""
    try:
        assert isinstance(read_checkpoint(path), dict)
    except Damaged as error:
        assert "\n" not in str(error)


@settings(max_examples=1000, **FAST)
@given(data=st.data())
def test_checkpoints(place, data):
    good = place / "step-000000001.pt"
    path = place / "hostile.pt"
    path.write_bytes(mutated(data, good.read_bytes()) if data.draw(st.integers(0, 9)) else data.draw(st.binary()))
    read_or_refused(path)


@settings(max_examples=500, **FAST)
@given(data=st.data())
def test_checkpoints_whose_pickle_is_hostile(place, data):
    """The archive is whole, with right checksums; what it unpickles to is not."""
    buffer = io.BytesIO()
    torch.save({"version": VERSION, "w": torch.arange(16.0)}, buffer)
    path = place / "pickle.pt"
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, mutated(data, content) if name.endswith("data.pkl") else content)
    read_or_refused(path)


@settings(max_examples=500, **FAST)
@given(data=st.data())
def test_model_files(place, data):
    path = place / "hostile.safetensors"
    path.write_bytes(mutated(data, (place / "good.safetensors").read_bytes()))
    try:
        tensors, meta = load_model(path)
        assert isinstance(tensors, dict) and isinstance(meta, dict)
    except UserError as error:
        assert str(path) in str(error)


@settings(max_examples=300, **FAST)
@given(data=st.data())
def test_model_files_whose_metadata_lie(place, plain, data):
    """Sizes of any kind, and giants: no memory is taken for what the file does not hold."""
    config = {group: dict(plain[group]) for group in ("model", "diffusion")}
    config["model"] |= {"model_channels": 8, "channel_mult": [1], "attention_resolutions": [], "norm_groups": 4}
    meta = {"config": config, "image_shape": [8, 8, 3], "classes": [], "steps": 1}
    groups = [config["model"], config["diffusion"], meta]
    giants = st.integers(10**5, 10**12) | st.lists(st.integers(10**5, 10**9), max_size=9)
    for _ in range(data.draw(st.integers(1, 3))):
        group = data.draw(st.sampled_from(groups))
        group[data.draw(st.sampled_from(sorted(group)))] = data.draw(junk | giants)
    path = place / "lying.safetensors"
    save_model(path, {"network.conv_in.weight": torch.zeros(8, 3, 3, 3)}, meta)
    with pytest.raises(UserError, match="is not what it says"):
        load_trained(path)


@pytest.mark.filterwarnings("error")
@settings(max_examples=250, **FAST)
@given(data=st.data())
def test_images(place, data):
    kind = data.draw(st.sampled_from(sorted(IMAGES)))
    (place / "images/c.png").write_bytes(mutated(data, IMAGES[kind]))
    try:
        (train, _), (test, _), *_ = read_folder(place / "images", test_fraction=0.3)
        assert len(train) + len(test) == 3 and train.dtype == np.uint8
    except UserError as error:
        assert "c.png" in str(error)


# Files that are made to do harm


def test_an_image_bomb_is_refused(tmp_path):
    """100,000 x 100,000 pixels in a PNG of some hundred bytes, and 9,000 x 9,000, which Pillow itself lets pass."""
    (tmp_path / "a.png").write_bytes(IMAGES["PNG"])
    for side in (100_000, 9_000):
        (tmp_path / "bomb.png").write_bytes(png(side, side, 2, 8, bytes(1000)))
        with warnings.catch_warnings(), pytest.raises(UserError, match=r"bomb.png cannot be read.*pixels"):
            warnings.simplefilter("error")
            read_folder(tmp_path, test_fraction=0.5)


class Run:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_is_never_run(tmp_path, monkeypatch):
    evidence = tmp_path / "evidence"
    torch.save({"version": VERSION, "x": Run(evidence)}, tmp_path / "x.pt")
    with pytest.raises(Damaged):
        read_checkpoint(tmp_path / "x.pt")
    (tmp_path / "x.safetensors").write_bytes(pickle.dumps(Run(evidence)))
    with pytest.raises(UserError, match="is damaged"):
        load_model(tmp_path / "x.safetensors")
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        (batches / name).write_bytes(pickle.dumps(Run(evidence)))
    refuse_cifar10(tmp_path, monkeypatch)
    assert not evidence.exists()
    pickle.loads(pickle.dumps(Run(evidence)))
    assert evidence.exists(), "it makes a file if it is run"


def test_a_tar_that_leaves_its_folder_is_refused(tmp_path, monkeypatch):
    root = tmp_path / "inner"
    root.mkdir()
    with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("../escaped")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"x"))
    refuse_cifar10(root, monkeypatch)
    assert not (tmp_path / "escaped").exists()


def refuse_cifar10(root, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    monkeypatch.setenv("CIFAR10_ROOT", str(root))
    with pytest.raises(UserError, match="no complete CIFAR-10"):
        cifar10()
