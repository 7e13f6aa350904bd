"""End to end, through the real command line, DVC and W&B's offline files."""

import ast
import csv
import doctest
import json
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.configs import group
from helpers.pipeline import ROOT, TINY, copy_repository, environment, spelled_out
from helpers.processes import Launched
from helpers.runs import curves, finish, hashes, plain_run
from PIL import Image

import modeling.api
from examples import from_python
from modeling.checkpoints.fingerprint import PACKAGE, imported_files
from modeling.inference.images import cut_grid
from modeling.inference.samples import SampleNoise
from modeling.settings.keys import affects
from modeling.stages import train


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return plain_run(tmp_path_factory)


@pytest.fixture(scope="module")
def state(plain):
    """A stand-in for the repository's root, so that tests leave no runs/ and wandb/ behind."""
    return plain / "state"


@pytest.fixture(scope="module")
def trained(plain):
    return plain / "out"


def test_all_stages_leave_their_products(trained, plain):
    out, printed = trained, (plain / "printed").read_text()
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    reports = {f"curves/{name}.csv" for name in ("loss", "held_out_loss", "lr", "grad_norm")}
    reports |= {"train.json", "train-details.json", "curves.png", "samples/step-000000004.png", "film.png"}
    reports |= {"evaluate.json", "evaluate-details.json", "samples.png", "nearest.png", "denoising.png"}
    expected = {*(f"samples/{k:05}.png" for k in range(4)), *(f"reports/{name}" for name in reports)}
    expected |= {"samples.png", "data/shapes/data.json", "models/model.safetensors"}
    assert expected <= found
    found = {path.stem: json.loads(path.read_text()) for path in (out / "reports").glob("*.json")}
    series, train, evaluate = curves(out), found["train-details"], found["evaluate-details"]
    assert series["loss"].keys() == series["lr"].keys() == {2, 4}
    assert train["held_out_loss"] == pytest.approx(series["held_out_loss"][4], rel=1e-6)
    assert evaluate["loss"] == pytest.approx(train["held_out_loss"], rel=1e-4)  # 16 images both times, EMA both times
    assert sum(evaluate["bits_per_dim_parts"].values()) == pytest.approx(evaluate["bits_per_dim"])
    assert found["train"] == {"images": 16, "images_per_second": train["images_per_second"]}
    assert evaluate["wavelet_distance_samples"] == 8 and evaluate["wavelet_distance_stderr"] > 0
    assert evaluate["wavelet_distance"] > evaluate["wavelet_distance_of_test_images"] > 0
    names = ("bits_per_dim", "bits_per_dim_stderr", "wavelet_distance", "wavelet_distance_stderr")
    assert found["evaluate"] == {"held_out_loss": evaluate["loss"]} | {key: evaluate[key] for key in names}
    assert Image.open(out / "samples/00000.png").size == (8, 8)
    assert "parameters" in printed and "wandb leet" in printed


def test_wandb_holds_the_run_and_never_the_code(trained, state):
    """One folder holds all of it: training, then the evaluation."""
    (folder,) = (state / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    history, summary = {}, {}
    for line in text.splitlines():
        record = json.loads(line)
        history |= record.get("history", {}).get("item", {})
        summary |= record.get("summary", {}).get("update", {})
    assert not list(folder.rglob("*.patch")) and not list(folder.rglob("*.py"))
    wanted = {f"train/{key}" for key in ("loss", "lr", "grad_norm", "images", "images_per_second")} | {"held_out/loss"}
    wanted |= {
        "samples/inputs.caption",
        "samples/grid.caption",
        "evaluate/samples.caption",
        "evaluate/denoising.caption",
    }
    assert wanted <= history.keys() and history["samples/grid.caption"] == "step 4, unipc, 2 log_snr steps, seed 0"
    final = {"evaluate/loss", "evaluate/bits_per_dim", "evaluate/bits_per_dim_parts/prior"}
    assert final <= summary.keys() and not final & history.keys()
    assert summary["held_out/loss"]["min"] == pytest.approx(summary["evaluate/loss"], rel=1e-4)
    facts = ("num_timesteps", "git_commit", "data_sha256", "device_used", "precision_used", "271251")
    assert all(fact in text for fact in facts)


def test_the_same_command_again_trains_nothing_and_publishes_the_same(trained, state, tmp_path):
    shutil.copytree(trained / "data", tmp_path / "out/data")
    root = {"recipe": TINY, "DVC_ROOT": str(state)}
    assert "going on after step 4" in finish(tmp_path, **root)
    name = "models/model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (trained / name).read_bytes()
    assert curves(tmp_path / "out") == curves(trained)
    shorter = finish(tmp_path, "trainer.steps=2", **root)
    assert "-upto-2" in shorter and "going on" not in shorter


def test_python_gives_the_bits_of_the_command(trained):
    """By the sampler of the model's recipe; with its own noise given, too."""
    out = trained
    pictures = [np.asarray(Image.open(out / f"samples/{k:05}.png")) for k in range(4)]
    model = modeling.load_model(out / "models/model.safetensors")
    assert model.image_shape == (3, 8, 8) and model.classes == []
    images = model.sample(4)
    assert images.dtype == torch.uint8 and np.array_equal(images.permute(0, 2, 3, 1), pictures)
    assert torch.equal(model.sample(noise=model.noise(4)), images)


def test_docstring_example_and_page_of_python_run(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    done = doctest.testmod(modeling.api, verbose=False)
    assert done.attempted == 4 and done.failed == 0
    from_python.main("models/model.safetensors", str(tmp_path))
    pictures = {path.stem: cut_grid(path, 8, 8)[0] for path in tmp_path.glob("*.png")}
    assert {name: len(images) for name, images in pictures.items()} == {
        "samples": 10,
        "one-class": 10,
        "interpolation": 10,
        "inpainting": 10,
    }
    original, covered, *filled = pictures["inpainting"]
    assert all(torch.equal(image[:, :, :4], original[:, :, :4]) for image in [covered, *filled])
    assert not torch.equal(filled[0][:, :, 4:], filled[1][:, :, 4:])
    model = modeling.load_model("models/model.safetensors")
    ends = model.sample(noise=model.noise(2, seed=1))
    assert (pictures["interpolation"][[0, -1]].int() - ends.int()).abs().max() <= 1  # cos(pi / 2) is not quite 0
    blocks = re.findall("^```python\n(.*?)^```$", (ROOT / "docs/python.md").read_text(), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "models", "models")
    exec("\n".join(blocks), {})
    assert len(blocks) > 1 and Path("samples.png").exists()


def test_a_training_that_was_not_published_is_sampled_from(plain, tmp_path):
    run = next((plain / "state/runs").glob("*/step-*.pt")).parent
    printed = finish(tmp_path, f"model.weights={run}", stage="sample", recipe=[])
    assert "sampler of the model's recipe" in printed
    names = [f"samples/{k:05}.png" for k in range(4)]
    assert [(tmp_path / "out" / name).read_bytes() for name in names] == [
        (plain / "out" / name).read_bytes() for name in names
    ]


def test_plain_stages_find_model_and_data_by_themselves(trained, tmp_path):
    state = tmp_path / "state"
    weights = trained / "models/model.safetensors"
    plain = {"recipe": [], "out": None, "DVC_ROOT": str(state)}
    finish(tmp_path, f"model.weights={weights}", "sampler=ddim", "sampler.steps=2", stage="sample", **plain)
    assert len(list(tmp_path.glob("outputs/*/*/samples/*.png"))) == 64
    many = finish(tmp_path, f"model.weights={weights}", "sampler.steps=21", stage="sample", code=2, **plain)
    assert many == "error: sampler.steps=21: the model has 20 time steps"
    shutil.copytree(weights.parent, state / "models")  # where a run under DVC leaves it
    arguments = ["sampler.steps=2", "evaluation.bpd_images=2", "evaluation.fid_samples=null"]
    finish(tmp_path, *arguments, stage="evaluate", **plain)
    assert list(tmp_path.glob("outputs/*/*/reports/evaluate.json")) and list((state / "runs/data").glob("shapes-*"))


@pytest.mark.dev
def test_models_go_to_diffusers_and_back(trained, tmp_path):
    """The library's own pipeline draws our samples from the exported folder, and so do we."""
    from diffusers import DDPMPipeline  # here, since the other tests of this file need no requirements-dev.txt

    weights, options = trained / "models/model.safetensors", {"recipe": ["precision=fp32"]}
    finish(tmp_path, f"model.weights={weights}", stage="export", **options)
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "out/diffusers")
    pipeline.set_progress_bar_config(disable=True)
    generators = SampleNoise(5, range(4), (3, 8, 8), "cpu").generators
    images = pipeline(batch_size=4, generator=generators, num_inference_steps=20, output_type="np").images
    for source in (weights, tmp_path / "out/diffusers"):
        sampler = ["sampler=ddpm", "sampler.steps=20", "sampler.num_samples=4", "sampler.seed=5"]
        finish(tmp_path, f"model.weights={source}", *sampler, stage="sample", **options)
        for k, image in enumerate(images):
            ours = np.asarray(Image.open(tmp_path / f"out/samples/{k:05}.png"))
            assert np.abs(ours - 255 * image).max() <= 1.01  # one level of rounding
    foreign = [f"model.weights={tmp_path / 'out/diffusers'}", "data=shapes", "data.image_size=8", "data.num_test=16"]
    few = ["bpd_images=2", "bpd_timesteps=2", "fid_samples=null"]
    small = ["sampler.steps=2", *(f"evaluation.{each}" for each in few), "data.num_train=64"]
    finish(tmp_path, *foreign, *small, stage="evaluate", out=None, **options)


BAD = {
    "modle=tiny": "modle: no such key; allowed are data",
    "model=huge": "Available options in 'model': ddpm patches small tiny",
    "optimizer.momentum=0.9": "optimizer.momentum: a key of optimizer=muon and optimizer=sgd only",
    "trainer.batch_size=many": "trainer.batch_size: Value 'many'",
    "model.norm_groups=5": "model.norm_groups=5: must divide",
    "sampler.steps=21": "sampler.steps=21: allowed are 1 to 20",
    "stage=sample model.weights=absent": "model.weights=absent: there is no ",
    "stage=sample model.weights=damaged": "damaged is damaged",
    "stage=sample sampler.guidance_scale=2": "sampler.guidance_scale=2.0: the model is not class-conditional",
    "stage=sample sampler.label=circle": "sampler.label=circle: the model is not class-conditional",
    "stage=sample model.weights=empty": "empty/config.json cannot be read",
    "stage=sample model.model_channels=32": "model.model_channels=32: the model in",
    "stage=train model.weights=x": "model.weights=x: for stage=sample and stage=evaluate only",
    "stage=train data.num_train=65 out_dir=nowhere": "no prepared data in nowhere",
    "stage=train data.num_train=65 out_dir=taken": "taken/data/shapes was made with num_train=64: run stage=",
    "--config-dir=conf experiment=broken": "while parsing a flow sequence",
    "out_dir=occupied/x": "occupied",
    "stage=train out_dir=taken": "taken/reports cannot be written",
    "stage=evaluate out_dir=taken": "taken/reports cannot be written",
    "stage=sample out_dir=taken": "taken/samples cannot be written",
    "stage=evaluate out_dir=null data.image_size=16": "data=shapes: its images are [3, 16, 16], those of the model [3",
    "a==b": "a==b: quote the value twice: 'a=\"=b\"'",
    "data=folder data.path=empty": "no images in empty",
    "data=folder data.path=unreadable": ".png cannot be read as an image",
    "data=folder data.path=mixed": "all images must have one size",
    "data=cifar10": "broken (data_batch_1: wrong MD5), and it could not be",
    "stage=train out_dir=null sampler.guidance_scale=2": "guidance_scale=2.0: the model is not class-conditional",
    "stage=train out_dir=null model.class_conditional=true sampler.label=x": "sampler.label=x: allowed are circle,",
    "stage=train out_dir=null diffusion=sigmoid diffusion.tau=0.001": "diffusion.schedule=sigmoid: betas must be",
    "stage=sample diffusion=linear": "diffusion.schedule=linear: the model in",
}


@pytest.mark.no_cover  # what starts a process is measured elsewhere, and so are the reasons
@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_line(trained, tmp_path, arguments):
    for name in ("empty", "unreadable", "mixed", "broken/cifar-10-batches-py"):
        (tmp_path / name).mkdir(parents=True)
    for name in "ab":
        (tmp_path / f"unreadable/{name}.png").write_bytes(b"no image")
    (tmp_path / "broken/cifar-10-batches-py/data_batch_1").write_bytes(b"half")
    for k in (8, 16):
        Image.new("RGB", (k, k)).save(tmp_path / f"mixed/{k}.png")
    (tmp_path / "damaged").write_bytes((trained / "models/model.safetensors").read_bytes()[:5000])
    (tmp_path / "occupied").write_text("a file")
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/broken.yaml").write_text("a: [1")
    for name in ("models", "taken/models", "taken/data"):
        shutil.copytree(trained / Path(name).name, tmp_path / name)
    for name in ("taken/reports", "taken/samples"):
        (tmp_path / name).write_text("a file where a folder must be")
    small = spelled_out("tiny", without="data" if arguments.startswith("data=") else "")
    out = [] if "out_dir" in arguments else [f"out_dir={tmp_path}"]
    offline = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "CIFAR10_ROOT": "broken"}
    command = sorted([*small, *out, *arguments.split()], key=lambda typed: not typed.startswith("--"))
    run = Launched(tmp_path / "process", command, tmp_path, offline | {"DVC_ROOT": str(tmp_path)})
    assert run.end() in (1, 2), run.printed()
    line = run.last_line()
    assert line.startswith("error: ") and BAD[arguments] in line
    assert not list(tmp_path.rglob(".*.safetensors*")) and not list(tmp_path.rglob("evaluate*.json"))


def test_a_job_of_a_sweep_that_fails_leaves_the_others_alone(tmp_path):
    """And the sweep fails, in the end."""
    sweep = [*TINY, "trainer.nproc=2,1", "stage=prepare", f"hydra.sweep.dir={tmp_path}", "--multirun"]
    run = Launched(tmp_path / "process", sweep, tmp_path, {"DVC_ROOT": str(tmp_path)})
    assert run.end() == 2 and "data: shapes, 64 + 16 images" in run.printed()
    errors = [line for line in run.printed().splitlines() if line.startswith("error: ")]
    assert errors[0].startswith("error: trainer.nproc=2: not with --multirun")
    assert errors[1:] == ["error: 1 of the jobs of --multirun failed, see above"]


def has_code(path):
    return any(type(node) is not ast.Expr for node in ast.parse(path.read_text()).body)


def stages():
    return yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


IMPORTED = """
import importlib, json, os, sys, torch
for stage in sys.argv[1:]:
    if os.fork() == 0:
        importlib.import_module(f"modeling.stages.{stage}")
        found = [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "modeling"]
        print(json.dumps([stage, found]), flush=True)
        os._exit(0)
    os.wait()
"""


def test_dvc_depends_on_what_a_stage_imports():
    """Every imported file with code lies under a declared dependency, and every dependency holds an imported file."""
    names = ["prepare", "train", "evaluate", "report"]
    command = [sys.executable, "-c", IMPORTED, *names]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    imports = dict(map(json.loads, lines))
    assert [*imports] == names
    for stage, files in imports.items():
        imported = [path for path in map(Path, files) if has_code(path)]
        imported.remove(ROOT / "modeling/__init__.py")  # for notebooks: no stage uses what it has
        declared = [ROOT / dep for dep in stages()[stage]["deps"] if dep.startswith("modeling/")]
        assert not [path for path in imported if not any(path.is_relative_to(dep) for dep in declared)], stage
        assert not [dep for dep in declared if not any(path.is_relative_to(dep) for path in imported)], stage


def test_dvc_trains_again_for_the_keys_of_the_trainer_that_affect_a_result():
    config = group("trainer", "default")
    keys = {f"trainer.{key}" for what in ("weights", "outputs") for key in affects(config, what)}
    assert {key for key in stages()["train"]["params"] if key.startswith("trainer")} == keys
    assert not any(key.startswith("trainer") for key in stages()["evaluate"]["params"])
    assert "sampler" in stages()["evaluate"]["params"] and "sampler" not in stages()["train"]["params"]


def test_the_fingerprint_covers_the_code_of_training():
    names = {str(path.relative_to(PACKAGE)) for path in imported_files("training.trainer", "build")}
    assert {"training/trainer.py", "training/ema.py", "diffusion/unet.py", "diffusion/schedule.py"} <= names
    assert {"data/prepared.py", "training/batches.py", "seeds.py"} <= names
    assert not {name.split("/")[0] for name in names} & {"reporting", "config.py", "evaluation", "interop", "stages"}


def test_dvc_passes_set_params_to_training_and_repeats_nothing(tmp_path):
    """One experiment in a copy of the repository; then other tracking, edited code, and another sampler."""
    repository = copy_repository(tmp_path)
    env = environment(repository, WANDB_MODE="offline")

    def run(*changes):
        common = (*TINY, "optimizer.lr=0.0625", "optimizer.warmup_steps=0")
        sets = [word for change in (*common, *changes) for word in ("-S", change)]
        return subprocess.run(["dvc", "exp", "run", *sets], cwd=repository, env=env, capture_output=True, text=True)

    def experiment(*changes):
        done = run(*changes)
        assert done.returncode == 0, done.stdout + done.stderr
        return {stage for stage in ("prepare", "train", "evaluate") if f"Running stage '{stage}'" in done.stdout}

    assert experiment() == {"prepare", "train", "evaluate"}
    assert set(curves(repository)["lr"].values()) == {0.0625}
    dvc = partial(subprocess.run, cwd=repository, env=env, capture_output=True, text=True, check=True)
    plots = json.loads(dvc(["dvc", "plots", "show", "--json"]).stdout)["data"]
    curve = plots["held_out_loss"][0]["content"]
    assert [row["held_out_loss"] for row in curve["data"]["values"]] == [
        f"{curves(repository)['held_out_loss'][4]:.9g}"
    ]
    assert "training step" in json.dumps(curve["encoding"]) and "reports/film.png" in plots
    metrics = json.loads(dvc(["dvc", "metrics", "show", "--json"]).stdout)[""]["data"]
    shown = {key for file in metrics.values() for key in file["data"]}
    measured = {"bits_per_dim", "bits_per_dim_stderr", "wavelet_distance", "wavelet_distance_stderr"}
    assert shown == {"held_out_loss", "images", "images_per_second", *measured}
    (command,) = re.findall("^dvc exp show .*$", (ROOT / "docs/commands.md").read_text(), re.M)
    columns, *rows = csv.reader(dvc([*shlex.split(command), "--csv"]).stdout.splitlines())
    assert {"optimizer.lr", "sampler.name", "held_out_loss", "bits_per_dim"} <= set(columns) and len(columns) < 12
    assert "0.0625" in {row[columns.index("optimizer.lr")] for row in rows}

    def edited(file):
        with (repository / "modeling" / file).open("a") as code:
            code.write("# an edit that changes no weight\n")
        status = json.loads(dvc(["dvc", "status", "--json"]).stdout)
        return {stage for stage in ("prepare", "train", "evaluate") if "changed deps" in str(status.get(stage))}

    for file, stage in {"reporting/progress.py": "train", "evaluation/fid.py": "evaluate"}.items():
        text = (repository / "modeling" / file).read_text()
        assert edited(file) == {stage}, file
        (repository / "modeling" / file).write_text(text)
    made = hashes(repository / "models") | hashes(repository / "reports")
    refused = run("sampler.guidance_scale=2")
    assert refused.returncode and "error: sampler.guidance_scale=2.0: the model is not class" in refused.stderr
    assert hashes(repository / "models") | hashes(repository / "reports") == made  # DVC has removed nothing
    edited("training/ema.py")
    assert experiment("wandb.mode=disabled") == {"train"}  # no more than that, since the weights are the same
    assert "up to date" in dvc(["dvc", "repro"]).stdout
    model = repository / "models/model.safetensors"
    dvc(["dvc", "remote", "add", "--local", "--default", "shelf", str(tmp_path / "shelf")])
    dvc(["dvc", "push", str(model)])
    made = model.read_bytes()
    model.unlink()
    shutil.rmtree(repository / ".dvc/cache")
    dvc(["dvc", "pull", str(model)])
    assert model.read_bytes() == made


def test_code_outside_git_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CODE", tmp_path)
    assert train.git_commit() is None
    monkeypatch.setenv("PATH", "")
    assert train.git_commit() is None
