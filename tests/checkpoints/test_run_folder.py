"""The folder of a run: its name, what is set aside, and which other runs are mentioned."""

import functools
import shutil

import pytest
from helpers import configs

from modeling.checkpoints.checkpoint import save_checkpoint
from modeling.checkpoints.run_folder import Run, read_notes, write_notes
from modeling.reliability.errors import ConfigError, UserError

load = functools.cache(configs.load)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr("modeling.checkpoints.run_folder.code_hash", lambda *_: "code")  # the real one parses it all
    return tmp_path


def run_of(*overrides, bf16=False):
    return Run(load("data=shapes", *overrides), bf16, {"train": "a"})


def claim(run):
    with run.locked():
        return run


@pytest.mark.parametrize(
    "change",
    ["trainer.steps=9", "trainer.nproc=2", "trainer.compile=true", "device=cpu", "diffusion.variance=fixed_small"],
)
def test_what_changes_no_weights_changes_no_name(change):
    assert run_of(change).name == run_of().name


def test_what_changes_weights_changes_the_name():
    changes = ["seed=1", "trainer.batch_size=8", "optimizer.lr=1e-3", "deterministic=true", "model=tiny"]
    runs = [run_of(), run_of(bf16=True), *map(run_of, [*changes, "diffusion.variance=learned"])]
    assert len({run.name for run in runs}) == len(runs)
    assert run_of("precision=bf16", bf16=True).name == run_of(bf16=True).name, "the precision that is used counts"


@pytest.mark.parametrize("placed", ["optimizer.lr_decay=linear", "trainer.guide_at=0.5"])
def test_a_longer_run_is_another_one_where_the_last_step_decides_on_earlier_ones(placed):
    assert run_of(placed).name != run_of(placed, "trainer.steps=9").name
    assert run_of().name == run_of("trainer.steps=9").name


def test_notes_that_cannot_be_read_are_made_again(root):
    for content in ("{", "[]", '{"wandb_id": 3}'):
        (root / "run.json").write_text(content)
        notes = read_notes(root)
        assert len(notes["wandb_id"]) == 12 and read_notes(root) == notes


def test_a_state_of_other_code_is_mentioned(caplog):
    run = claim(run_of())
    assert not caplog.text
    other = run.folder.with_name("0123456789abcdef")
    save_checkpoint(other, 7, {})
    write_notes(other, {"wandb_id": "x", "recipe": run.notes["recipe"]})
    claim(run_of())
    line = f"has changed since step 7 of {other}: starting fresh; trainer.resume={other}/step-000000007.pt"
    assert line in caplog.text
    caplog.clear()
    claim(run_of("trainer.resume=never"))
    save_checkpoint(run.folder, 1, {})
    claim(run_of())
    assert not caplog.text


def test_a_state_in_the_other_precision_is_mentioned(caplog):
    for bf16, precision in ((True, "bf16"), (False, "fp32")):
        save_checkpoint(claim(run_of(f"seed={int(bf16)}", bf16=bf16)).folder, 5, {})
        claim(run_of(f"seed={int(bf16)}", bf16=not bf16))
        assert f"a state of step 5 of this run in {precision}: starting fresh; precision={precision}" in caplog.text


def test_never_sets_the_earlier_state_aside(caplog):
    run = claim(run_of("trainer.resume=never"))
    replaced = run.folder / "replaced"
    first = run.notes["wandb_id"]
    for step in (3, 4):
        save_checkpoint(run.folder, step, {})
        (run.folder / "train.csv").touch()
        (run.folder / "samples").mkdir()
        (run.folder / "samples/picture").touch()
        claim(run)
        assert {path.name for path in run.folder.iterdir()} == {"lock", "replaced", "run.json"}
        state = {f"step-{step:09}.pt", "train.csv", "run.json", "samples"}
        assert {path.name for path in replaced.iterdir()} == state and (replaced / "samples/picture").exists()
        assert "the earlier state is in" in caplog.text
    assert first != run.notes["wandb_id"]
    claim(run)  # a state without a checkpoint replaces none that has one
    assert (replaced / "step-000000004.pt").exists()
    shutil.rmtree(replaced)
    replaced.write_text("a file instead of a folder")
    save_checkpoint(run.folder, 5, {})
    with pytest.raises(UserError, match="replaced cannot be written"):
        claim(run)
    assert (run.folder / "step-000000005.pt").exists()


def test_fewer_steps_than_are_done_are_a_run_beside_it(caplog):
    run = run_of("trainer.steps=9")
    save_checkpoint(run.folder, 9, {})
    assert run_of("trainer.steps=9").folder == run.folder
    assert claim(run).folder == run.folder
    assert claim(run_of("trainer.steps=8")).folder.name == f"{run.name}-upto-8" and not caplog.text
    assert run_of("trainer.steps=8", "trainer.resume=never").folder == run.folder


def test_a_killed_processs_partial_files_are_removed():
    run = run_of()
    for partial in (run.folder / ".step-000000003.pt.17", run.folder / "samples/.step-000000003.png.17"):
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
    claim(run)
    assert not list(run.folder.rglob(".*"))


def test_a_start_that_is_gone_is_not_needed_once_the_run_has_a_checkpoint(tmp_path):
    start = save_checkpoint(tmp_path / "elsewhere", 3, {})
    resume = f"trainer.resume={start}"
    run = claim(run_of(resume))
    assert run.start.path == start and run.name != run_of().name
    assert run_of("trainer.resume=elsewhere/step-000000003.pt").start == run.start  # under the repository's root
    start.unlink()
    with pytest.raises(ConfigError, match="there is no "):
        run_of(resume)
    save_checkpoint(run.folder, 4, {})
    assert run_of(resume).folder == run.folder
    with pytest.raises(ConfigError, match="there is no "):
        run_of(f"{resume}x")
