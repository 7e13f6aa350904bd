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
from helpers.wandb_server import wandb_server

from modeling.inference.images import save_png
from modeling.reliability.errors import ConfigError
from modeling.reporting import wandb_run
from modeling.reporting.wandb_run import Picture, WandbRun, about_experiment, experiment

ONLINE = group("wandb", "default", mode="online", timeout=1.0)
OFFLINE = group("wandb", "default", mode="offline", timeout=1.0)


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """No key, no server that answers, and no experiment; the home cannot be written (root too is refused a file)."""
    for key in [*os.environ]:
        if key.startswith(("WANDB_", "DVC_")) and key != "WANDB_SERVICE":
            monkeypatch.delenv(key)
    for key in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):  # put back what a run sets
        monkeypatch.setenv(key, "")
        monkeypatch.delenv(key)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    (tmp_path / "home").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


class Run:
    """In place of W&B's own run, which has the first 5 steps on the server or writes to a folder."""

    step, url = 5, "https://wandb.ai/x"

    def __init__(self, folder=None):
        self.logged, self.offline, self.settings = {}, folder is not None, SimpleNamespace(sync_dir=str(folder))
        self.summary, self.metrics = {}, {}
        if folder is not None:
            folder.mkdir(parents=True)

    def log(self, values, step):
        self.logged.setdefault(step, {}).update(values)

    def define_metric(self, name, **options):
        self.metrics[name] = options

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def start(monkeypatch):
    """Starts a run in place of W&B's own, which keeps what it was told as `given`."""

    def start(run, settings=OFFLINE, run_id="x", **about):
        monkeypatch.setattr(wandb, "login", lambda **_: True)
        monkeypatch.setattr(wandb, "init", lambda **given: setattr(run, "given", given) or run)
        return WandbRun(settings, {}, run_id, about)

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
    monkeypatch.chdir(tmp_path)
    run = WandbRun(ONLINE, {"a": 1}, "id", {"name": "name"})
    run.log({"x": 1.0, "picture": Picture(tmp_path / "x.png", "what it shows")}, 1)
    run.summarize({"evaluate/loss": 0.5})
    run.finish()
    assert f"W&B: no connection ({reason}" in caplog.text and "): this run is offline" in caplog.text
    (folder,) = (tmp_path / "wandb").glob("offline-run-*-id")
    assert caplog.messages[-1] == f"W&B (offline): wandb leet wandb/{folder.name}" and "W&B failed" not in caplog.text
    assert list(folder.glob("*.wandb")) and list(folder.rglob("picture_*.png"))
    assert list((tmp_path / "wandb/cache").iterdir()), "not in the home folder"


def test_only_steps_that_the_server_does_not_have_are_logged(start, caplog):
    server = Run()
    caplog.set_level("INFO")
    run = start(server, ONLINE)
    with run.logging_again():
        for step in (3, 5, 6):
            run.log({"x": step}, step)
    run.finish(75)
    assert server.logged == {k: {"x": k} for k in (5, 6)} and server.exit_code == 75
    assert caplog.messages == [f"W&B: {server.url}"]


def test_earlier_offline_folders_of_the_run_go_once_all_is_logged_again(start, tmp_path):
    wandb_folder = tmp_path / "wandb"
    folders = [wandb_folder / f"offline-run-{k}" for k in ("1-x", "1-x-1", "3-x", "4-other", "5-x")]
    with start(Run(folders[0])).logging_again():
        pass
    with pytest.raises(KeyboardInterrupt), start(Run(folders[1])).logging_again():
        raise KeyboardInterrupt  # it ends while it logs again
    with start(Run(folders[3]), run_id="other").logging_again():
        pass
    start(Run(folders[2]))  # of an evaluation, which nothing repeats
    failed = start(Run(wandb_folder / "offline-run-0-x"))
    with failed.logging_again():
        failed.run = None
    assert all(folder.exists() for folder in folders[:4])
    with start(Run(folders[4])).logging_again():
        assert folders[0].exists()
    assert [folder.exists() for folder in folders] == [False, False, True, True, True]


def test_the_environments_mode_overrides(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run = WandbRun(OFFLINE, {}, "id")
    run.log({"x": 1.0, "picture": Picture(tmp_path / "absent.png", "")}, 1)
    run.summarize({"x": 1.0})
    with run.logging_again():
        run.finish()
    assert not (tmp_path / "wandb").exists()
    monkeypatch.setenv("WANDB_MODE", "never")
    with pytest.raises(ConfigError, match="WANDB_MODE=never"):
        WandbRun(OFFLINE, {}, "id")


def test_training_goes_on_where_wandb_starts_neither_online_nor_offline(tmp_path, monkeypatch, caplog):
    def broken(mode, **_):
        raise RuntimeError(f"no service for {mode}")

    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "init", broken)
    run = WandbRun(ONLINE, {}, "x")
    run.log({"x": 1.0}, 1)
    run.finish()
    assert run.run is None and "no connection (no service for online): this run is offline" in caplog.text
    assert "W&B failed (no service for offline): no more of this run is tracked there" in caplog.text


def test_training_goes_on_when_a_call_fails(start, tmp_path, caplog):
    server = Run()
    run = start(server, ONLINE)
    absent = Picture(tmp_path / "absent.png", "")
    for step in (8, 9):
        run.log({"x": 1.0, "picture": absent}, step)
    (warning,) = caplog.messages
    assert warning.startswith("W&B: picture of step 8 is missing there (")
    assert server.logged == {k: {"x": 1} for k in (8, 9)}, "the numbers go on"
    server.log = None
    run.log({"x": 1.0, "picture": absent}, 10)
    assert "W&B failed (" in caplog.messages[-1] and run.run is None and len(caplog.messages) == 2
    run.log({"x": 1.0}, 11)


TAKEN = """

from modeling.reporting import wandb_run
from modeling.reporting.wandb_run import Picture, WandbRun, about_experiment, experiment
from modeling.settings.groups import WandbConfig

run = WandbRun(WandbConfig(mode="offline", project="p", entity=None, timeout=2.0), {}, "taken")
run.log({"x": 1.0}, 1)
print(run.run)
run.finish()
"""


def test_training_goes_on_when_wandb_refuses_the_run():
    """Its service still has the run of a process that was killed a moment ago."""
    first = WandbRun(OFFLINE, {}, "taken")
    command = [sys.executable, "-c", TAKEN]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    first.finish()
    assert done.returncode == 0 and done.stdout == "None\n", done.stderr
    assert "is in use): no more of this run is tracked there" in done.stderr


def test_an_offline_run_asks_no_server():
    """Not at its end either, when W&B would send what it has noted about itself."""
    with wandb_server() as server:
        env = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
        env |= {"PYTHONPATH": str(ROOT), "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40}
        done = subprocess.run([sys.executable, "-c", TAKEN], capture_output=True, text=True, env=env)
        assert done.returncode == 0 and "Run" in done.stdout, done.stderr
        assert not server.asked


@pytest.mark.parametrize(
    "leftover",
    ["offline-run-1-x/run-x.wandb.synced", "offline-run-1-x/run-x.wandb.syncstate", f"run-1-x/{wandb_run.ONLINE}"],
)
def test_an_offline_run_never_goes_on_with_one_that_the_server_has(start, leftover, tmp_path, caplog):
    """A second part would repeat and renumber its rows; a new run is told as a whole, and the synced folder stays."""
    path = tmp_path / "wandb" / leftover
    path.parent.mkdir(parents=True)
    path.touch()
    (path.parent / wandb_run.MARK).touch()
    caplog.set_level("INFO")
    run = start(Run(tmp_path / "wandb/offline-run-2-y"))
    assert run.run_id != "x" and run.run.given["id"] == run.run_id and "W&B's server has a part of run x" in caplog.text
    server = Run(tmp_path / "wandb/run-2-x")
    server.offline = False
    online = start(server, ONLINE)
    with online.logging_again():
        pass
    assert online.run_id == "x" and online.first == 5 and path.exists() == leftover.startswith("offline")


def test_an_unsynced_folder_goes_once_all_is_logged_online(start, tmp_path):
    first = tmp_path / "wandb/offline-run-1-x"
    with start(Run(first)).logging_again():
        pass
    server = Run(tmp_path / "wandb/run-2-x")
    server.offline = False
    with start(server, ONLINE).logging_again():
        assert first.exists()
    assert not first.exists(), "else `wandb sync` would tell its rows again"


def test_wandbs_own_variables_override_what_is_configured(start, monkeypatch, tmp_path):
    about = {"name": "n", "group": "g", "job_type": "train", "tags": ["t"], "notes": "x"}
    given = start(Run(tmp_path / "a"), **about).run.given
    assert about.items() <= given.items() and given["project"] == OFFLINE.project and given["dir"] == str(tmp_path)
    for name in wandb_run.VARIABLES.values():
        monkeypatch.setenv(name, "mine")
    assert not start(Run(tmp_path / "b"), **about).run.given.keys() & wandb_run.VARIABLES.keys()


def test_the_experiment_is_dvcs_or_else_the_process(monkeypatch):
    by_hand = experiment()
    assert by_hand.startswith("by hand ") and experiment() == by_hand and about_experiment() == {}
    monkeypatch.setenv("DVC_STAGE", "train")
    assert experiment() == "" and about_experiment() == {}
    monkeypatch.setenv("DVC_EXP_NAME", "lr-12")
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "0123456789")
    assert experiment() == "lr-12"
    assert about_experiment() == {"name": "lr-12", "group": "lr", "notes": "DVC experiment lr-12 of commit 0123456"}
    monkeypatch.setenv("DVC_EXP_NAME", "dusky-teal")
    assert about_experiment()["group"] == "0123456"


def test_a_real_run_in_the_folder_and_project_of_the_environment(monkeypatch, tmp_path):
    chosen = {"WANDB_DIR": str(tmp_path), "WANDB_PROJECT": "p", "WANDB_NAME": "n", "WANDB_RUN_GROUP": "g"}
    chosen |= {"WANDB_JOB_TYPE": "j", "WANDB_TAGS": "a,b", "WANDB_NOTES": "o"}
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "root"))
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()  # what W&B has read from the environment
    run = WandbRun(OFFLINE, {}, "z", {"name": "x", "group": "x", "job_type": "x", "tags": ["x"], "notes": "x"})
    r = run.run
    found = (r.project, r.name, r.group, r.job_type, r.tags, r.notes)
    assert found == ("p", "n", "g", "j", ("a", "b"), "o") and run.folder.parent == tmp_path / "wandb"
    run.finish()
    wandb.teardown()


def test_what_was_synced_and_goes_on_is_right_on_the_server(monkeypatch, tmp_path):
    """W&B's real client against a stand-in server: offline, synced, continued offline, synced, continued online."""
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        wandb.teardown()  # what W&B has read from the environment

        def train(settings, run_id, steps):
            """What a process tells: all of the CSV, then its own steps."""
            run = WandbRun(settings, {}, run_id)
            with run.logging_again():
                for step in range(1, steps + 1):
                    run.log({"x": 10 * step}, step)
            run.finish()
            return run.run_id

        def sync():
            command = [sys.executable, "-m", "wandb", "sync", "--yes"]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stdout + done.stderr

        def told(run_id):
            return [(row["_step"], row["x"]) for row in server.history(run_id)]

        def curve(steps):
            return [(step, 10 * step) for step in range(1, steps + 1)]

        first = train(OFFLINE, "first", 3)
        assert train(OFFLINE, "first", 4) == first, "nothing was synced yet"
        sync()
        assert told(first) == curve(4)
        second = train(OFFLINE, first, 5)
        sync()
        assert told(first) == curve(4) and told(second) == curve(5) and second != first
        online = group("wandb", "default", mode="online", timeout=20.0)
        assert train(online, second, 7) == second
        assert told(second) == curve(7)
    wandb.teardown()
