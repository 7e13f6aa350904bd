"""The list of runs/, and what may be removed from it."""

import dataclasses

import pytest
from helpers.configs import load
from helpers.pipeline import TINY
from omegaconf import OmegaConf

from modeling.checkpoints.checkpoint import save_checkpoint
from modeling.checkpoints.run_folder import read_notes, write_notes
from modeling.commands import runs
from modeling.reliability.files import locked


@pytest.fixture
def root(tmp_path, monkeypatch, capsys):
    """runs/ with three trainings of 4 steps and what is kept beside them."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    config = {key: value for key, value in dataclasses.asdict(load(*TINY)).items() if key != "named"}
    for name, step, published in (("begun", 2, False), ("done", 4, True), ("unpublished", 4, False)):
        folder = tmp_path / "runs" / name
        save_checkpoint(folder, step, {"x": [0] * 1000})
        OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
        if published:
            write_notes(folder, read_notes(folder) | {"weights_sha256": "x", "experiment": "[red]first"})
    for kept in ("data/shapes-1", "samples-for-fid/2", "reference"):
        (tmp_path / "runs" / kept).mkdir(parents=True)
    return tmp_path / "runs"


def printed(capsys, *arguments):
    try:
        runs.run(arguments)
        error = None
    except runs.UserError as raised:
        error = str(raised)
    return capsys.readouterr().out, error


def test_the_list(root, capsys):
    text, _ = printed(capsys)
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert "shapes tiny, adam 0.0002, 4 steps of 4" in lines["begun"] and "at step 2 of 4" in lines["begun"]
    assert "finished" in lines["done"] and "[red]first" in lines["done"] and " MB " in lines["done"]
    assert "at step 4 of 4" in lines["unpublished"] and "prepared data" in lines["data/shapes-1"]
    assert {"samples-for-fid/2", "reference"} <= lines.keys()
    assert runs.size(root / "begun") == sum(path.stat().st_size for path in (root / "begun").iterdir())


def test_what_is_removed(root, capsys):
    with locked(root / "begun/lock", wait=False):
        assert "running" in printed(capsys)[0]
        assert "begun is running: wait" in printed(capsys, "--remove", "begun", "finished")[1]
    assert "nothing is called x" in printed(capsys, "--remove", "done", "x")[1]
    assert (root / "begun").exists() and (root / "done").exists()
    done = root / "done"
    write_notes(done, read_notes(done) | {"finished": False})  # a longer training that has not published yet
    assert printed(capsys, "--remove", "finished") == ("nothing to remove\n", None)
    write_notes(done, read_notes(done) | {"finished": True})
    assert printed(capsys, "--remove", "finished")[0].startswith("removed done: shapes tiny")
    assert printed(capsys, "--remove", "finished") == ("nothing to remove\n", None)
    printed(capsys, "--remove", "begun", "data/shapes-1", "reference", "samples-for-fid/2", "unpublished")
    assert printed(capsys)[0] == f"nothing in {root} yet\n"


def test_the_command_line(root, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["runs", "--remove", "x"])
    with pytest.raises(SystemExit) as end:
        runs.main()
    assert end.value.code == 1 and capsys.readouterr().err.startswith("error: nothing is called x")
    monkeypatch.setattr("sys.argv", ["runs"])
    runs.main()
