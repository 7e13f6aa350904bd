"""Atomic, verified, rotated checkpoints; the fingerprint; published models."""

import logging
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from modeling.checkpoints.checkpoint import checkpoints, read_checkpoint, restore_newest, save_checkpoint
from modeling.checkpoints.fingerprint import PACKAGE, code_hash, fingerprint, imported_files
from modeling.checkpoints.model_file import load_model, save_model
from modeling.reliability.errors import UserError, out_of_memory
from modeling.reliability.files import replacing, write_atomic


def state(step):
    return {"step": step, "weights": {"w": torch.full((1000,), float(step))}, "note": "x", "rates": [0.1, 0.2]}


def newest(folder):
    found = []
    restore_newest(folder, found.append)
    return found[0] if found else None


def test_round_trip_and_rotation(tmp_path):
    assert newest(tmp_path) is None
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, state(step))
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000000002.pt", "step-000000010.pt"]
    assert len(list(tmp_path.iterdir())) == 2
    loaded = newest(tmp_path)
    assert loaded["step"] == 10 and torch.equal(loaded["weights"]["w"], state(10)["weights"]["w"])


def test_a_later_one_that_was_passed_over_is_none_of_the_two_that_are_kept(tmp_path):
    for step in (750, 1000):
        save_checkpoint(tmp_path, step, state(step))
    truncate(tmp_path / "step-000001000.pt")
    save_checkpoint(tmp_path, 800, state(800))
    assert [int(p.stem[5:]) for p in checkpoints(tmp_path)] == [750, 800, 1000]
    save_checkpoint(tmp_path, 1000, state(1000))
    assert [int(p.stem[5:]) for p in checkpoints(tmp_path)] == [800, 1000]


def test_a_users_own_files_are_no_checkpoints(tmp_path):
    own = [tmp_path / "step-best.pt", tmp_path / "step-000000001-copy.pt"]
    for path in own:
        path.touch()
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, state(step))
    assert len(checkpoints(tmp_path)) == 2 and all(path.exists() for path in own)


def test_too_little_memory_is_no_damage(tmp_path, caplog):
    save_checkpoint(tmp_path, 1, state(1))
    big = torch.empty(1, dtype=torch.uint8)

    def restore(_):
        big.new_empty(2**60)  # what the allocator says is a RuntimeError

    with pytest.raises(RuntimeError, match="allocate") as raised:
        restore_newest(tmp_path, restore)
    assert out_of_memory(raised.value) and "damaged" not in caplog.text
    with pytest.raises(RuntimeError, match="allocate"), replacing(tmp_path / "x"):
        restore(None)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[content.find(torch.full((8,), 2.0).numpy().tobytes())] ^= 1  # within the weights
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def malicious(path):
    class Run:
        def __reduce__(self):
            return os.system, (f"touch {path.parent / 'hacked'}",)

    torch.save({"x": Run()}, path, pickle_module=pickle)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, malicious])
def test_a_damaged_checkpoint_is_skipped(tmp_path, damage, caplog):
    save_checkpoint(tmp_path, 1, state(1))
    damage(save_checkpoint(tmp_path, 2, state(2)))
    with caplog.at_level(logging.WARNING):
        assert newest(tmp_path)["step"] == 1
    assert "step-000000002.pt is damaged" in caplog.text
    assert not (tmp_path / "hacked").exists()


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"step-000000001.pt cannot be written"):
        save_checkpoint(tmp_path / "file", 1, state(1))
    with pytest.raises(UserError, match="cannot be written"):
        write_atomic(tmp_path / "file" / "x", b"")


def test_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "target"
    target.mkdir()  # a folder cannot be replaced by a file
    with pytest.raises(UserError, match="cannot be written"):
        write_atomic(target, b"new")
    assert list(tmp_path.iterdir()) == [target]


def test_import_cycles_end(tmp_path):
    package = tmp_path / "modeling"
    package.mkdir()
    (package / "a.py").write_text("from modeling.b import x")
    (package / "b.py").write_text("from modeling.a import y")
    assert [p.stem for p in imported_files("a", package)] == ["a", "b"]


def test_fingerprint_is_stable_and_sensitive():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert len(fingerprint({})) == 16


def test_imported_files_follow_the_import_graph():
    names = {p.stem for p in imported_files("sampling")}
    assert names == {"sampling", "diffusion", "errors", "likelihood", "schedule", "signals"}
    assert PACKAGE / "shapes.py" in imported_files("data")
    assert code_hash("sampling") != code_hash("diffusion")


def test_model_round_trip(tmp_path):
    path = tmp_path / "models" / "model.safetensors"
    save_model(path, {"w": torch.arange(6.0).reshape(2, 3).T}, {"model": {"name": "tiny"}})
    tensors, config = load_model(path)
    assert torch.equal(tensors["w"], torch.arange(6.0).reshape(2, 3).T) and config["model"] == {"name": "tiny"}
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="is damaged: its weights are not those that were saved"):
        load_model(path)


def test_bad_model_files(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(UserError, match="no model in"):
        load_model(path)
    path.write_bytes(b"garbage")
    with pytest.raises(UserError, match="is damaged"):
        load_model(path)
    save_file({"w": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="carries no configuration"):
        load_model(path)


def test_an_old_checkpoint_that_stays_is_no_failure_and_no_memory_is_no_damage(tmp_path, monkeypatch, caplog):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {})
    monkeypatch.setattr("pathlib.Path.unlink", lambda *_: (_ for _ in ()).throw(PermissionError("not yours")))
    save_checkpoint(tmp_path, 3, {})
    assert "the old checkpoint" in caplog.text and len(checkpoints(tmp_path)) == 3

    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(MemoryError):
        read_checkpoint(tmp_path / "step-000000003.pt")
