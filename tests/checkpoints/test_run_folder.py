"""The folder of a run: whose it is, what is set aside, and what is said of other code."""

import json
import shutil

import pytest
from helpers.configs import load

from modeling.checkpoints.checkpoint import save_checkpoint
from modeling.checkpoints.run_folder import Run
from modeling.reliability.errors import ConfigError, UserError


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path


def run_of(*overrides, bf16=False):
    return Run(load("data=shapes", *overrides), bf16, {"train": "a"})


def test_what_changes_no_result_changes_no_name():
    name = run_of().name
    for same in (
        "trainer.steps=9",
        "trainer.nproc=2",
        "trainer.compile=true",
        "device=cpu",
        "diffusion.variance=fixed_small",
    ):
        assert run_of(same).name == name
    for other in ("seed=1", "trainer.batch_size=8", "optimizer.lr=1e-3", "deterministic=true", "model=tiny"):
        assert run_of(other).name != name
    assert run_of(bf16=True).name != name and run_of("precision=bf16", bf16=True).name == run_of(bf16=True).name


def test_state_of_other_code_is_named(caplog):
    caplog.set_level("INFO")
    run = run_of()
    with run.claimed() as notes:
        assert notes["recipe"] == run.recipe
    assert not caplog.text
    other = run.folder.with_name("0123456789abcdef")
    save_checkpoint(other, 7, {})
    (other / "run.json").write_text(json.dumps({"wandb_id": "x", "recipe": run.recipe}))
    with run.claimed():
        assert "has changed since step 7" in caplog.text and f"trainer.resume={other}" in caplog.text


def test_what_was_there_is_set_aside_or_the_reason_is_told(caplog):
    caplog.set_level("INFO")
    run = run_of("trainer.resume=never")
    with run.claimed():
        assert "replaced" not in caplog.text or not list(run.folder.glob("step-*"))
    save_checkpoint(run.folder, 3, {})
    with run.claimed():
        assert (run.folder / "replaced/step-000000003.pt").exists() and "the earlier state is in" in caplog.text
    save_checkpoint(run.folder, 4, {})
    with run.claimed():
        assert [path.name for path in (run.folder / "replaced").glob("*.pt")] == ["step-000000004.pt"]
    shutil.rmtree(run.folder / "replaced")
    (run.folder / "replaced").write_text("a file where a folder must be")
    save_checkpoint(run.folder, 5, {})
    with pytest.raises(UserError, match="replaced cannot be written"), run.claimed():
        pass
    assert (run.folder / "step-000000005.pt").exists()


def test_what_has_no_checkpoint_does_not_replace_what_has():
    run = run_of("trainer.resume=never")
    save_checkpoint(run.folder, 3, {})
    (run.folder / "samples").mkdir()
    (run.folder / "samples" / "step-000000003.png").touch()
    for _ in range(2):  # the second finds what a run has left that was stopped before its first checkpoint
        with run.claimed():
            assert list((run.folder / "samples").iterdir()) == []
            (run.folder / "train.csv").touch()
    replaced = run.folder / "replaced"
    assert (replaced / "step-000000003.pt").exists() and (replaced / "samples" / "step-000000003.png").exists()


def test_a_start_that_is_gone_is_needed_no_more_once_the_run_has_a_checkpoint(tmp_path):
    start = save_checkpoint(tmp_path / "elsewhere", 3, {})
    again = f"trainer.resume={start}"
    run = run_of(again)
    with run.claimed():
        pass
    start.unlink()
    with pytest.raises(ConfigError, match="no such file"):
        run_of(again)
    save_checkpoint(run.folder, 4, {})
    assert run_of(again).folder == run.folder
    with pytest.raises(ConfigError, match="no such file"):
        run_of(f"{again}x")


def test_rows_that_were_made_otherwise_are_told_of(caplog):
    caplog.set_level("INFO")
    run = run_of()
    with run.claimed():
        save_checkpoint(run.folder, 4, {})
    with run_of("trainer.steps=9").claimed():
        assert not caplog.text
    with run_of("trainer.log_every=7", "trainer.evaluate_images=3").claimed():
        assert "up to step 4, rows" in caplog.text
        assert "trainer.log_every=100, trainer.evaluate_images=1000;" in caplog.text
    caplog.clear()
    with run_of("trainer.log_every=7", "trainer.evaluate_images=3").claimed():
        assert not caplog.text


def test_a_state_in_the_other_precision_is_told_of(caplog):
    caplog.set_level("INFO")
    save_checkpoint(run_of(bf16=True).folder, 5, {})
    with run_of().claimed():
        assert "a state of step 5 of this run in bf16: starting fresh; precision=bf16 goes on from there" in caplog.text
