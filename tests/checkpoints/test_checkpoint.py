"""Atomic, verified, rotated checkpoints, and every kind of damage to them; the fingerprint."""

import zipfile

import pytest
import torch
from helpers.training import Recorder, make, weights

from modeling.checkpoints.checkpoint import checkpoints, read_checkpoint, restore_newest, save_checkpoint
from modeling.checkpoints.fingerprint import PACKAGE, code_hash, fingerprint, imported_files
from modeling.reliability.errors import out_of_memory


def state(step):
    return {"step": step, "weights": {"w": torch.full((1000,), float(step))}, "note": "x", "rates": [0.1, 0.2]}


def steps(folder):
    return [int(path.stem[5:]) for path in checkpoints(folder)]


def test_round_trip_and_rotation(tmp_path):
    own = [tmp_path / "step-best.pt", tmp_path / "step-000000001-copy.pt"]  # a user's, and no checkpoints
    for path in own:
        path.touch()
    restored = []
    assert not restore_newest(tmp_path, restored.append)
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, state(step))
    assert steps(tmp_path) == [2, 10] and {*tmp_path.iterdir()} == {*checkpoints(tmp_path), *own}
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


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch, caplog):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {})
    monkeypatch.setattr("pathlib.Path.unlink", lambda *_: (_ for _ in ()).throw(PermissionError("not yours")))
    save_checkpoint(tmp_path, 3, {})
    assert "the old checkpoint" in caplog.text and steps(tmp_path) == [1, 2, 3]


# Damage


def flip_a_bit(path):
    """Within the weights, which torch.load alone would not notice."""
    content = bytearray(path.read_bytes())
    weight = read_checkpoint(path)["ema"]["model"]["network.time_mlp.0.weight"]
    content[content.find(weight.numpy().tobytes())] ^= 1
    path.write_bytes(content)


def another_network(path):
    saved = read_checkpoint(path)
    saved["model"].popitem()
    torch.save(saved, path)


def compressed(path):
    """It would be unpacked to 50 MB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))


def unreadable(path):
    """The system refuses to open it."""
    path.unlink()
    path.symlink_to(path.name)


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
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "not a zip file"),
        (lambda path: path.write_bytes(b""), "not a zip file"),
        (lambda path: torch.save(read_checkpoint(path) | {"version": 999}, path), "its version is 999, not 3"),
        (lambda path: torch.save([1, 2], path), "no attribute"),
        (flip_a_bit, "checksum of"),
        (another_network, "Missing key"),
        (compressed, "it is compressed"),
        (unreadable, "symbolic links"),
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
    with caplog.at_level("WARNING"):
        trainer.run()
    (message,) = caplog.messages
    assert f"checkpoint {newest} is damaged (" in message and reason in message
    assert recorder.starts == [8] and torch.equal(weights(trainer), expected)


def test_too_little_memory_is_no_damage(tmp_path, monkeypatch, caplog):
    save_checkpoint(tmp_path, 1, state(1))

    def allocate(*_, **__):
        torch.empty(2**60, dtype=torch.uint8)  # the allocator raises a RuntimeError

    monkeypatch.setattr(torch, "load", allocate)
    with pytest.raises(RuntimeError, match="allocate") as raised:
        restore_newest(tmp_path, lambda _: None)
    assert out_of_memory(raised.value) and "damaged" not in caplog.text


# Fingerprint


def test_fingerprint_is_stable_and_sensitive():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert len(fingerprint({})) == 16


def test_imported_files_follow_the_import_graph():
    names = {str(path.relative_to(PACKAGE)) for path in imported_files("data.sources")}
    assert names == {
        "__init__.py",
        *(f"data/{name}.py" for name in ("__init__", "folder", "pictures", "published", "reading", "shapes")),
        *(f"data/{name}.py" for name in ("sources", "splits")),
        *(f"reliability/{name}.py" for name in ("__init__", "errors", "files", "signals", "terminal")),
    }
    assert code_hash("data.sources") != code_hash("data.shapes")


def test_import_cycles_end(tmp_path):
    package = tmp_path / "modeling"
    package.mkdir()
    (package / "a.py").write_text("from modeling.b import x")
    (package / "b.py").write_text("from modeling.a import y")
    assert [path.stem for path in imported_files("a", package=package)] == ["a", "b"]
