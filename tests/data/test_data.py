"""Sources, prepared folders, and the order of the batches."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from modeling.data import prepared
from modeling.data.prepared import LabelledImages, Prepared, write_prepared
from modeling.data.shapes import CLASSES, COLOURS, draw_shapes
from modeling.inference.device import Compute
from modeling.inference.images import to_model
from modeling.reliability.errors import Stopped, UserError
from modeling.seeds import step_seed
from modeling.training.batches import BatchSource


def split(n, size=4, offset=0):
    images = (np.arange(n * size * size * 3) + offset).astype(np.uint8).reshape(n, size, size, 3)
    return images, np.arange(n, dtype=np.int64) % 2


def test_prepared_round_trip(tmp_path):
    meta = write_prepared(tmp_path / "x", split(5), split(2, offset=7), ["a", "b"], {"name": "x"})
    assert meta == Prepared(tmp_path / "x")
    assert (meta["num_train"], meta["num_test"], meta["shape"]) == (5, 2, [4, 4, 3])
    images, labels = Prepared(tmp_path / "x", "train")
    assert labels.tolist() == [0, 1, 0, 1, 0]
    assert images.shape == (5, 3, 4, 4) and images.dtype == torch.uint8
    assert torch.equal(images.permute(0, 2, 3, 1), torch.from_numpy(split(5)[0]))
    again = write_prepared(tmp_path / "x", split(5), split(2, offset=7), ["a", "b"], {"name": "x"})
    assert again == meta and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_prepared_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        write_prepared(tmp_path / "file" / "x", split(2), split(1), ["a"], {})


def test_missing_prepared_folder(tmp_path):
    with pytest.raises(UserError, match="stage=prepare"):
        Prepared(tmp_path)


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
        ratio = brightest / np.array(COLOURS[name])
        assert np.allclose(ratio, ratio[0], atol=0.03) and 0.84 < ratio[0] < 1.01, name
        inside = (image.max(2) > 100).mean()
        assert 0.03 < inside < 0.5, name


def test_shapes_source():
    (train, _), (test, _), classes = prepared.shapes(30, 10, 16, 0)
    assert train.shape == (30, 16, 16, 3) and test.shape == (10, 16, 16, 3) and len(classes) == 10


def write_images(path, sizes):
    path.mkdir(parents=True, exist_ok=True)
    for i, size in enumerate(sizes):
        Image.new("RGB", size, (i, 2 * i, 255 - i)).save(path / f"{i:03}.png")


def test_folder_source(tmp_path):
    write_images(tmp_path / "cat", [(6, 4)] * 6)
    write_images(tmp_path / "dog", [(6, 4)] * 4)
    (train, train_labels), (test, test_labels), classes = prepared.folder(tmp_path, 0.2)
    assert classes == ["cat", "dog"] and train.shape == (8, 4, 6, 3) and test.shape == (2, 4, 6, 3)
    assert sorted([*train_labels, *test_labels]) == [0] * 6 + [1] * 4
    seen = {(*tuple(i[0, 0]), label) for i, label in zip([*train, *test], [*train_labels, *test_labels], strict=True)}
    assert len(seen) == 10, "each image is in exactly one split"


def test_the_first_test_images_of_a_folder_are_of_all_classes(tmp_path):
    for name in "abc":
        write_images(tmp_path / name, [(4, 4)] * 20)
    _, (_, labels), _ = prepared.folder(tmp_path, 0.5)
    assert set(labels[:10]) == {0, 1, 2}


def test_folder_errors(tmp_path):
    with pytest.raises(UserError, match="no images in"):
        prepared.folder(tmp_path, 0.1)
    with pytest.raises(UserError, match="absent: no such folder"):
        prepared.folder(tmp_path / "absent", 0.1)
    write_images(tmp_path, [(4, 4)])
    with pytest.raises(UserError, match="too few"):
        prepared.folder(tmp_path, 0.1)
    write_images(tmp_path, [(4, 4), (4, 4), (8, 4)])
    with pytest.raises(UserError, match=r"002\.png is 8 x 4 pixels.*one size"):
        prepared.folder(tmp_path, 0.1)
    (tmp_path / "000.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"000\.png cannot be read"):
        prepared.folder(tmp_path, 0.1)


def test_cifar10_absent_and_no_network(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(UserError, match=r"CIFAR10_ROOT.*data=shapes"):
        prepared.cifar10(tmp_path)


@pytest.fixture
def tiny_cifar10(tmp_path, monkeypatch):
    """The official layout at a tiny size, with its own checksums, read by torchvision's own loader."""
    import hashlib
    import pickle

    from torchvision.datasets import CIFAR10

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
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    return tmp_path


def test_cifar10_source(tiny_cifar10):
    (train, labels), (test, _), classes = prepared.cifar10(tiny_cifar10)
    assert train.shape == (8, 32, 32, 3) and test.shape == (2, 32, 32, 3) and classes == ["cat", "dog"]
    assert train[0, 0, 1].tolist() == [2, 2, 2] and labels.tolist() == [0, 1] * 4


def test_corrupted_cifar10_is_refused(tiny_cifar10):
    path = tiny_cifar10 / "cifar-10-batches-py" / "data_batch_1"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="no complete CIFAR-10"):
        prepared.cifar10(tiny_cifar10)


def test_a_stop_during_the_download_is_no_failure_of_it(tmp_path, monkeypatch):
    def absent(root, train, download):
        raise Stopped("stopped") if download else RuntimeError("not found")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", absent)
    with pytest.raises(Stopped, match=r"^stopped$"):
        prepared.cifar10(tmp_path / "raw")


def source(n=10, batch_size=4, flip=False, seed=0):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, 3, 4, 4), dtype=torch.uint8, generator=generator)
    return BatchSource(LabelledImages(images, torch.arange(n)), batch_size, seed, flip)


def test_every_epoch_is_a_permutation():
    s = source()
    stream = torch.cat([s.indices(step) for step in range(15)])  # 60 positions, 6 epochs
    epochs = stream.reshape(6, 10)
    assert all(sorted(e.tolist()) == list(range(10)) for e in epochs)
    assert len({tuple(e.tolist()) for e in epochs}) == 6


def test_batches_are_a_function_of_seed_and_step():
    assert torch.equal(source(flip=True).batch(7), source(flip=True).batch(7))
    assert not torch.equal(source(flip=True).batch(7), source(flip=True, seed=1).batch(7))


def test_labels_go_with_their_images():
    s = source()
    expected = to_model(s.images[s.labels(3)])  # the label of each image is its index
    assert torch.equal(s.batch(3), expected) and torch.equal(s.labels(3), s.indices(3))


def test_batch_larger_than_the_data_set():
    assert torch.bincount(source(n=3, batch_size=9).indices(0)).tolist() == [3, 3, 3]


def test_flips_mirror_left_to_right_half_of_the_time():
    flipped, plain = source(n=400, batch_size=400, flip=True), source(n=400, batch_size=400)
    a, b = flipped.batch(0), plain.batch(0)
    same = (a == b).flatten(1).all(1)
    mirrored = (a == b.flip(-1)).flatten(1).all(1)
    assert bool((same | mirrored).all()) and 160 < int(mirrored.sum()) < 240
    assert torch.equal(b, to_model(plain.images[plain.indices(0)]))


def test_mirrored_images_that_are_held_give_the_same_batches_and_need_no_more_than_twice_the_memory():
    drawn = source(n=7, flip=True)
    held = BatchSource(LabelledImages(drawn.images, drawn.all_labels), 4, 0, True, keep_mirrored=True)
    assert all(torch.equal(held.batch(step), drawn.batch(step)) for step in range(10))
    assert held.images.untyped_storage().nbytes() == 2 * drawn.images.nbytes


def test_step_seeds_do_not_collide():
    seeds = {step_seed(s, name, step) for s in range(3) for name in ("noise", "t") for step in range(500)}
    assert len(seeds) == 3000 and max(seeds) < 2**63


def test_data_json_is_plain(tmp_path):
    write_prepared(tmp_path / "x", split(2), split(1), ["a"], {})
    assert set(json.loads((tmp_path / "x" / "data.json").read_text())["sha256"]) == {
        "train",
        "train_labels",
        "test",
        "test_labels",
    }


@pytest.mark.parametrize("content", ["{}", "[]", "3", "{"])
def test_a_damaged_data_json_is_named(tmp_path, content):
    write_prepared(tmp_path / "x", split(2), split(1), ["a"], {})
    (tmp_path / "x" / "data.json").write_text(content)
    with pytest.raises(UserError, match=r"no prepared prepared in .*run stage=prepare first"):
        Prepared(tmp_path / "x")


@pytest.mark.parametrize("name", ["train.npy", "train_labels.npy"])
def test_damaged_arrays_are_named(tmp_path, name):
    write_prepared(tmp_path / "x", split(2), split(1), ["a"], {})
    (tmp_path / "x" / name).write_bytes(b"no array")
    with pytest.raises(UserError, match=rf"{name} is damaged .*run stage=prepare again"):
        Prepared(tmp_path / "x", "train")


def test_a_changed_bit_is_found_before_anything_is_trained_on_it(tmp_path):
    write_prepared(tmp_path / "x", split(2), split(1), ["a"], {})
    path = tmp_path / "x" / "train.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train.npy is damaged \(its SHA-256 is not the one in prepared.json"):
        Prepared(tmp_path / "x", "train")


def test_a_large_data_set_on_a_cpu_stays_where_it_is(monkeypatch):
    monkeypatch.setattr("modeling.inference.device.PLACE_AT_MOST", 3)
    images = torch.zeros(1, 2, 2, 1, dtype=torch.uint8).permute(0, 3, 1, 2)
    assert Compute(torch.device("cpu"), False).place(images) is images
