"""One W&B run is one experiment: which run a training and an evaluation log to, and what that run then holds."""

import pytest
import torch
import yaml
from helpers.configs import group, load
from helpers.pipeline import TINY

from modeling.checkpoints.run_folder import Run, read_notes, write_notes
from modeling.inference.images import save_png
from modeling.reporting import experiments
from modeling.reporting.wandb_run import MARK, WandbRun

META = {"sha256": "a" * 64, "steps": 4, "config": {"data": {"name": "shapes"}, "model": {"name": "tiny"}}}
GRID = group("sampler", "unipc", steps=2, guidance_scale=3.0, label="cat")
REPORT = {"loss": 0.5, "quality": {"fid": 3, "sampler": "ddim"}}
ROWS = "step,images,lr,loss,grad_norm,held_out_loss,seconds\n2,8,0.1,0.9,1,,1\n4,16,0.1,0.8,1,0.7,1\n"


class Kept(WandbRun):
    """In place of W&B: keeps all that it is told."""

    made: list["Kept"]

    def __init__(self, settings, config, run_id, about):
        self.run = self.folder = None
        self.config, self.run_id, self.about, self.first = config, run_id, about, 0
        self.logged, self.summary, self.ended = {}, {}, False
        self.made.append(self)

    def log(self, values, step):
        self.logged.setdefault(step, {}).update(values)

    def summarize(self, values):
        self.summary.update(values)

    def finish(self, exit_code=0):
        self.ended = True


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(Kept, "made", [], raising=False)
    monkeypatch.setattr(experiments, "WandbRun", Kept)
    monkeypatch.setattr("modeling.checkpoints.run_folder.code_hash", lambda *_: "code")
    for name in ("DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    for name in ("samples", "nearest"):
        save_png(tmp_path / f"out/{name}.png", torch.zeros(2, 2, 1, dtype=torch.uint8))
    return tmp_path


@pytest.fixture
def train(root, monkeypatch):
    """Starts the training of an experiment, and publishes unless it is killed; gives what W&B was told."""

    def train(experiment, killed=False):
        monkeypatch.setenv("DVC_EXP_NAME", experiment)
        config = load(*TINY)
        run = Run(config, False, {"train": "a"})
        with run.locked():
            kept = experiments.start_training_run(config, run, {"parameters": 7}, GRID)
            (run.folder / "config.yaml").write_text(yaml.safe_dump({"seed": 0, "sampler": "of the training"}))
            (run.folder / "train.csv").write_text(ROWS)
            save_png(experiments.picture_of(run.folder, 4), torch.zeros(2, 2, 1, dtype=torch.uint8))
            if not killed:
                write_notes(run.folder, run.notes | {"weights_sha256": META["sha256"], "finished": True})
        return kept

    return train


@pytest.fixture
def evaluate(root, monkeypatch):
    def evaluate(experiment, *changes):
        monkeypatch.setenv("DVC_EXP_NAME", experiment)
        experiments.log_evaluation(load(*TINY, *changes), META, REPORT, root / "out")
        return Kept.made[-1]

    return evaluate


def test_an_experiments_evaluation_completes_the_run_of_its_training(train, evaluate, root):
    training = train("e-1")
    assert training.config["parameters"] == 7 and training.config["model"]["name"] == "tiny"
    assert training.about["name"] == "e-1" and training.about["group"] == "e" and training.about["job_type"] == "train"
    save_png(root / "out/denoising.png", torch.zeros(2, 2, 1, dtype=torch.uint8))
    run = evaluate("e-1")
    assert run.run_id == training.run_id and run.about == training.about and run.ended
    assert run.config["parameters"] == 7 and run.config["seed"] == 0 and run.config["sampler"]["name"] == "ddim"
    assert [*run.logged] == [0, 2, 4, 5], "told again as a whole, then the evaluation"
    assert run.logged[4]["held_out/loss"] == 0.7 and "train/images_per_second" not in run.logged[4]  # in no time
    assert run.logged[4]["samples/grid"].caption == "step 4, unipc, 2 log_snr steps, guidance 3, cat, seed 0"
    assert {*run.logged[5]} == {f"evaluate/{name}" for name in ("samples", "nearest", "denoising")}
    assert run.logged[5]["evaluate/samples"].caption == "ddim, 3 steps, seed 0"
    assert run.summary == {"evaluate/loss": 0.5, "evaluate/quality/fid": 3}
    assert evaluate("e-1").run_id == run.run_id, "once more in the same way"


def test_another_experiment_or_sampler_has_a_run_of_its_own(train, evaluate, monkeypatch):
    training = train("e-1")
    first = evaluate("e-1")
    others = [evaluate("e-1", "sampler.seed=1"), evaluate("e-2"), evaluate("e-3", "sampler.seed=1")]
    assert len({training.run_id, *(run.run_id for run in others)}) == 4 and first.run_id == training.run_id
    for run in others:
        assert [*run.logged] == [5] and run.about["job_type"] == "evaluate" and run.about["group"] == "e"
        assert run.config["weights_sha256"] == META["sha256"]
    assert evaluate("e-2").run_id == others[1].run_id, "a repeated attempt goes on with it"
    monkeypatch.setitem(META, "sha256", "b" * 64)
    assert evaluate("e-1").logged.keys() == {5}, "of a model that no run here has made"


def test_an_unfinished_training_keeps_its_run_and_a_finished_one_does_not(train, evaluate):
    killed = train("e-1", killed=True)
    resumed = train("e-2")
    assert resumed.run_id == killed.run_id and evaluate("e-2").run_id == killed.run_id
    assert train("e-2").run_id == killed.run_id, "the same experiment again"
    again = train("e-3")
    assert again.run_id != killed.run_id
    assert evaluate("e-3").run_id == again.run_id
    assert evaluate("e-2").run_id not in (killed.run_id, again.run_id)


def test_an_evaluation_after_a_sync_is_a_run_of_its_own(train, evaluate, root):
    training = train("e-1")
    synced = root / "wandb" / f"offline-run-1-{training.run_id}"
    synced.mkdir(parents=True)
    (synced / MARK).touch()
    (synced / "run.wandb.synced").touch()
    assert evaluate("e-1").about["job_type"] == "evaluate"
    assert evaluate("e-1", "wandb.mode=online").run_id == training.run_id, "the server continues it"


def test_an_evaluation_that_finds_no_connection_after_a_sync_tells_no_rows(train, evaluate, monkeypatch):
    train("e-1")
    start = Kept.__init__

    def elsewhere(self, *arguments):
        start(self, *arguments)
        self.run_id = "new"

    monkeypatch.setattr(Kept, "__init__", elsewhere)
    assert [*evaluate("e-1").logged] == [5]


def test_notes_hold_what_an_evaluation_needs(train, root):
    kept = train("e-1")
    (notes,) = (read_notes(path.parent) for path in root.glob("runs/*/run.json"))
    assert notes["wandb_id"] == kept.run_id and notes["experiment"] == "e-1" and notes["finished"]
