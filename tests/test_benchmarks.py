"""The benchmarks run, compare like with like, and their arithmetic is right. They are never timed here."""

import contextlib
import csv
import json
import math
import os
import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.bench import __main__ as bench
from benchmarks.bench import peers, profile
from benchmarks.measure import Elsewhere, rates, ratio, spread, turn
from benchmarks.mixture import Mixture
from benchmarks.project import configure, make_task, training_flops
from benchmarks.studies import (
    distances,
    judge,
    kept_memory,
    loss_equality,
    reliability,
    samplers,
    shapes,
    time_to_quality,
    two_trainings,
)
from modeling.data.shapes import CLASSES, draw_shapes
from modeling.diffusion.samplers import SPACINGS
from modeling.inference.device import computes_in_bf16
from modeling.reliability.container import cores
from modeling.stages import prepare, train

CPU = torch.device("cpu")
TINY = ["experiment=tiny", "precision=fp32"]


def test_ratios_are_formed_within_rounds():
    assert ratio([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "n": 3}
    assert spread([3.0, 1.0])["median"] == 2.0


def test_contestants_take_turns():
    calls = []
    work = {name: (lambda name=name: calls.append(name) or 1.0) for name in "ab"}
    found = rates(work, 3, CPU)
    assert calls == ["a", "b", *"ab", *"ba", *"ab"] and [len(values) for values in found.values()] == [3, 3]
    calls.clear()
    assert turn(work["a"], CPU, 0.01) > 0 and len(calls) > 2
    calls.clear()
    assert turn(work["a"], CPU, warm=True) > 0 and len(calls) == 2


def test_peers_take_their_turns_in_a_process_of_their_own():
    with Elsewhere() as elsewhere:
        hosted = {str(power): elsewhere.contestant(partial, math.pow, 10, power) for power in (0, 9)}
        found = rates(hosted, 2, CPU)
        assert all(0 < a < b for a, b in zip(found["0"], found["9"], strict=True))
        assert elsewhere.run(os.getpid) != os.getpid()
        with pytest.raises(ZeroDivisionError):
            elsewhere.contestant(divmod, 1, 0)
        elsewhere.clear()
        with pytest.raises(IndexError):
            turn(hosted["0"], CPU)


def test_diffusers_network_computes_the_same():
    """Same architecture, same parameter count, same output: the comparison is of implementations alone."""
    task = make_task(("model=tiny", "model.attention_resolutions=[16,8]"), num_images=4, precision="fp32")
    model, generator = task.model().eval(), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    theirs = peers.diffusers_unet(task, model).eval()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters())
    x, t = torch.randn(2, 3, 32, 32, generator=generator), torch.tensor([3, 900])
    with torch.no_grad():
        torch.testing.assert_close(model.network(x, t), theirs(x, t).sample, rtol=1e-4, atol=1e-4)


def test_operations_are_counted():
    """By hand, the convolutions behind the upsampling with 4 products instead of 9 (modeling/diffusion/layers.py)."""
    task = make_task(("model=tiny",), num_images=4)
    saved = sum(2 * (9 - 4) * 32 * 32 * size**2 for size in (16, 32))
    assert training_flops(task) == 3 * (126_861_312 - saved)


def test_bench_runs_at_a_tiny_size(tmp_path, monkeypatch, capsys):
    bench.main(["--tiny", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*-tiny.json")
    results = json.loads(path.read_text())
    assert path.with_suffix(".png").exists()
    bf16 = computes_in_bf16(torch.device("cpu"))
    assert re.fullmatch(rf"[a-z0-9-]+-{cores()}-cores{'' if bf16 else '-float32'}-tiny", path.stem)
    assert set(results) == {"mode", "machine", *bench.SECTIONS}
    assert results["training"]["utilisation"]["median"] > 0
    recipes = results["training"]["recipes"]
    assert set(recipes) == {"cifar10_cpu", "demo"} and all(r["utilisation"]["median"] > 0 for r in recipes.values())
    assert len(results["training"]["ratio"]) >= 4 and set(results["sampling"]) == {"ddpm", "ddim", "dpm_solver"}
    assert set(results["evaluation"]["images_per_second"]) == {"held_out_loss", "bits_per_dim", "inception_features"}
    assert results["startup"]["seconds_to_first_step"]["network"]["median"] > 0
    assert results["scaling"]["images_per_second_by_processes"]["1"]["median"] > 0
    assert all(50 < megabytes < 5000 for megabytes in results["scaling"]["peak_megabytes_by_batch"].values())
    printed = capsys.readouterr().out
    assert "diffusers (float32, its default)" in printed and "seconds to first step: imports" in printed
    assert path.with_suffix(".md").read_text() == printed
    monkeypatch.setitem(bench.SECTIONS, "evaluation", lambda size, elsewhere: {"new": 1})
    bench.main(["--tiny", "--only", "evaluation", "--out", str(tmp_path)])
    again = json.loads(path.read_text())
    assert again["evaluation"] == {"new": 1} and again["training"] == results["training"]  # the others are kept


def test_kept_memory_is_compared_with_the_defaults_of_glibc(monkeypatch):
    """Each in an Elsewhere of its own, which here is this process: see above for the real one."""
    places, kept = [], []

    class Here(contextlib.nullcontext):
        def contestant(self, make, *arguments):
            places.append(self)
            return make(*arguments)

        def __enter__(self):
            return self

    monkeypatch.setattr(kept_memory, "Elsewhere", Here)
    monkeypatch.setattr(kept_memory, "compute_of", kept.append)
    found = kept_memory.main(arguments=["--rounds=1", "model=tiny", "trainer.batch_size=2"])
    assert set(found["images_per_second"]) == {"kept", "given back"} and found["ratio"]["n"] == 1
    assert len(set(map(id, places))) == 2 and len(kept) == 1


def test_reliability_counts_what_guarantees_take(monkeypatch):
    monkeypatch.setattr(reliability, "WARM", 2)
    small = ["experiment=tiny", "wandb.mode=disabled", "trainer.log_every=2", "trainer.checkpoint_every=4"]
    with Elsewhere() as process:
        memory = process.run(reliability.memory, 20)
    assert memory["steps"] == 20 and 50 < memory["mean_mb"][0] <= memory["peak_mb"]
    for cls in (reliability.Reports, reliability.TrainingState):
        for name in ("logged", "stepped", "save"):
            if hasattr(cls, name):
                monkeypatch.setattr(cls, name, getattr(cls, name))  # put back what Clock replaces
    for name in ("DVC_ROOT", "WANDB_MODE"):
        monkeypatch.setenv(name, "")  # put back what it sets
    found = reliability.speed(12, *small)
    assert found["steps_per_second"] > 0 and found["row_ms"] > 0 and found["checkpoint_ms"] > 0
    assert 0 < found["left_for_training"] < 1


def test_time_to_quality_in_parts_is_that_of_one_run(tmp_path, monkeypatch):
    """A part of no minutes trains one step and stops; the next resumes. The record is that of a single run."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    overrides = [*TINY, "trainer.log_every=1", "trainer.evaluate_every=2", "trainer.sample_every=4", "trainer.steps=6"]

    def run(minutes, name):
        return time_to_quality.main(arguments=[f"--minutes={minutes}", f"--folder={tmp_path / name}", *overrides])

    assert run(60, "whole")["done"]
    parts = 0
    while not run(0, "parts")["done"]:
        parts += 1
    assert parts >= 5
    assert run(60, "parts")["done"]  # the last step is reported again, and recorded once
    tables = []
    for name in ("whole", "parts"):
        with (tmp_path / name / "quality.csv").open() as file:
            rows = [{k: v for k, v in row.items() if k not in ("minutes", "loss")} for row in csv.DictReader(file)]
        assert [int(row["step"]) for row in rows] == [2, 4, 6] and [int(row["images"]) for row in rows] == [8, 16, 24]
        tables.append(rows)
        grids = sorted(path.name for path in (tmp_path / name / "samples").iterdir())
        assert grids == ["step-000000004.png", "step-000000006.png"] and (tmp_path / name / "quality.png").exists()
    assert tables[0] == tables[1]


def test_loss_equality_compares_three_runs(tmp_path, capsys):
    small = ["model.channel_mult=[1,2]", "model.attention_resolutions=[4]", "data.image_size=8", "data.num_train=32"]
    few = ["data.num_test=8", "diffusion.num_timesteps=20", "trainer.sample_images=4", "trainer.sample_steps=2"]
    batch = ["trainer.batch_size=4", "sampler.steps=2"]
    loss_equality.main(arguments=["--steps=4", f"--out={tmp_path / 'plot'}", *small, *few, *batch])
    printed, found = json.loads(capsys.readouterr().out), json.loads((tmp_path / "plot.json").read_text())
    assert (tmp_path / "plot.png").exists() and [len(rows) for rows in found["rows"].values()] == [4, 4, 4]
    assert len(printed["held_out_loss"]) == 3
    differences = printed["percent_from_float32_over_the_second_half"]
    assert abs(differences["fast path"]["mean"]) < abs(differences["float32, another seed"]["mean"])


def test_the_solution_on_a_mixture_keeps_quantiles():
    mixture, a = Mixture(), torch.tensor([0.9, 0.2], dtype=torch.float64)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    torch.testing.assert_close(mixture.cdf(mixture.solution(x, a[1], a[0]), a[0]), mixture.cdf(x, a[1]))
    # Of one component the solution is linear, and the best guess Bayes' rule.
    one, signal = Mixture((1.0,), (0.5,), (0.3,)), a.sqrt()
    spread = (a * 0.09 + 1 - a).sqrt()
    expected = signal[0] * 0.5 + spread[0] / spread[1] * (x - signal[1] * 0.5)
    torch.testing.assert_close(one.solution(x, a[1], a[0]), expected)
    expected = 0.5 + signal[1] * 0.09 / spread[1] ** 2 * (x - signal[1] * 0.5)
    torch.testing.assert_close(one.denoise(x, a[1]), expected)
    # The mean of x_0 is the slope of the density (Tweedie's formula).
    h = 1e-3
    below, at, above = (mixture.cdf(x + k * h, a[1]) for k in (-1, 0, 1))
    score = (above - 2 * at + below) / h**2 / ((above - below) / (2 * h))
    torch.testing.assert_close(mixture.denoise(x, a[1]), (x + (1 - a[1]) * score) / signal[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("argument", "message"),
    [("model.weights=absent", "model.weights=absent: there is no "), ("modle=tiny", "Could not override 'modle'")],
)
def test_bad_input_is_one_line(argument, message, capsys):
    with pytest.raises(SystemExit) as end:
        samplers.main(arguments=[argument])
    printed = capsys.readouterr().err
    assert end.value.code and printed.startswith(f"error: {message}") and printed.count("\n") == 1


@pytest.mark.filterwarnings("ignore:Data has no positive values")  # DDIM of all steps is its own solution
def test_samplers_of_a_trained_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    out = [f"out_dir={tmp_path}", "wandb.mode=disabled"]
    classes = ["model.class_conditional=true", "trainer.label_dropout=0.5"]
    config = configure(*TINY, *out, *classes, "trainer.steps=1", "diffusion=linear")
    for stage in (prepare, train):
        stage.run(config, tmp_path)
    few = ["--images=2", "--steps=3,20,50", "--guidance=1,2", f"--out={tmp_path / 'samplers'}"]
    samplers.main(arguments=[*few, f"--models={tmp_path / 'models/model.safetensors'}", *out])
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "samplers.json").read_text())["found"]
    trained = "shapes, linear, epsilon, guidance"
    titles = [f"{trained} 1", f"{trained} 2", "mixture, linear", "mixture, cosine"]
    assert [each["problem"] for each in found] == titles
    for each in found:
        levels = each["levels"]
        assert [*levels] == [f"{sampler}, {spacing}" for sampler in samplers.SOLVERS for spacing in SPACINGS]
        mixture = each["problem"].startswith("mixture")
        assert [*levels["ddim, karras"]] == ["3", "20", "50"][: 3 if mixture else 2]  # a model of 20 time steps
        assert mixture or (levels["ddim, uniform"]["20"] == 0 and levels["ddim, uniform"]["3"] > 0)
        assert not mixture or levels["unipc, log_snr"]["50"] < 0.1 * levels["ddim, uniform"]["50"] < 1
    assert "\nmixture, cosine:\n\n| sampler, spacing | 3 | 20 | 50 |\n|---|---|---|---|\n| ddim, uniform | " in printed
    assert printed.count("**") >= 2 * (2 * 2 + 2 * 3)
    assert (tmp_path / "samplers.png").exists()
    with pytest.raises(SystemExit):
        distances.main(arguments=["--samples=17", *out, "data=shapes_tiny"])
    assert capsys.readouterr().err == "error: --samples=17: there are 16 test images to compare with\n"
    found = distances.main(arguments=["--samples=12", f"--out={tmp_path / 'distances'}", *out, "data=shapes_tiny"])
    sets = [row["images"] for row in found["rows"]]
    assert sets[0] == "test images" and len(sets) == 15 and sets[-1].startswith("1 steps: ddim, 5 steps, seed 0")
    known = [row for row in found["rows"] if row["images"] != "one class only"]  # of fewer than four images here
    assert len(known) == 14 and all(row["wavelet_distance"] > 0 and row["stderr"] > 0 for row in known)
    assert capsys.readouterr().out.count("\n") == 17
    found = shapes.main(arguments=["--samples=11", "--limit=0", f"--out={tmp_path / 'shapes'}", *out])["errors"]
    assert [*found] == [*CLASSES, "all"] and all(row["above"] == 1 for row in found.values())
    arguments = ["--samples=40", "--passes=100", f"--out={tmp_path / 'judge'}", *out, "data=shapes_tiny"]
    found = judge.main(arguments=arguments)
    noise, real = found["rows"]
    assert noise["images"] == "1 steps: ddim, 3 steps, seed 0" and real["images"] == "training images"
    assert noise["distance"] > 10 * real["distance"] > 0 and noise["recognised"] < 0.5 < found["right"]
    capsys.readouterr()
    assert judge.main(arguments=arguments) == found  # by the judge that was kept
    assert "training the judge" not in capsys.readouterr().err


def test_an_image_without_a_shape_is_missing_and_no_whole_one():
    images, _ = draw_shapes(100, 32, seed=3, split=0)
    assert not any(map(shapes.is_missing, images))
    empty = np.full((32, 32, 3), (30, 40, 35), np.uint8)
    assert shapes.is_missing(empty) and shapes.is_missing((empty + images[0] // 8).astype(np.uint8))
    found = shapes.summary([math.nan, 30.0, 10.0, 2.0], 20)
    assert found == {"mean": 14.0, "largest": 30.0, "above": 0.25, "missing": 0.25}


def test_the_error_of_a_shape_is_what_was_changed():
    images, labels = draw_shapes(10, 32, seed=3, split=0)
    for image, label in zip(images, labels, strict=True):
        assert shapes.nearest(image, CLASSES[label]) < 0.4  # that of rounding to levels is 0.29 at most
    frame = images[CLASSES.index("frame")].astype(int)
    noise = np.random.default_rng(0).choice([-8, 8], frame.shape)
    assert shapes.nearest(frame + noise, "frame") == pytest.approx(8, rel=0.05)
    frame[frame[:, :, 0].argmax() // 32] = frame[0, 0]  # a gap: the row of the brightest pixel has gone
    assert shapes.nearest(frame, "frame") > 15 > 8 > shapes.nearest(images[0], "circle")
    assert shapes.nearest(images[0], "square") > 15
    dot = np.zeros((32, 32, 3), np.uint8)
    dot[0, 0] = 255
    assert shapes.nearest(dot, "circle") < dot.std()  # it may lie outside the image, where it would cover nothing
    assert shapes.left_over(dot.reshape(-1, 3) + 0.0, np.zeros((1, 32 * 32))) == pytest.approx(dot.std())


def test_only_a_model_of_shapes_and_classes_is_compared_with_shapes(monkeypatch, capsys):
    for classes, labels in ((0, CLASSES), (10, "abcdefghij")):
        loaded = SimpleNamespace(num_classes=classes), {"classes": [*labels]}, None
        monkeypatch.setattr(shapes, "load_for", lambda *_, loaded=loaded: loaded)
        with pytest.raises(SystemExit):
            shapes.main(arguments=["--samples=10"])
        assert capsys.readouterr().err.startswith("error: the model has not learned the classes")


def test_two_trainings_at_once(monkeypatch):
    assert {case: len(threads) for case, threads in two_trainings.CASES.items()} == {
        "one": 1,
        "two": 2,
        "two, threads=1": 2,
    }
    monkeypatch.delitem(two_trainings.CASES, "one")
    monkeypatch.delitem(two_trainings.CASES, "two")
    tiny = ["model=tiny", "data.image_size=8", "trainer.steps=3", "trainer.batch_size=4"]
    found = two_trainings.main(arguments=["--rounds=1", *tiny])["images_per_second_of_each"]
    assert found["two, threads=1"]["n"] == 2 and found["two, threads=1"]["min"] > 0


def test_profile_names_operators_and_the_parts_of_a_step(capsys):
    tiny = ["model=tiny", "trainer.batch_size=2", "trainer.micro_batch_size=1", "trainer.log_every=1"]
    found = profile.main(arguments=["--steps=2", *tiny])
    printed = capsys.readouterr().out
    assert "model=tiny, batch 2" in printed and "convolution" in printed
    assert all(0 < host <= done < 60_000 for host, done in found["parts"].values())
    assert max(found["parts"], key=found["parts"].get) == "forward and backward"
    assert [*found["parts"]] == ["the batch", "forward and backward", "clipping", "optimizer", "EMA"]
