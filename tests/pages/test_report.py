"""The report: complete, self-contained, small, escaped; what is missing is left out; its command is right."""

import dataclasses
import json
import shlex
import subprocess
from importlib.metadata import version

import numpy as np
import pytest
from helpers.configs import load
from helpers.pages import Page
from hydra import initialize_config_dir
from PIL import Image
from safetensors.numpy import save_file

from modeling.pages import provenance
from modeling.pages.html import pictures, plot
from modeling.pages.numbers import formatted, headlines
from modeling.pages.results import Results, folder_reader, thinned
from modeling.recipe import CONF, command, composed, differences
from modeling.reliability.errors import UserError
from modeling.stages import report

METRICS = {"held_out_loss": 0.09, "bits_per_dim": 5.17, "bits_per_dim_stderr": 0.068}
TRAINING = {"steps": 300, "loss": 0.15, "held_out_loss": 0.1, "seconds": 3725.2, "parameters": 688051, "made_on": "CPU"}
EVALUATION = {"bits_per_dim_images": 50, "bits_per_dim_timesteps": 10, "quality": {"left_out": "no weights"}}
SAMPLES = {"wavelet_distance": 0.01, "wavelet_distance_stderr": 0.001, "wavelet_distance_samples": 1000}
SAMPLES |= {"wavelet_distance_of_test_images": 0.003, "recognised": 0.5, "recognised_of_test_images": 0.875}
NEAREST = {"nearest_rms": 40.7, "nearest_rms_of_test_images": 13.3}
USED, GROUPS_USED = ["sampler.steps=7", "sampler.seed=3", "evaluation.bpd_images=5"], ("sampler", "evaluation")
HOSTILE = "</script><script>alert('$x$')</script>"


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_picture(path, size=(64, 48)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


@pytest.fixture
def published(tmp_path):
    """All that a run leaves under `out`."""
    reports = tmp_path / "reports"
    write_json(reports / "train.json", {"images": 4800, "images_per_second": 230.4})
    write_json(reports / "train-details.json", TRAINING)
    write_json(reports / "evaluate.json", METRICS)
    write_json(reports / "evaluate-details.json", EVALUATION | NEAREST)
    (reports / "curves").mkdir()
    for name in ("loss", "held_out_loss", "lr", "grad_norm"):
        (reports / f"curves/{name}.csv").write_text(f"step,{name}\n1,0.5\n2,0.25\n3,nan\n")
    for name in (*report.PICTURES, "samples/step-000000100.png", "samples/step-000000300.png"):
        write_picture(reports / name)
    return tmp_path


def write_model(out, **recipe):
    (out / "models").mkdir()
    about = json.dumps({"config": recipe, "sha256": "5a" * 32})
    save_file({"w": np.zeros(1)}, out / "models/model.safetensors", {"config": about})


def made(out, *overrides):
    report.run(load(*overrides, f"out_dir={out}"), out)
    return Page((out / "reports/report.html").read_text()).check()


def test_the_page_holds_all_that_was_published(published, monkeypatch):
    monkeypatch.setenv("DVC_EXP_NAME", "blue-moon")
    write_model(published, seed=7, trainer={"batch_size": 4})
    write_json(published / "data/shapes/data.json", {"sha256": {"train": "ab" * 32, "test": "cd" * 32}})
    page = made(published, "experiment=tiny")
    data = page.data
    assert data["metrics"] == METRICS | {"images": 4800, "images_per_second": 230.4}
    assert data["training"] == TRAINING and data["evaluation"] == EVALUATION | NEAREST
    assert data["curves"] == {key: [[1, 0.5], [2, 0.25]] for key in ("loss", "held_out_loss", "lr", "grad_norm")}
    assert data["config"]["seed"] == 7 and data["differences"]["seed"] == [0, 7]
    shown = {"5.170 ± 0.068", "0.09000", "4,800", "230.4", "688,051", "300", "1:02:05", "40.7", "not measured"}
    assert shown <= {*page.text["b"]} and page.text["h1"] == page.text["title"] == ["blue-moon"]
    headings = [*report.PICTURES.values(), "Training", "Sample grids during training", "Configuration"]
    assert {*headings, "How to reproduce it", "Provenance"} <= {*page.text["h2"]}
    assert page.text["figcaption"] == ["Loss", "Learning rate", "Norm of the gradient", "step 100", "step 300"]
    assert len(page.all("img")) == 3 + len(report.PICTURES) + 2
    assert {"blue-moon", "CPU", "ab" * 32, "cd" * 32, "5a" * 32, "1:02:05"} <= {*page.text["td"]}
    *_, run, apply = "\n".join(page.text["pre"]).splitlines()
    assert run == "dvc exp run -S experiment=tiny -S seed=7" and apply.startswith("dvc exp apply blue-moon ")


def test_the_sampler_is_the_one_of_the_evaluation_and_its_numbers_are_of_the_model(published, caplog):
    """Not the one that the model was trained with, nor the one of the command that reports."""
    write_model(published, seed=7, sampler={"name": "ddpm", "steps": 20})
    made_with = {key: dataclasses.asdict(getattr(load("experiment=tiny", *USED), key)) for key in GROUPS_USED}
    details = EVALUATION | {"weights_sha256": "5a" * 32, "made_with": made_with}
    write_json(published / "reports/evaluate-details.json", details)
    page = made(published, "experiment=tiny")
    assert page.data["config"]["sampler"] == made_with["sampler"] and not caplog.text
    assert page.text["pre"][0].splitlines()[-1] == f"dvc exp run -S experiment=tiny -S {' -S '.join(['seed=7', *USED])}"
    write_json(published / "reports/evaluate-details.json", details | {"weights_sha256": "6b" * 32})
    page = made(published, "experiment=tiny")
    assert page.data["evaluation"] == {} and page.data["metrics"] == {"images": 4800, "images_per_second": 230.4}
    assert {*report.PICTURES.values()} & {*page.text["h2"]} == {"Samples from the same noise during training"}
    assert "not of" in caplog.text and page.data["config"]["sampler"]["name"] == "ddim"
    sampler = made(published).data["config"]["sampler"]  # nobody has named one
    assert (sampler["name"], sampler["steps"]) == ("ddpm", 20) and sampler["seed"] == 0


@pytest.mark.parametrize(("of_data", "shown"), [({"train": "a"}, True), (None, True), ({"train": "b"}, False)])
def test_an_evaluation_on_other_data_is_left_out(published, of_data, shown):
    (published / "models").mkdir()
    about = json.dumps({"config": {}, "sha256": "5a" * 32, "data_sha256": {"train": "a"}})
    save_file({"w": np.zeros(1)}, published / "models/model.safetensors", {"config": about})
    details = {"weights_sha256": "5a" * 32, "variance": "fixed_large"} | ({"data_sha256": of_data} if of_data else {})
    write_json(published / "reports/evaluate-details.json", EVALUATION | details)
    page = made(published, "experiment=tiny")
    assert ("bits_per_dim" in page.data["metrics"]) == shown
    assert page.data["config"]["diffusion"]["variance"] == ("fixed_large" if shown else "fixed_small")


def test_names_are_text(published, monkeypatch):
    monkeypatch.setenv("DVC_EXP_NAME", HOSTILE)
    page = made(published, "data=folder", f"data.path='{HOSTILE}'".replace("('$x$')", "(1)"))
    assert page.text["h1"] == [HOSTILE] and page.data["experiment"] == HOSTILE
    assert shlex.quote(HOSTILE) in page.text["pre"][0]
    assert HOSTILE.replace("('$x$')", "(1)") in page.text["td"]


def test_what_is_missing_is_left_out(tmp_path):
    with pytest.raises(UserError, match=r"nothing to report in .*: run stage=train first"):
        made(tmp_path)
    write_json(tmp_path / "reports/train.json", {"images": 16})
    page = made(tmp_path)
    assert page.text["b"] == ["16"] and not page.all("img")
    assert page.data["curves"] == {} and page.data["differences"] == {}
    assert {*page.text["h2"]}.isdisjoint({"Training", *report.PICTURES.values()}) and "None." in page.text["p"]


@pytest.mark.parametrize("name", ["train.json", "evaluate-details.json", "curves/lr.csv"])
def test_a_damaged_file_is_named(published, name):
    (published / "reports" / name).write_bytes(b"[1, \xff")
    with pytest.raises(UserError, match=f"reports/{name} is damaged"):
        made(published)


def test_a_plain_run_reports_what_lies_in_the_repository(published, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(published))
    (published / "params.yaml").write_text("seed: 3\ndata: {name: shapes}\n")
    write_json(published / "data/shapes/data.json", {"sha256": {"train": "ab" * 32}})
    out = tmp_path_factory.mktemp("out")
    config = load("experiment=tiny")
    report.run(config, out)
    page = Page((out / "reports/report.html").read_text())
    assert page.data["config"]["seed"] == 3 and "ab" * 32 in page.text["td"]
    (out / "reports/train.json").write_text('{"images": 1}')  # a run of all stages has reports of its own
    report.run(config, out)
    page = Page((out / "reports/report.html").read_text())
    assert page.data["metrics"] == {"images": 1} and "ab" * 32 not in page.text["td"]
    assert page.data["config"]["seed"] == 0


def test_published_numbers_stand_beside_those_of_cifar10_only(published):
    def beside(data, **metrics):
        results = Results(folder_reader(published / "reports"))
        results.metrics |= metrics
        return {each.name: (each.published, each.note) for each in headlines(data, results)}

    found = beside("cifar10", fid=4.0, fid_1000=40.0)
    assert found["FID"][0] == "3.17" and found["bits/dim"][0] == "≤ 3.75" and found["parameters"][0] == "35.7 million"
    assert found["FID of 1,000 samples"][0] == "" and "not comparable" in found["FID of 1,000 samples"][1]
    write_json(published / "reports/evaluate-details.json", {})
    assert beside("cifar10")["bits/dim"][1] == "upper bound"
    assert found["bits/dim"][1] == "upper bound, 50 test images, 10 time steps each"
    assert not any(published for published, _ in beside("shapes", fid=4.0).values())


def test_samples_are_measured_beside_test_images(published):
    write_json(published / "reports/evaluate-details.json", EVALUATION | SAMPLES)
    found = {each.name: each for each in headlines("shapes", Results(folder_reader(published / "reports")))}
    distance, share = found["Fréchet wavelet distance"], found["recognised as their class"]
    assert distance.value == "0.0100 ± 0.0010" and "1,000 samples; as many test images: 0.0030" in distance.note
    few = EVALUATION | SAMPLES | {"wavelet_distance_test_images": 40}
    write_json(published / "reports/evaluate-details.json", few)
    note = next(iter(headlines("shapes", Results(folder_reader(published / "reports"))))).note
    assert "1,000 samples; 40 test images, which are fewer and so further: 0.0030" in note
    assert share.value == "50.0%" and share.note.endswith("87.5%")


@pytest.mark.parametrize(("typed", "named"), [("data=cifar10", True), ("experiment=tiny", False)])
def test_the_source_of_published_numbers_is_named(tmp_path, typed, named):
    write_json(tmp_path / "reports/train.json", {"images": 16})
    assert ("Published: Ho" in " ".join(made(tmp_path, typed).text["p"])) == named


def test_pictures_that_are_too_large_become_smaller(published):
    write_picture(published / "reports/samples.png", (1400, 900))
    assert len(made(published).all("img")) == 3 + len(report.PICTURES) + 2
    content = {"a": (published / "reports/film.png").read_bytes()}
    assert len(pictures(content, 20_000)["a"]) > 10_000 > len(pictures(content, 9_000)["a"])
    assert pictures(content, 0)["a"]  # the smallest there is


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ([], ""),
        (["experiment=demo", "trainer.steps=7"], "-S experiment=demo -S trainer.steps=7"),
        (["experiment=cifar10_cpu_night"], "-S experiment=cifar10_cpu_night"),
        (["optimizer=sgd", "optimizer.momentum=0.5"], "-S optimizer=sgd -S optimizer.momentum=0.5"),
        (["sampler.label=cat", "trainer.compile=true"], "-S trainer.compile=true -S sampler.label=cat"),
        (["optimizer.betas=[0.5,0.9]", "optimizer.lr=1e-05", "trainer.micro_batch_size=null"], None),
        (
            ["experiment=tiny", "sampler=dpm_solver", r"sampler.label='it\'s 1, \\'", "evaluation.fid_samples=null"],
            None,
        ),
        (["data=folder", "data.path='/a b/$HOME'", "sampler.label='null'"], None),
    ],
)
def test_the_command_composes_to_the_values(typed, expected):
    values = composed(*typed)
    line = command(values)
    words = shlex.split(line)
    assert words[:3] == ["dvc", "exp", "run"] and {*words[3::2]} <= {"-S"}
    assert composed(*words[4::2]) == values
    assert expected is None or line == f"dvc exp run {expected}".rstrip()


def test_the_command_is_the_shortest_and_brings_no_key_too_many():
    """Choices are words too: here five of them lead nearer than the recipe, which is shorter by its name."""
    recipe = composed("experiment=demo")
    choices = ["data=shapes", "model=tiny", "diffusion=cosine", "optimizer=muon", "sampler=unipc"]
    plain = composed(*choices)
    keys = sorted(differences(recipe, plain))
    back = keys[: len(keys) // 2 + 1]  # this many words behind the recipe, and fewer behind the choices
    assert len(keys) - len(back) < len(back) and 1 + len(back) < len(choices) + len(keys) - len(back)
    words = shlex.split(command(recipe | {key: plain[key] for key in back}))[4::2]
    assert words[0] == "experiment=demo" and len(words) == 1 + len(back)
    # A schedule that conf/ no longer has cannot be chosen: the recipe must be one without the keys of another.
    own = composed() | {"diffusion.schedule": "mine"}
    del own["diffusion.beta_start"], own["diffusion.beta_end"]
    words = shlex.split(command(own))[4::2]
    words.remove("diffusion.schedule=mine")
    assert composed(*words).keys() <= own.keys()


def test_an_older_configuration_has_a_command_too():
    assert command({"seed": 3}) == "dvc exp run -S seed=3"


def test_defaults_and_differences():
    with initialize_config_dir(str(CONF), version_base="1.3"):  # as in main.py
        assert composed("seed=6")["seed"] == 6
    default = composed()
    assert default["optimizer.lr"] == 2e-4 and not {"stage", "out_dir"} & default.keys()
    changed = differences(default | {"seed": 1, "optimizer.momentum": 0.9}, default)
    assert changed == {"seed": (0, 1), "optimizer.momentum": (None, 0.9)}


def test_provenance_names_what_is_in_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert "no Git repository" in provenance.provenance({}, {}, {})["Git commit"]
    run = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost", "-C", str(tmp_path)]
    for name in ("a.py", "params.yaml"):
        (tmp_path / name).write_text("1")
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "start"]):
        subprocess.run([*run, *arguments], check=True)
    (tmp_path / "params.yaml").write_text("2")  # which every experiment writes
    facts = provenance.provenance({}, {}, {})
    assert len(facts["Git commit"]) == 40 and "changes in no commit" not in facts
    (tmp_path / "a.py").write_text("2")
    assert provenance.provenance({}, {}, {})["changes in no commit"].startswith("a.py: ")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git("status") is None


def test_a_package_that_is_not_there_is_no_error(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "no-such-package"))
    assert provenance.provenance({}, {}, {})["packages"] == f"torch {version('torch')}, no-such-package not installed"


def test_thinning_keeps_the_ends():
    assert thinned([*range(101)], 5) == [0, 25, 50, 75, 100] and thinned([1, 2], 2) == [1, 2]


def test_a_plot_takes_any_name_and_any_value():
    text = plot({HOSTILE: [(1, 0.0)], "_b": [(k, 1.0) for k in range(40)]}, "loss", log=True)
    assert text.startswith("data:image/svg+xml;base64,")
    assert formatted("made_on", "CPU") == "CPU" and formatted("other", 0.123456) == "0.1235"
