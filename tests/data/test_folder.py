"""A user's folder: what counts as an image, its class and its split; reading all of it in parallel."""

import multiprocessing
import os
import shutil
from collections import Counter

import numpy as np
import pytest
from helpers.images import read_folder, source, write_images
from PIL import Image

from modeling.data import reading
from modeling.data.folder import find_images, folder_form, listing
from modeling.data.prepared import write_prepared
from modeling.reliability.errors import ConfigError, Stopped, UserError

# Classes and splits


def classes(path, fraction=0.1):
    """The classes of the two splits, with the number of images of each."""
    images = find_images(str(path), fraction)
    return [
        {images.classes[k]: sum(label == k for _, label in split) for k in {label for _, label in split}}
        for split in (images.train, images.test)
    ]


def test_sub_folders_are_classes_and_a_part_is_drawn_for_testing(tmp_path):
    write_images(tmp_path / "dog", *[(6, 4)] * 4)
    write_images(tmp_path / "cat/wild", *[(6, 4)] * 6)
    (train, train_labels), (test, test_labels), names, notes = read_folder(tmp_path, test_fraction=0.2)
    assert names == ["cat/wild", "dog"] and train.shape == (8, 4, 6, 3) and test.shape == (2, 4, 6, 3)
    assert sorted([*train_labels, *test_labels]) == [0] * 6 + [1] * 4 and train_labels.dtype == np.int64
    seen = {(*tuple(i[0, 0]), label) for i, label in zip([*train, *test], [*train_labels, *test_labels], strict=True)}
    assert len(seen) == 10 and not notes, "each image is in exactly one split"


def test_the_first_images_are_of_all_classes(tmp_path):
    for name in "abc":
        write_images(tmp_path / name, *[(4, 4)] * 20)
    images = find_images(str(tmp_path), 0.5)
    assert {label for _, label in images.test[:10]} == {label for _, label in images.train[:10]} == {0, 1, 2}


def test_a_class_is_trained_on_if_it_is_tested(tmp_path):
    """The draw alone would put some of the classes of one image among the test images only."""
    for k in range(30):
        write_images(tmp_path / f"{k:02}", *[(4, 4)] * (1 if k < 20 else 5))
    train, test = classes(tmp_path, 0.3)
    assert len(train) == 30 and 0 < sum(test.values()) <= 21 and sum(train.values()) + sum(test.values()) == 70
    write_images(tmp_path / "alone" / "a", (4, 4))
    write_images(tmp_path / "alone" / "b", (4, 4))
    train, test = classes(tmp_path / "alone", 0.5)
    assert len(train) == len(test) == 1  # there must be something to test


def test_names_of_classes(tmp_path):
    write_images(tmp_path, *[(4, 4)] * 3)
    assert find_images(str(tmp_path), 0.1).classes == ["."]
    write_images(tmp_path / "cat", (4, 4))
    assert find_images(str(tmp_path), 0.1).classes == [".", "cat"]
    for name in ("photos/all/cat", "photos/all/dog/old"):
        write_images(tmp_path / "unpacked" / name, *[(4, 4)] * 3)
    assert find_images(str(tmp_path / "unpacked"), 0.1).classes == ["cat", "dog/old"]
    assert find_images(str(tmp_path / "unpacked/photos/all/dog"), 0.1).classes == ["old"]


@pytest.mark.parametrize(
    ("folders", "train", "test"),
    [
        ("train test", "train", "test"),
        ("Train Val", "Train", "Val"),
        ("training validation", "training", "validation"),
        ("train valid other", "train", "valid"),
        ("train val test", "train", "test"),
        ("set/train set/test", "set/train", "set/test"),
    ],
)
def test_train_beside_test_is_the_split(tmp_path, folders, train, test):
    for name in folders.split():
        write_images(tmp_path / name / "cat", *[(4, 4)] * 3)
        write_images(tmp_path / name / "dog", *[(4, 4)] * 2)
    images = find_images(str(tmp_path), 0.1)
    assert classes(tmp_path) == [{"cat": 3, "dog": 2}] * 2
    assert {name.rpartition("/")[0].rpartition("/")[0] for name, _ in images.train} == {train}
    assert {name.rpartition("/")[0].rpartition("/")[0] for name, _ in images.test} == {test}
    left = 5 * len(folders.split()) - 10
    assert images.passed_over == ({f"images beside train and {os.path.basename(test).lower()}": left} if left else {})


def test_a_split_without_classes_or_with_one_too_many(tmp_path):
    write_images(tmp_path / "train", *[(4, 4)] * 3)
    write_images(tmp_path / "test", (4, 4))
    assert classes(tmp_path) == [{".": 3}, {".": 1}]
    write_images(tmp_path / "test/cat", (4, 4))
    with pytest.raises(UserError, match="test has the class cat, of which train has no image"):
        find_images(str(tmp_path), 0.1)


def test_a_class_called_train_is_no_split(tmp_path):
    for name in ("train", "bus"):
        write_images(tmp_path / name, *[(4, 4)] * 5)
    assert classes(tmp_path, 0.2) == [{"train": 4, "bus": 4}, {"train": 1, "bus": 1}]


# Which files


def test_links_are_followed_and_loops_end(tmp_path):
    write_images(tmp_path / "elsewhere", *[(4, 4)] * 3)
    write_images(tmp_path / "here/dog", *[(4, 4)] * 2)
    (tmp_path / "here/cat").symlink_to("../elsewhere")
    (tmp_path / "here/dog/again").symlink_to("..")
    (tmp_path / "here/dog/twice").symlink_to("../../elsewhere")
    (tmp_path / "here/dog/one.png").symlink_to("../../elsewhere/000.png")
    images = find_images(str(tmp_path / "here"), 0.1)
    assert images.classes == ["cat", "dog"] and len(images.train + images.test) == 6
    assert images.passed_over == {"links to folders that are read anyway": 2}
    assert [name for name, *_ in listing(tmp_path / "here")] == [
        *(f"cat/00{k}.png" for k in range(3)),
        "dog/000.png",
        "dog/001.png",
        "dog/one.png",
    ]


def test_hidden_names_are_passed_over_and_other_files_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    write_images(tmp_path, *[(4, 4)] * 3)
    write_images(tmp_path / "x", *[(4, 4)] * 3, ending="jfif")
    for name in ("__MACOSX/._x.png", ".git/x.png", "x/.y.png", "a.HEIC", "x/b.heic", "labels.txt", "LICENSE"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert sum(map(len, source(tmp_path)[0].args)) + sum(map(len, source(tmp_path)[1].args)) == 6
    assert caplog.messages[0] == f"passed over in {tmp_path}: 2 .heic, 1 without an ending, 1 .txt"


def test_folders_without_images(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="absent: there is no "):
        find_images(str(tmp_path / "absent"), 0.1)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file: must be a folder"):
        find_images(str(tmp_path / "file"), 0.1)
    (tmp_path / "file").unlink()
    with pytest.raises(UserError, match=r"no images in .*: it must hold files that end in .*\.jpg, .*\.webp$"):
        find_images(str(tmp_path), 0.1)
    (tmp_path / "a.heic").touch()
    with pytest.raises(UserError, match=r"no images in .*\.webp, and not only 1 \.heic$"):
        find_images(str(tmp_path), 0.1)
    write_images(tmp_path, (4, 4))
    with pytest.raises(UserError, match="holds 1 images: too few to set 1 aside"):
        find_images(str(tmp_path), 0.1)

    def closed(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(UserError, match=rf"^{tmp_path} cannot be read: Permission denied"):
        find_images(str(tmp_path), 0.1)


def test_a_listing_tells_changes(tmp_path):
    write_images(tmp_path / "cat", *[(4, 4)] * 2)
    (tmp_path / "cat/lost.png").symlink_to("nowhere")
    found = [listing(tmp_path)]
    os.utime(tmp_path / "cat/000.png", (1, 1))
    found.append(listing(tmp_path))
    (tmp_path / "cat/001.png").rename(tmp_path / "cat/002.png")
    found.append(listing(tmp_path))
    assert len({str(each) for each in found}) == 3 and listing(tmp_path) == found[-1]
    (file,) = listing(tmp_path / "cat/000.png")
    assert file[1:] == found[-1][0][1:] == ((tmp_path / "cat/000.png").stat().st_size, 10**9)


# Reading


def test_images_of_several_sizes(tmp_path):
    write_images(tmp_path, *[(40, 40)] * 3, (90, 35))
    with pytest.raises(UserError) as refused:
        read_folder(tmp_path)
    sizes = r"003\.png is 90 x 35 pixels, .*png is 40 x 40: all images must have one size; data\.image_size=32 resizes"
    assert refused.match(sizes) or refused.match(r"png is 40 x 40 pixels, .*003\.png is 90 x 35.*image_size=32 resizes")
    write_images(tmp_path / "small", (5, 4), (6, 4), (7, 4))
    with pytest.raises(UserError, match=r"data\.image_size=8 resizes"):
        read_folder(tmp_path / "small")
    shutil.rmtree(tmp_path / "small")
    (train, _), (test, _), _, notes = read_folder(tmp_path, image_size=32)
    assert train.shape == (3, 32, 32, 3) and test.shape == (1, 32, 32, 3) and notes == {"resized or cropped": 4}


def test_an_unreadable_file_stops_or_is_left_out(tmp_path, caplog):
    write_images(tmp_path, *[(4, 4)] * 10)
    bad = [f"00{k}.png" for k in range(1, 7)]
    for name in bad:
        (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(
        UserError, match=r"00\d\.png cannot be read.*; data\.skip_unreadable=true leaves such files out$"
    ):
        read_folder(tmp_path)
    (train, labels), (test, _), _, notes = read_folder(tmp_path, skip_unreadable=True, test_fraction=0.4)
    assert len(train) == len(labels) and len(train) + len(test) == 4 and notes == {"unreadable and left out": 6}
    assert len(caplog.messages) == reading.NAMED and all("left out: " in line for line in caplog.messages)
    keys = {"image_size": None, "channels": 3, "background": "white"}
    assert folder_form(str(tmp_path), 0.1, True, **keys) == ([4, 4, 3], ["."])
    for file in tmp_path.iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"no image of .* can be read"):
        folder_form(str(tmp_path), 0.1, True, **keys)
    with pytest.raises(UserError, match="no image for training can be read"):
        write_prepared(tmp_path / "out", source(tmp_path, skip_unreadable=True), {})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("many", [10, 1000])
def test_the_number_of_processes_or_threads_changes_nothing(tmp_path, monkeypatch, many):
    monkeypatch.setattr(reading, "MANY", many)
    for k, name in enumerate("abc"):
        write_images(tmp_path / name, *[(4 + k, 6)] * 9)
    (tmp_path / "c/x.png").write_bytes(b"no image")
    found = [read_folder(tmp_path, threads, image_size=4, skip_unreadable=True) for threads in (1, 3)]
    for one, more in zip(found[0][:2], found[1][:2], strict=True):
        assert all(map(np.array_equal, one, more))
    assert found[0][2:] == found[1][2:]
    assert found[0][3] == {"resized or cropped": 27, "unreadable and left out": 1}
    with pytest.raises(UserError, match=r"x.png cannot be read as an image: .*; data.skip_unreadable=true"):
        read_folder(tmp_path, 3, image_size=4)
    assert not multiprocessing.active_children()


def test_a_process_that_is_killed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MANY", 10)
    monkeypatch.setattr(reading, "CHUNK", 1)
    write_images(tmp_path, *[(4, 4)] * 40)
    with pytest.raises(UserError, match=r"a process that read .* was killed"):
        for _ in source(tmp_path)[0](2, Counter()):
            multiprocessing.active_children()[0].kill()


def test_no_more_images_are_in_the_memory_than_the_threads_need(tmp_path, monkeypatch):
    write_images(tmp_path, *[(4, 4)] * 90)
    begun, read = [], reading.read_picture
    monkeypatch.setattr(reading, "read_picture", lambda *arguments: begun.append(1) or read(*arguments))
    seen = 0
    for images, _ in source(tmp_path)[0](3, Counter()):
        seen += len(images)
        assert len(begun) <= seen + reading.CHUNK * 2 * 3
    assert seen == 81


def test_a_stop_leaves_nothing_half_prepared(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "CHUNK", 1)
    write_images(tmp_path / "images", *[(4, 4)] * 20)
    polls = iter(range(15))

    def poll():
        if next(polls, None) is None:
            raise Stopped("stopped")

    monkeypatch.setattr(reading, "poll", poll)
    with pytest.raises(Stopped):
        write_prepared(tmp_path / "out", source(tmp_path / "images"), {}, threads=2)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
    monkeypatch.undo()
    assert len(write_prepared(tmp_path / "out", source(tmp_path / "images"), {}, threads=2).train.images) == 18


def test_grey_images_in_one_channel(tmp_path):
    for k in range(4):
        Image.new("L", (4, 4), 9 * k).save(tmp_path / f"{k}.png")
    (train, _), _, _, notes = read_folder(tmp_path, channels=1)
    assert train.shape == (3, 4, 4, 1) and notes == {"grey": 4}
