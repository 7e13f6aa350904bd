"""The stage check: a mark for each thing that a job needs, real steps measured, nothing left behind."""

import shutil
import subprocess

import pytest
from dvc.utils.hydra import compose_and_dump
from helpers.configs import CONF, load
from helpers.pipeline import environment
from helpers.runs import RECIPE

from modeling.checkpoints.checkpoint import save_checkpoint
from modeling.checkpoints.run_folder import Run
from modeling.data.prepared import Prepared, prepare
from modeling.reliability.errors import UserError
from modeling.stages import check


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The repository's root; one step is measured."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(check, "MEASURE", (1, 0.0))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return tmp_path


@pytest.fixture
def findings(root, caplog):
    """Runs the stage and gives what it says about each thing, and its error."""

    def findings(*arguments):
        caplog.clear()
        caplog.set_level("INFO")
        error = None
        try:
            check.run(load(*RECIPE, *arguments), root)
        except UserError as raised:
            error = str(raised)
        lines = [message for message in caplog.messages if message[:5] in ("ok   ", "note ", "BAD  ")]
        return {line[5:].partition(":")[0]: (line[:4].strip(), line) for line in lines}, error

    return findings


def test_what_a_job_needs(root, findings):
    found, error = findings()
    assert error is None and {"configuration", "device", "memory", "training", "disk", "W&B", "FID"} <= found.keys()
    assert {mark for mark, _ in found.values()} == {"ok", "note"} and found["data"][0] == "note"
    assert " s for 40 steps" in found["training"][1] and not list(root.rglob("*.pt"))
    config = load(*RECIPE)
    data = prepare(config, config.data, again=True)
    run = Run(config, False, Prepared(data.folder).sha256)
    save_checkpoint(run.folder, 30, {})
    found, _ = findings()
    assert found["data"][0] == "ok" and data.sha256["train"][:12] in found["data"][1]
    assert "for 10 steps after the 30 that are done" in found["training"][1]
    assert "for 40 steps;" in findings("trainer.resume=never")[0]["training"][1]


def test_what_a_job_lacks(root, findings, monkeypatch):
    found, error = findings("model.attention_resolutions=[7]")
    assert error.startswith("1 of these must be mended") and found.keys() == {"configuration"}
    with monkeypatch.context() as without:
        without.delitem(check.validate.FORMS, "shapes")  # as of a source that does not know its own
        found, error = findings()
    assert error is None and found["speed, memory and disk"][0] == "note" and "training" not in found
    monkeypatch.setattr(check, "LONG", 0.0)
    monkeypatch.setattr(check, "memory_left", lambda: -1e12)  # a container that has as good as none
    monkeypatch.setattr(check, "has_key", lambda: False)
    monkeypatch.setattr(check.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    found, error = findings("wandb.mode=online", "evaluation.fid_samples=10")
    assert {name for name, (mark, _) in found.items() if mark == "BAD"} == {"disk"} and error
    notes = {name: line for name, (mark, line) in found.items() if mark == "note"}
    assert notes.keys() >= {"memory", "training", "W&B", "FID"} and "cifar10_cpu" in notes["training"]
    (root / "w").touch()
    assert findings("evaluation.fid_samples=10", f"evaluation.inception_weights={root / 'w'}")[0]["FID"][0] == "ok"


def test_data_and_a_key_that_are_damaged(root, findings, monkeypatch):
    config = load(*RECIPE)
    folder = prepare(config, config.data, again=True).folder
    (folder / "test.npy").write_bytes((folder / "test.npy").read_bytes()[:-9])
    monkeypatch.setenv("WANDB_API_KEY", "short")
    monkeypatch.setattr(check, "sharers", lambda locks: [17, 18])
    found, error = findings("wandb.mode=online")
    assert found["data"][0] == "BAD" and "test.npy is damaged" in found["data"][1] and error
    assert found["W&B"][0] == "note" and "40+ characters" in found["W&B"][1]
    assert found["cores"][1] == "note cores: 2 other trainings use them (process 17); see threads"
    monkeypatch.setattr(check, "has_key", lambda: True)
    (root / "data").mkdir()
    folder.rename(root / "data/shapes")  # where DVC has its own, which it would make again
    for other in ([], ["data.seed=3"]):
        found, error = findings("wandb.mode=online", *other)
        assert found["data"][1] == "note data: shapes is not prepared yet, which the first run does" and not error
        assert found["W&B"] == ("ok", "ok   W&B: online")


def test_a_step_that_fails(findings, monkeypatch):
    def fails(error):
        def train_step(self):
            raise error

        monkeypatch.setattr(check.Trainer, "train_step", train_step)

    fails(MemoryError())
    found, error = findings()
    assert error and "out of memory in stage train" in next(line for mark, line in found.values() if mark == "BAD")
    fails(KeyError("a bug"))
    with pytest.raises(KeyError):
        findings()


def test_git_and_dvc(root, findings, monkeypatch):
    found, _ = findings()
    assert "git init" in found["Git"][1] and "DVC" not in found
    compose_and_dump(str(root / "params.yaml"), str(CONF), None, "config", ".", [])
    (root / "conf").mkdir()
    (root / "conf/config.yaml").touch()
    (root / "dvc.yaml").touch()
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "start"]):
        subprocess.run(["git", *command], cwd=root, env=environment(root), check=True)
    found, _ = findings()
    assert found["Git"][0] == found["DVC"][0] == "ok"
    for name in ("conf/config.yaml", "dvc.yaml", "params.yaml"):
        with (root / name).open("a") as file:
            file.write("another_key: 1\n")
    found, _ = findings()
    assert "conf/config.yaml and 1 more" in found["Git"][1]
    assert "differ in the key another_key (1 in all)" in found["DVC"][1]
    (root / "dvc.yaml").write_text("")
    assert "conf/config.yaml; git commit keeps" in findings()[0]["Git"][1]
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "true")
    assert findings()[0]["Git"][1].endswith(f"is another user's: git config --global --add safe.directory {root}")
    with monkeypatch.context() as patch:
        patch.setattr(check, "state_root", lambda: root / "conf")  # Git names the repository, not the folder in it
        assert findings()[0]["Git"][1].endswith(f"safe.directory {root}")
