"""The W&B run: its fallbacks, and that training goes on without it."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import wandb
from helpers.configs import group
from helpers.pipeline import ROOT

from modeling.inference.images import save_png
from modeling.reliability.errors import ConfigError
from modeling.reporting.wandb_run import WandbRun

ONLINE = group("wandb", "default", mode="online", timeout=1.0)
OFFLINE = group("wandb", "default", mode="offline", timeout=1.0)


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """No key, and no server that answers."""
    for key in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


class Run:
    """In place of W&B's own run, which has the first 5 steps on the server or writes to a folder."""

    step, url = 5, "https://wandb.ai/x"

    def __init__(self, folder=None):
        self.logged, self.offline, self.settings = {}, folder is not None, SimpleNamespace(sync_dir=str(folder))
        if folder is not None:
            folder.mkdir()
            self.id = folder.name.split("-")[-1]

    def log(self, values, step):
        self.logged[step] = values

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Starts a run in place of W&B's own."""

    def start(run, settings=OFFLINE):
        monkeypatch.setattr(wandb, "login", lambda **_: True)
        monkeypatch.setattr(wandb, "init", lambda **_: run)
        return WandbRun(settings, {}, "x", None, tmp_path)

    return start


@pytest.mark.parametrize(
    ("key", "reason"),
    [(None, "no API key"), ("too-short", "WANDB_API_KEY invalid"), ("0" * 40, "")],
)
def test_online_without_a_key_or_a_server_is_offline_and_says_so(key, reason, monkeypatch, tmp_path, caplog):
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    caplog.set_level("INFO")
    save_png(tmp_path / "x.png", torch.zeros(2, 2, 1, dtype=torch.uint8))
    run = WandbRun(ONLINE, {"a": 1}, "id", "name", tmp_path)
    run.log({"x": 1.0, "picture": tmp_path / "x.png"}, 1)
    run.artifact("picture", "picture", tmp_path / "x.png")
    run.finish()
    assert f"W&B: no connection ({reason}" in caplog.text and "): this run is offline" in caplog.text
    (folder,) = (tmp_path / "wandb").glob("offline-run-*-id")
    assert f"upload with `wandb sync {folder}`" in caplog.text and "W&B failed" not in caplog.text
    assert list(folder.glob("*.wandb")) and list(folder.rglob("picture_*.png"))


def test_only_steps_that_the_server_does_not_have_are_logged(start, caplog):
    server = Run()
    caplog.set_level("INFO")
    run = start(server, ONLINE)
    with run.logging_again():
        for step in (3, 5, 6):
            run.log({"x": step}, step)
    run.finish(75)
    assert server.logged == {5: {"x": 5}, 6: {"x": 6}} and server.exit_code == 75
    assert caplog.messages == [f"W&B: {server.url}"]


def test_earlier_offline_folders_of_the_run_go_once_all_is_logged_again(start, tmp_path):
    folders = [tmp_path / f"offline-run-{k}" for k in ("1-x", "2-x", "3-x", "4-other", "5-x")]
    with start(Run(folders[0])).logging_again():
        pass
    with pytest.raises(KeyboardInterrupt), start(Run(folders[1])).logging_again():
        raise KeyboardInterrupt  # it ends while it logs again
    with start(Run(folders[3])).logging_again():
        pass
    start(Run(folders[2]))  # of an evaluation, which nothing repeats
    failed = start(Run(tmp_path / "offline-run-0-x"))
    with failed.logging_again():
        failed.run = None
    assert all(folder.exists() for folder in folders[:4])
    with start(Run(folders[4])).logging_again():
        assert folders[0].exists()
    assert [folder.exists() for folder in folders] == [False, False, True, True, True]


def test_the_environments_mode_overrides(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run = WandbRun(OFFLINE, {}, "id", None, tmp_path)
    run.log({"x": 1.0, "picture": tmp_path / "absent.png"}, 1)
    run.artifact("x", "config", tmp_path)
    run.finish()
    assert not (tmp_path / "wandb").exists()
    monkeypatch.setenv("WANDB_MODE", "never")
    with pytest.raises(ConfigError, match="WANDB_MODE=never"):
        WandbRun(OFFLINE, {}, "id", None, tmp_path)


def test_training_goes_on_where_wandb_starts_neither_online_nor_offline(tmp_path, monkeypatch, caplog):
    def broken(mode, **_):
        raise RuntimeError(f"no service for {mode}")

    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "init", broken)
    run = WandbRun(ONLINE, {}, "x", None, tmp_path)
    run.log({"x": 1.0}, 1)
    run.finish()
    assert run.run is None and "no connection (no service for online): this run is offline" in caplog.text
    assert "W&B failed (no service for offline): no more of this run is tracked there" in caplog.text


def test_training_goes_on_when_a_call_fails(start, tmp_path, caplog):
    run = start(Run())
    run.log({"picture": tmp_path / "absent.png"}, 9)
    assert "W&B failed (" in caplog.text and run.run is None
    run.log({"x": 1.0}, 10)


TAKEN = """
import sys; from pathlib import Path
from modeling.reporting.wandb_run import WandbRun
from modeling.settings import WandbConfig
run = WandbRun(WandbConfig(mode="offline", project="p", entity=None, timeout=2.0), {}, "taken", None, Path(sys.argv[1]))
run.log({"x": 1.0}, 1)
print(run.run)
run.finish()
"""


def test_training_goes_on_when_wandb_refuses_the_run(tmp_path):
    """Its service still has the run of a process that was killed a moment ago."""
    first = WandbRun(OFFLINE, {}, "taken", None, tmp_path)
    command = [sys.executable, "-c", TAKEN, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    first.finish()
    assert done.returncode == 0 and done.stdout == "None\n", done.stderr
    assert "is in use): no more of this run is tracked there" in done.stderr
