"""Sources and prepared folders."""

import hashlib
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.configs import group
from PIL import Image
from torchvision.datasets import CIFAR10

from modeling.data.prepared import Prepared, ensure_prepared, prepare, prepared_folder, write_prepared
from modeling.data.shapes import CLASSES, SHAPES, draw_shapes
from modeling.data.sources import cifar10, folder
from modeling.reliability.errors import ConfigError, Stopped, UserError

DATA = group("data", "shapes", num_train=20, num_test=10, image_size=8)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "root"))
    monkeypatch.delenv("CIFAR10_ROOT", raising=False)
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
        assert (found.source, found.classes, found.shape) == ({"name": "x"}, ["a", "b"], [4, 4, 3])
        assert found.train.labels.tolist() == [0, 1, 0, 1, 0]
        assert found.train.images.shape == (5, 3, 4, 4) and found.train.images.dtype == torch.uint8
        assert torch.equal(found.train.images.permute(0, 2, 3, 1), torch.from_numpy(split(5)[0]))
        assert torch.equal(found.test.images.permute(0, 2, 3, 1), torch.from_numpy(split(2, offset=7)[0]))
        assert len(found.test.first(None).images) == 2 and len(found.test.first(1).labels) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    meta = json.loads((tmp_path / "x/data.json").read_text())
    assert (meta["num_train"], meta["num_test"]) == (5, 2)
    assert {*meta["sha256"]} == {"train", "train_labels", "test", "test_labels"}


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
    config = SimpleNamespace(out_dir=None)
    assert ensure_prepared(config, DATA).folder == prepared_folder(config, DATA)
    assert "data: shapes, 20 + 10 images of 8 x 8 x 3, in" in caplog.text
    caplog.clear()
    prepare(config, DATA, again=False)
    found = ensure_prepared(config, DATA)
    assert found.source == vars(DATA) and found.classes == [*CLASSES] and not caplog.text
    assert not torch.equal(found.train.images[:10], found.test.images), "the splits differ"
    prepare(config, DATA, again=True)
    assert "data: shapes" in caplog.text


def test_an_out_dir_must_hold_the_data_that_is_configured(tmp_path):
    config = SimpleNamespace(out_dir=str(tmp_path))
    with pytest.raises(UserError, match="run stage=prepare first"):
        ensure_prepared(config, DATA)
    prepare(config, DATA, again=True)
    assert ensure_prepared(config, DATA).folder == tmp_path / "data/shapes"
    with pytest.raises(ConfigError, match=r"data.seed=1: .* was made with seed=0: run stage=prepare again"):
        ensure_prepared(config, group("data", "shapes", num_train=20, num_test=10, image_size=8, seed=1))


def test_new_files_in_a_users_folder_are_prepared_in_another_folder(tmp_path, root):
    config, data = SimpleNamespace(out_dir=None), group("data", "folder", path=str(tmp_path), test_fraction=0.1)
    before = prepared_folder(config, data)
    (tmp_path / "a.png").touch()
    assert before != prepared_folder(config, data) and before.parent == root / "runs/data"


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


# A user's folder


def write_images(path, *sizes):
    path.mkdir(parents=True, exist_ok=True)
    for i, size in enumerate(sizes):
        Image.new("RGB", size, (i, 2 * i, 255 - i)).save(path / f"{i:03}.png")


def test_folder_source(tmp_path):
    write_images(tmp_path / "dog", *[(6, 4)] * 4)
    write_images(tmp_path / "cat", *[(6, 4)] * 6)
    (train, train_labels), (test, test_labels), classes = folder(str(tmp_path), 0.2)
    assert classes == ["cat", "dog"] and train.shape == (8, 4, 6, 3) and test.shape == (2, 4, 6, 3)
    assert sorted([*train_labels, *test_labels]) == [0] * 6 + [1] * 4 and train_labels.dtype == np.int64
    seen = {(*tuple(i[0, 0]), label) for i, label in zip([*train, *test], [*train_labels, *test_labels], strict=True)}
    assert len(seen) == 10, "each image is in exactly one split"


def test_the_first_test_images_of_a_folder_are_of_all_classes(tmp_path):
    for name in "abc":
        write_images(tmp_path / name, *[(4, 4)] * 20)
    _, (_, labels), _ = folder(str(tmp_path), 0.5)
    assert {*labels[:10]} == {0, 1, 2}


def test_folder_errors(tmp_path):
    with pytest.raises(UserError, match="no images in"):
        folder(str(tmp_path), 0.1)
    with pytest.raises(UserError, match="absent: there is no "):
        folder(str(tmp_path / "absent"), 0.1)
    write_images(tmp_path, (4, 4))
    with pytest.raises(UserError, match="holds 1 images: too few to set 1 aside"):
        folder(str(tmp_path), 0.1)
    write_images(tmp_path, (4, 4), (4, 4), (8, 4))
    with pytest.raises(UserError, match=r"002\.png is 8 x 4 pixels, .*000\.png is 4 x 4.*one size"):
        folder(str(tmp_path), 0.1)
    (tmp_path / "000.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"000\.png cannot be read"):
        folder(str(tmp_path), 0.1)


# CIFAR-10


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")


@pytest.fixture
def tiny_cifar10(tmp_path, monkeypatch, no_network):
    """The official layout at a tiny size, with its own checksums, read by torchvision's own loader."""
    base = tmp_path / CIFAR10.base_folder
    base.mkdir()

    def write(name, content):
        (base / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((base / name).read_bytes()).hexdigest()]

    def batch(offset, n):
        return {"data": (np.arange(n * 3072) + offset).astype(np.uint8).reshape(n, 3072), "labels": [0, 1] * (n // 2)}

    monkeypatch.setattr(CIFAR10, "train_list", [write(f"data_batch_{i}", batch(i, 4)) for i in (1, 2)])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", batch(9, 2))])
    name, md5 = write("batches.meta", {"label_names": ["cat", "dog"]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path))
    return base


def test_cifar10_source(tiny_cifar10):
    (train, labels), (test, _), classes = cifar10()
    assert train.shape == (8, 32, 32, 3) and test.shape == (2, 32, 32, 3) and classes == ["cat", "dog"]
    assert train[0, 0, 1].tolist() == [2, 2, 2] and labels.tolist() == [0, 1] * 4 and labels.dtype == np.int64


def test_a_damaged_cifar10_is_refused(tiny_cifar10):
    path = tiny_cifar10 / "data_batch_1"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"no complete CIFAR-10 in .* \(data_batch_1: wrong MD5\), and it could not be"):
        cifar10()


def test_cifar10_is_absent_and_there_is_no_network(no_network, root):
    with pytest.raises(UserError, match=rf"no complete CIFAR-10 in {root}/data/raw, .*CIFAR10_ROOT.*data=shapes"):
        cifar10()


def test_a_stop_during_the_download_is_no_failure_of_it(monkeypatch):
    def absent(root, train, download):
        raise Stopped("stopped") if download else RuntimeError("not found")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", absent)
    with pytest.raises(Stopped, match=r"^stopped$"):
        cifar10()
