"""The benchmarks run, compare like with like, and their arithmetic is right. Never a time: they are for that."""

import contextlib
import csv
import json
import math
import os
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import bench, kept_memory, loss_equality, peers, profile_step, recognition, samplers, time_to_quality
from benchmarks.measure import Elsewhere, rates, ratio, spread
from benchmarks.project import command_line, configure, make_task, training_flops
from modeling.data.shapes import draw_shapes
from modeling.stages import prepare, train


def test_ratios_are_formed_within_rounds():
    assert ratio([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "n": 3}
    assert spread([3.0, 1.0])["median"] == 2.0


def test_contestants_take_turns():
    calls = []
    work = {name: (lambda name=name: calls.append(name) or 1.0) for name in "ab"}
    found = rates(work, 3, torch.device("cpu"))
    assert calls == ["a", "b", *"ab", *"ba", *"ab"] and [len(values) for values in found.values()] == [3, 3]


def test_peers_take_their_turns_in_a_process_of_their_own():
    with Elsewhere() as elsewhere:
        hosted = {str(power): elsewhere.contestant(partial, math.pow, 10, power) for power in (0, 9)}
        found = rates(hosted, 2, torch.device("cpu"))
        assert all(0 < a < b for a, b in zip(found["0"], found["9"], strict=True))
        assert hosted["9"].pool.submit(os.getpid).result() != os.getpid()
        with pytest.raises(ZeroDivisionError):
            elsewhere.contestant(divmod, 1, 0)


def test_diffusers_network_computes_the_same():
    """Same architecture, same parameter count, same output: the comparison is of implementations alone."""
    task = make_task(("model=tiny", "model.attention_resolutions=[16,8]"), num_images=4, precision="fp32")
    ours, theirs = task.model().network.eval(), peers.diffusers_unet(task).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    peers.copy_weights(task, ours, theirs)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    x, t = torch.randn(2, 3, 32, 32, generator=generator), torch.tensor([3, 900])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t), theirs(x, t).sample, rtol=1e-4, atol=1e-4)


def test_operations_are_counted():
    """By hand, the convolutions behind the upsampling with 4 products instead of 9 (modeling/layers.py)."""
    task = make_task(("model=tiny",), num_images=4)
    saved = sum(2 * (9 - 4) * 32 * 32 * size**2 for size in (16, 32))
    assert training_flops(task) == 3 * (126_861_312 - saved)


def test_bench_runs_at_a_tiny_size(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", "--tiny", "--out", str(tmp_path)])
    bench.main()
    (path,) = tmp_path.glob("*-tiny.json")
    results = json.loads(path.read_text())
    assert path.with_suffix(".png").exists()
    assert set(results) >= {"mode", "machine", "training", "step", "sampling", "evaluation", "startup", "scaling"}
    assert results["training"]["utilisation"]["median"] > 0
    assert set(results["evaluation"]["images_per_second"]) == {"held_out_loss", "bits_per_dim", "inception_features"}
    printed = capsys.readouterr().out
    assert "diffusers (float32, its default)" in printed and "From the command to the first step" in printed


def test_kept_memory_is_compared_with_glibc_as_it_comes(monkeypatch, capsys):
    """Each in an Elsewhere of its own, which here is this process: see above for the real one."""
    places, kept = [], []

    class Here(contextlib.AbstractContextManager):
        def contestant(self, make, *arguments):
            places.append(self)
            return make(*arguments)

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(kept_memory, "Elsewhere", Here)
    monkeypatch.setattr(kept_memory, "choose_compute", lambda *arguments: kept.append(arguments))
    monkeypatch.setattr("sys.argv", ["kept_memory", "--rounds=1", "model=tiny", "trainer.batch_size=2"])
    kept_memory.main()
    found = json.loads(capsys.readouterr().out)
    assert set(found["images_per_second"]) == {"kept", "given back"} and found["ratio"]["n"] == 1
    assert len(set(map(id, places))) == 2 and kept == [("auto", "auto", False)]


TINY = [
    "data=shapes",
    "data.num_train=32",
    "data.num_test=8",
    "data.image_size=8",
    "model=tiny",
    "model.channel_mult=[1,2]",
    "model.attention_resolutions=[4]",
    "diffusion.num_timesteps=20",
    "trainer.batch_size=4",
    "trainer.log_every=1",
    "trainer.evaluate_every=2",
    "trainer.sample_every=4",
    "trainer.sample_images=4",
    "trainer.sample_steps=2",
    "trainer.checkpoint_every=2",
    "sampler.steps=2",
    "evaluation.bpd_images=4",
    "evaluation.bpd_timesteps=3",
    "precision=fp32",
]


def test_time_to_quality_in_parts_is_that_of_one_run(tmp_path, monkeypatch):
    """A part of no minutes trains one step and stops; the next goes on. The record is that of a single run."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    overrides = [*TINY, "trainer.steps=6"]
    assert time_to_quality.run(60, tmp_path / "whole", overrides)
    parts = 0
    while not time_to_quality.run(0, tmp_path / "parts", overrides):
        parts += 1
    assert parts >= 5
    tables = []
    for name in ("whole", "parts"):
        with (tmp_path / name / "quality.csv").open() as file:
            rows = [{k: v for k, v in row.items() if k not in ("minutes", "loss")} for row in csv.DictReader(file)]
        assert [int(row["step"]) for row in rows] == [2, 4, 6] and [int(row["images"]) for row in rows] == [8, 16, 24]
        tables.append(rows)
        grids = sorted(path.name for path in (tmp_path / name / "samples").iterdir())
        assert grids == ["step-000000004.png", "step-000000006.png"] and (tmp_path / name / "quality.png").exists()
    assert tables[0] == tables[1]


def test_loss_equality_compares_three_runs(tmp_path, monkeypatch, capsys):
    small = [item for item in TINY if item.split("=")[0] not in ("data", "precision") and "every" not in item]
    out = tmp_path / "plot.png"
    monkeypatch.setattr("sys.argv", ["loss_equality", "--steps", "4", "--out", str(out), *small])
    loss_equality.main()
    printed = capsys.readouterr().out
    assert out.exists() and printed.count("held-out loss") == 3 and printed.count("mean difference") == 2


def test_energy_distance():
    a, b = (torch.tensor(values, dtype=torch.float64)[:, None] for values in ([0, 2], [1, 3]))
    assert samplers.energy_distance(a, b)[0] == pytest.approx(2 * 1.5 - 2 - 2)
    generator = torch.Generator().manual_seed(0)
    known = torch.randn(2000, 3, generator=generator, dtype=torch.float64)
    found = [
        samplers.energy_distance(torch.randn(100, 3, generator=generator, dtype=torch.float64) + 0.5, known)
        for _ in range(100)
    ]
    distances, errors = (torch.tensor(values) for values in zip(*found, strict=True))
    assert distances.std() == pytest.approx(errors.mean().item(), rel=0.25)
    same = torch.randn(2000, 3, generator=generator, dtype=torch.float64)
    distance, error = samplers.energy_distance(same, known)
    assert abs(distance) < 0.01 < distances.mean() - 5 * error


@pytest.mark.parametrize(
    ("argument", "told"), [("model.weights=absent", "no model in absent"), ("modle=tiny", "Could not override 'modle'")]
)
def test_bad_input_is_one_line(argument, told, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["samplers", argument])
    with pytest.raises(SystemExit) as end:
        command_line(samplers.main)
    printed = capsys.readouterr().err
    assert end.value.code and printed.startswith(f"error: {told}") and printed.count("\n") == 1


def test_the_classifier_knows_real_shapes():
    images, labels = (torch.from_numpy(array) for array in draw_shapes(600, 16, 0, split=0))
    network = recognition.trained_classifier(images.permute(0, 3, 1, 2), labels, 10, epochs=8)
    images, labels = (torch.from_numpy(array) for array in draw_shapes(200, 16, 0, split=1))
    found = recognition.predicted(network, images.permute(0, 3, 1, 2))
    assert (found == labels).double().mean() > 0.9


def test_samplers_and_classes_of_a_trained_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    out = [f"out_dir={tmp_path}", "wandb.mode=disabled"]
    config = configure(*TINY, *out, "trainer.steps=1", "model.class_conditional=true", "trainer.label_dropout=0.5")
    for stage in (prepare, train):
        stage.run(config, tmp_path)
    monkeypatch.setattr("sys.argv", ["samplers", "--images=4", "--steps=2", f"--out={tmp_path / 'samplers'}", *out])
    samplers.main()
    found = json.loads((tmp_path / "samplers.json").read_text())
    assert [row["sampler"] for row in found["rows"]] == ["ddim", "dpm_solver", "ddpm"]
    assert all(row["nfe"] == 2 and row["seconds"] > 0 and row["stderr"] > 0 for row in found["rows"])
    assert (tmp_path / "samplers.png").exists()
    capsys.readouterr()
    guided = ["sampler=ddim", "sampler.steps=2", "sampler.guidance_scale=2"]
    monkeypatch.setattr("sys.argv", ["recognition", "--samples=20", "--epochs=1", *out, *guided])
    recognition.main()
    result = json.loads(capsys.readouterr().out)
    assert 0 <= result["classifier_on_samples"] <= 1 and len(result["by_class"]) == 10
    assert result["sampler"]["guidance_scale"] == 2


def test_profile_names_operators(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["profile_step", "--steps=1", "model=tiny", "trainer.batch_size=2"])
    profile_step.main()
    printed = capsys.readouterr().out
    assert "model=tiny, batch 2" in printed and "convolution" in printed
