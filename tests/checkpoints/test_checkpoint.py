"""Atomic, verified, rotated checkpoints, and every kind of damage to them; the fingerprint."""

import logging
import os
import pickle
import zipfile

import pytest
import torch
from helpers.training import Recorder, make, weights

from modeling.checkpoints.checkpoint import Damaged, checkpoints, read_checkpoint, restore_newest, save_checkpoint
from modeling.checkpoints.fingerprint import PACKAGE, code_hash, fingerprint, imported_files
from modeling.reliability.errors import UserError, out_of_memory


def state(step):
    return {"step": step, "weights": {"w": torch.full((1000,), float(step))}, "note": "x", "rates": [0.1, 0.2]}


def steps(folder):
    return [int(path.stem[5:]) for path in checkpoints(folder)]


def test_round_trip_and_rotation(tmp_path):
    restored = []
    assert not restore_newest(tmp_path, restored.append)
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, state(step))
    assert steps(tmp_path) == [2, 10] and len(list(tmp_path.iterdir())) == 2
    assert restore_newest(tmp_path, restored.append)
    (found,) = restored
    assert found.pop("version") and torch.equal(found.pop("weights")["w"], state(10)["weights"]["w"])
    assert found == {"step": 10, "note": "x", "rates": [0.1, 0.2]}


def test_a_later_checkpoint_that_was_skipped_is_not_one_of_the_two_that_are_kept(tmp_path):
    for step in (750, 1000):
        save_checkpoint(tmp_path, step, state(step))
    save_checkpoint(tmp_path, 800, state(800))
    assert steps(tmp_path) == [750, 800, 1000]
    save_checkpoint(tmp_path, 1000, state(1000))
    assert steps(tmp_path) == [800, 1000]


def test_a_users_own_files_are_no_checkpoints(tmp_path):
    own = [tmp_path / "step-best.pt", tmp_path / "step-000000001-copy.pt"]
    for path in own:
        path.touch()
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, state(step))
    assert steps(tmp_path) == [2, 3] and all(path.exists() for path in own)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"step-000000001.pt cannot be written"):
        save_checkpoint(tmp_path / "file", 1, state(1))


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch, caplog):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {})
    monkeypatch.setattr("pathlib.Path.unlink", lambda *_: (_ for _ in ()).throw(PermissionError("not yours")))
    save_checkpoint(tmp_path, 3, {})
    assert "the old checkpoint" in caplog.text and steps(tmp_path) == [1, 2, 3]


# Damage


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path):
    """Within the weights, which torch.load alone would not notice."""
    content = bytearray(path.read_bytes())
    weight = read_checkpoint(path)["ema"]["model"]["network.time_mlp.0.weight"]
    content[content.find(weight.numpy().tobytes())] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def another_version(path):
    torch.save(read_checkpoint(path) | {"version": 999}, path)


def another_network(path):
    saved = read_checkpoint(path)
    saved["model"].popitem()
    torch.save(saved, path)


def another_content(path):
    torch.save([1, 2], path)


def compressed(path):
    """It would be unpacked to 50 MB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))


def unreadable(path):
    """The system refuses to open it."""
    path.unlink()
    path.symlink_to(path.name)


def malicious(path):
    class Run:
        def __reduce__(self):
            return os.system, (f"touch {path.parent / 'hacked'}",)

    torch.save({"x": Run()}, path, pickle_module=pickle)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run with the checkpoints of steps 8 and 10, and its weights."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = make(folder, Recorder())
    trainer.run()
    return folder, weights(trainer)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "not a zip file"),
        (flip_a_bit, "checksum of"),
        (empty, "not a zip file"),
        (another_version, "its version is 999, not 3"),
        (another_network, "Missing key"),
        (another_content, "no attribute"),
        (compressed, "it is compressed"),
        (unreadable, "symbolic links"),
        (malicious, "Weights only load failed"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_and_the_result_is_the_same(trained, tmp_path, caplog, damage, reason):
    folder, expected = trained
    for path in checkpoints(folder):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    newest = tmp_path / "step-000000010.pt"
    damage(newest)
    recorder = Recorder()
    trainer = make(tmp_path, recorder)
    with caplog.at_level(logging.WARNING):
        trainer.run()
    (record,) = caplog.records
    assert f"checkpoint {newest} is damaged (" in record.getMessage() and reason in record.getMessage()
    assert recorder.starts == [8] and torch.equal(weights(trainer), expected)
    assert not (tmp_path / "hacked").exists()


def test_too_little_memory_is_no_damage(tmp_path, monkeypatch, caplog):
    save_checkpoint(tmp_path, 1, state(1))

    def allocate(*_, **__):
        torch.empty(2**60, dtype=torch.uint8)  # the allocator raises a RuntimeError

    with pytest.raises(RuntimeError, match="allocate") as raised:
        restore_newest(tmp_path, allocate)
    assert out_of_memory(raised.value) and "damaged" not in caplog.text
    monkeypatch.setattr(torch, "load", allocate)
    with pytest.raises(RuntimeError, match="allocate") as raised:
        read_checkpoint(tmp_path / "step-000000001.pt")
    assert not isinstance(raised.value, Damaged)


def test_if_all_checkpoints_are_damaged_training_does_not_start_from_step_0(tmp_path):
    def refuse(_):
        raise Damaged("of another network")

    save_checkpoint(tmp_path, 1, state(1))
    with pytest.raises(UserError, match=r"none of the 1 checkpoints .* trainer\.resume=never starts from step 0"):
        restore_newest(tmp_path, refuse)


# Fingerprint


def test_fingerprint_is_stable_and_sensitive():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert len(fingerprint({})) == 16


def test_imported_files_follow_the_import_graph():
    names = {str(path.relative_to(PACKAGE)) for path in imported_files("data.sources")}
    assert names == {
        *("__init__.py", "data/__init__.py", "data/shapes.py", "data/sources.py"),
        *("reliability/__init__.py", "reliability/errors.py", "reliability/files.py", "reliability/signals.py"),
    }
    assert code_hash("data.sources") != code_hash("data.shapes")


def test_import_cycles_end(tmp_path):
    package = tmp_path / "modeling"
    package.mkdir()
    (package / "a.py").write_text("from modeling.b import x")
    (package / "b.py").write_text("from modeling.a import y")
    assert [path.stem for path in imported_files("a", package=package)] == ["a", "b"]
