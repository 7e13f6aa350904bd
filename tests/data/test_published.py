"""Published data sets, in the official layouts at a tiny size, with their own checksums, read by torchvision."""

import gzip
import hashlib
import pickle

import numpy as np
import pytest
import scipy.io
from torchvision import datasets

from modeling.data.published import SETS, padded, published
from modeling.data.sources import FORMS, SOURCES
from modeling.reliability.errors import Stopped, UserError

NOWHERE = "http://127.0.0.1:9/"


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """The repository's root; nothing can be downloaded."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "root"))
    for name, about in SETS.items():
        monkeypatch.delenv(f"{name.upper()}_ROOT", raising=False)
        dataset = getattr(datasets, about.dataset)
        monkeypatch.setattr(dataset, "url", NOWHERE + "cifar-10-python.tar.gz", raising=False)
        monkeypatch.setattr(dataset, "mirrors", [NOWHERE], raising=False)
    splits = {split: (NOWHERE, f"{split}_32x32.mat", "") for split in ("train", "test")}
    monkeypatch.setattr(datasets.SVHN, "split_list", splits)
    return tmp_path / "root"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return hashlib.md5(content).hexdigest()


def images(n, *shape, offset=0):
    return (np.arange(n * np.prod(shape)) + offset).astype(np.uint8).reshape(n, *shape)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Makes a data set of 8 training and 2 test images, which its environment variable names; their pixels."""

    def cifar(dataset, key, train_files):
        base = tmp_path / dataset.base_folder

        def batch(name, offset, n):
            values = images(n, 3, 32, 32, offset=offset)
            content = {"data": values.reshape(n, -1), key: [0, 1] * (n // 2)}
            return values.transpose(0, 2, 3, 1), [name, write(base / name, pickle.dumps(content))]

        train = [batch(name, 5 * k, 8 // len(train_files)) for k, name in enumerate(train_files)]
        test = batch(dataset.test_list[0][0], 9, 2)
        names = pickle.dumps({dataset.meta["key"]: ["cat", "dog"]})
        monkeypatch.setattr(dataset, "train_list", [entry for _, entry in train])
        monkeypatch.setattr(dataset, "test_list", [test[1]])
        meta = dataset.meta | {"md5": write(base / dataset.meta["filename"], names)}
        monkeypatch.setattr(dataset, "meta", meta)
        return np.concatenate([values for values, _ in train]), test[0]

    def svhn(dataset):
        train, test = images(8, 32, 32, 3), images(2, 32, 32, 3, offset=9)
        entries = {}
        for split, values in ("train", train), ("test", test):
            path, labels = tmp_path / f"{split}_32x32.mat", np.array([10, 1] * (len(values) // 2))
            scipy.io.savemat(path, {"X": values.transpose(1, 2, 3, 0), "y": labels[:, None]})
            entries[split] = (NOWHERE, path.name, hashlib.md5(path.read_bytes()).hexdigest())
        monkeypatch.setattr(dataset, "split_list", entries)
        return train, test

    def mnist(dataset):
        train, test = images(8, 28, 28, 1), images(2, 28, 28, 1, offset=9)
        resources = []
        for prefix, values in ("train", train), ("t10k", test):
            labels = np.array([0, 1] * (len(values) // 2), np.uint8)
            for kind, array in ("images-idx3", values[..., 0]), ("labels-idx1", labels):
                header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
                name = f"{prefix}-{kind}-ubyte.gz"
                content = gzip.compress(header + array.tobytes())
                resources.append((name, write(tmp_path / dataset.__name__ / "raw" / name, content)))
        monkeypatch.setattr(dataset, "resources", resources)
        return train, test

    def tiny(name):
        monkeypatch.setenv(f"{name.upper()}_ROOT", str(tmp_path))
        dataset = getattr(datasets, SETS[name].dataset)
        if name == "cifar10":
            return cifar(dataset, "labels", ["data_batch_1", "data_batch_2"])
        if name == "cifar100":
            return cifar(dataset, "fine_labels", ["train"])
        return (svhn if name == "svhn" else mnist)(dataset)

    return tiny


@pytest.mark.parametrize("name", SETS)
def test_torchvisions_files_are_read(tiny, name):
    expected = tiny(name)
    (train, labels), (test, test_labels), classes = published(name)
    assert np.array_equal(train, expected[0]) and np.array_equal(test, expected[1])
    assert labels.tolist() == [0, 1] * 4 and test_labels.tolist() == [0, 1] and labels.dtype == np.int64
    assert classes == (["cat", "dog"] if name.startswith("cifar") else SETS[name].classes)
    keys = {"image_size": 32} if "mnist" in name else {}
    (train, _), _, _ = SOURCES[name](**keys)
    shape, names = FORMS[name](**keys)
    assert [*train.shape[1:]] == shape and [*names] == SETS[name].classes


def test_names_that_torchvision_knows():
    assert datasets.FashionMNIST.classes == SETS["fashion_mnist"].classes
    assert len(SETS["cifar100"].classes) == len({*SETS["cifar100"].classes}) == 100


def test_a_black_border(tiny):
    expected, _ = tiny("mnist")
    (train, _), (test, _), _ = padded("mnist", 32)
    assert train.shape == (8, 32, 32, 1) and test.shape == (2, 32, 32, 1)
    assert np.array_equal(train[:, 2:-2, 2:-2], expected) and train.sum(dtype=int) == expected.sum(dtype=int)
    assert np.array_equal(padded("mnist", 28)[0][0], expected)


DAMAGED = {
    "cifar10": "cifar-10-batches-py/data_batch_1",
    "cifar100": "cifar-100-python/train",
    "svhn": "test_32x32.mat",
    "mnist": "MNIST/raw/t10k-labels-idx1-ubyte.gz",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named(tiny, tmp_path, name):
    tiny(name)
    path = tmp_path / DAMAGED[name]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    found = rf"no complete {SETS[name].title} in {tmp_path} \({path.name}: wrong MD5\), and it could not be downloaded"
    with pytest.raises(UserError, match=rf"{found}.*: set {name.upper()}_ROOT to the folder that holds "):
        published(name)


@pytest.mark.parametrize("name", SETS)
def test_it_is_absent_and_there_is_no_network(root, name):
    found = rf"no complete {SETS[name].title} in {root}/data/raw, .*{name.upper()}_ROOT.*data=shapes"
    with pytest.raises(UserError, match=found) as refused:
        published(name)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("error", [Stopped("stopped"), MemoryError()])
def test_what_is_no_fault_of_the_data(monkeypatch, error):
    def absent(root, train, download):
        raise error if download else RuntimeError("not found")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", absent)
    with pytest.raises(type(error)):
        published("cifar10")
