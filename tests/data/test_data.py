"""Prepared folders, and the embedded data set."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.configs import group
from PIL import Image

from modeling.data import prepared
from modeling.data.prepared import Prepared, ensure_prepared, prepare, prepared_folder, write_prepared
from modeling.data.shapes import CLASSES, SHAPES, draw_shapes
from modeling.reliability.errors import ConfigError, UserError
from modeling.settings.keys import affects

DATA = group("data", "shapes", num_train=20, num_test=10, image_size=8)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "root"))
    return tmp_path / "root"


# Prepared folders


def split(n, offset=0):
    images = (np.arange(n * 4 * 4 * 3) + offset).astype(np.uint8).reshape(n, 4, 4, 3)
    return images, np.arange(n, dtype=np.int64) % 2


def write(target):
    return write_prepared(target, (split(5), split(2, offset=7), ["a", "b"]), {"name": "x"})


def test_prepared_round_trip(tmp_path):
    for _ in range(2):
        write(tmp_path / "x")
        found = Prepared(tmp_path / "x")
        assert (found.source, found.classes, found.shape) == ({"name": "x"}, ["a", "b"], [3, 4, 4])
        assert found.train.labels.tolist() == [0, 1, 0, 1, 0]
        assert found.train.images.shape == (5, 3, 4, 4) and found.train.images.dtype == torch.uint8
        assert torch.equal(found.train.images.permute(0, 2, 3, 1), torch.from_numpy(split(5)[0]))
        assert torch.equal(found.test.images.permute(0, 2, 3, 1), torch.from_numpy(split(2, offset=7)[0]))
        assert len(found.test.first(None).images) == 2 and len(found.test.first(1).labels) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    meta = json.loads((tmp_path / "x/data.json").read_text())
    assert (meta["num_train"], meta["num_test"]) == (5, 2)
    assert {*meta["sha256"]} == {"train", "train_labels", "test", "test_labels"}
    assert meta["images_of_classes"] == {"a": 4, "b": 3}


def test_what_comes_in_parts_is_written_as_one_array(tmp_path):
    """To the byte as NumPy writes it, so that the checksum does not tell how it came."""

    def parts(threads, notes):
        notes["drawn"] += threads
        yield from ((images[None], np.array([label])) for images, label in zip(*split(11), strict=True))

    found = write_prepared(tmp_path / "x", (parts, split(2), ["a", "b"]), {}, threads=3)
    np.save(tmp_path / "whole.npy", split(11)[0])
    assert (tmp_path / "x/train.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert found.train.labels.tolist() == split(11)[1].tolist() and found.meta["notes"] == {"drawn": 3}


@pytest.mark.parametrize(
    "content", [None, "{}", "[]", "3", "{", '{"source": 3, "classes": [], "shape": [], "sha256": {}}']
)
def test_a_damaged_data_json_is_named(tmp_path, content):
    write(tmp_path / "x")
    (tmp_path / "x/data.json").unlink()
    if content:
        (tmp_path / "x/data.json").write_text(content)
    with pytest.raises(UserError, match=r"no prepared data in .*run stage=prepare first"):
        Prepared(tmp_path / "x")


@pytest.mark.parametrize("name", ["train.npy", "train_labels.npy"])
def test_a_changed_bit_or_a_missing_array_is_found_before_anything_is_trained_on_it(tmp_path, name):
    found, path = write(tmp_path / "x"), tmp_path / "x" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} is damaged \(its SHA-256 is not the one in data.json\): run stage="):
        _ = found.train
    path.unlink()
    with pytest.raises(UserError, match=rf"{name} is damaged \(.*No such file.*\): run stage=prepare again"):
        _ = found.train


def test_data_is_prepared_once_unless_it_is_to_be_made_again(root, caplog):
    caplog.set_level("INFO")
    config = SimpleNamespace(out_dir=None, threads=None)
    assert ensure_prepared(config, DATA).folder == prepared_folder(config, DATA)
    assert "data: shapes, 20 + 10 images of 8 x 8 x 3, in" in caplog.text
    assert "10 classes: 3 circle, 3 square" in caplog.text
    caplog.clear()
    prepare(config, DATA, again=False)
    found = ensure_prepared(config, DATA)
    assert found.source == affects(DATA, "weights") and found.classes == [*CLASSES] and not caplog.text
    assert not torch.equal(found.train.images[:10], found.test.images), "the splits differ"
    prepare(config, DATA, again=True)
    assert "data: shapes" in caplog.text


@pytest.mark.parametrize(("given", "cores", "expected"), [(3, 2, 3), (None, 2, 2), (None, 8, 4)])
def test_data_is_read_with_as_many_threads_as_there_are_cores(tmp_path, monkeypatch, given, cores, expected):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(prepared, "cores", lambda: cores)
    asked = []

    def parts(threads, notes):
        asked.append(threads)
        yield split(2)

    monkeypatch.setitem(prepared.sources.SOURCES, "shapes", lambda **keys: (parts, split(2), ["a", "b"]))
    prepare(SimpleNamespace(out_dir=str(tmp_path), threads=given), DATA, again=True)
    assert asked == [expected]


def test_an_out_dir_must_hold_the_data_that_is_configured(tmp_path):
    config = SimpleNamespace(out_dir=str(tmp_path), threads=None)
    with pytest.raises(UserError, match=f"run stage=prepare out_dir={tmp_path} first"):
        ensure_prepared(config, DATA)
    prepare(config, DATA, again=True)
    assert ensure_prepared(config, DATA).folder == tmp_path / "data/shapes"
    with pytest.raises(ConfigError, match=r"data.seed=1: .* was made with seed=0: run stage=prepare again"):
        ensure_prepared(config, group("data", "shapes", num_train=20, num_test=10, image_size=8, seed=1))


def test_new_files_in_a_users_folder_are_prepared_in_another_folder(tmp_path, root):
    config, data = (
        SimpleNamespace(out_dir=None, threads=None),
        group("data", "folder", path=str(tmp_path), test_fraction=0.1),
    )
    before = prepared_folder(config, data)
    (tmp_path / "a.png").touch()
    assert before != prepared_folder(config, data) and before.parent == root / "runs/data"


def test_what_was_done_to_the_images_is_said_once(tmp_path, caplog):
    caplog.set_level("INFO")
    for k in range(20):
        Image.new("LA", (4, 4), (k, 255 * (k > 2))).save(tmp_path / f"{k}.png")
    config = SimpleNamespace(out_dir=str(tmp_path / "out"), threads=2)
    prepare(config, group("data", "folder", path=str(tmp_path), background="black"), again=True)
    grey = "all images are grey: data.channels=1 makes one channel of three"
    assert caplog.messages[:2] == ["of 20 images: 20 grey, 3 composed on black", grey]
    assert caplog.messages[2].startswith("data: folder, 18 + 2 images of 4 x 4 x 3, in ") and len(caplog.messages) == 3
    prepare(config, group("data", "folder", path=str(tmp_path), channels=1), again=True)
    assert caplog.messages.count(grey) == 1


# Shapes


def test_shapes_are_a_function_of_the_seed_and_splits_differ():
    first, labels = draw_shapes(20, 32, 3, 0)
    longer, _ = draw_shapes(30, 32, 3, 0)
    assert np.array_equal(first, longer[:20])
    assert labels.tolist() == list(range(10)) * 2
    assert not np.array_equal(first, draw_shapes(20, 32, 3, 1)[0])
    assert not np.array_equal(first, draw_shapes(20, 32, 4, 0)[0])


def test_every_class_has_its_colour_and_its_shape():
    images, _ = draw_shapes(10, 32, 0, 0)
    for image, name in zip(images, CLASSES, strict=True):
        brightest = image[tuple(np.argwhere(image.sum(2) == image.sum(2).max())[0])] / 255
        ratio = brightest / np.array(SHAPES[name][0])
        assert np.allclose(ratio, ratio[0], atol=0.03) and 0.84 < ratio[0] < 1.01, name
        assert 0.03 < (image.max(2) > 100).mean() < 0.5, name
