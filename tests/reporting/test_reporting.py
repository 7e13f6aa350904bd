"""What people see: the device line, the progress lines, the history file, the W&B fallbacks, signals; and bits/dim."""

import dataclasses
import errno
import functools
import logging
import math
import os
import platform
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.closed_forms import optimal_model
from helpers.configs import group
from helpers.cuda import NEEDS_CUDA
from helpers.pipeline import ROOT
from PIL import Image
from torch._dynamo.testing import CompileCounter

from modeling.build import build_model
from modeling.checkpoints.model_file import asked_group, check_agrees, load_trained, save_model
from modeling.data.prepared import LabelledImages, prepared_folder
from modeling.data.sources import raw_cifar10
from modeling.diffusion.schedule import NoiseSchedule, linear_betas
from modeling.evaluation.bits_per_dim import bits_per_dim, held_out_report, strata
from modeling.inference import device
from modeling.inference.device import Compute, choose_compute
from modeling.inference.samples import draw_samples
from modeling.reliability.errors import ConfigError, Stopped, UserError, explain
from modeling.reliability.files import drop_partial, locked, state_root
from modeling.reliability.signals import poll, resume_command, stop_requested, stop_requests, stopped_at_once
from modeling.reporting import progress
from modeling.reporting.curves import Curves
from modeling.reporting.progress import Progress, duration
from modeling.reporting.wandb_run import WandbRun
from modeling.settings import (
    WandbConfig,
    parse_group,
)
from modeling.stages.evaluate import _likelihood
from modeling.stages.sample import place_trained

CPU = Compute(torch.device("cpu"), bf16=False)


def test_precision_follows_what_the_device_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for capabilities, expected in (({"avx512_bf16": True}, True), ({"avx2": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert choose_compute("auto", "auto").bf16 is expected
        assert not choose_compute("cpu", "fp32").bf16 and choose_compute("cpu", "bf16").bf16
    with pytest.raises(ConfigError, match="device=cuda"):
        choose_compute("cuda", "auto")
    assert "float32" in CPU.describe() and "bf16" in Compute(torch.device("cpu"), True).describe()


NEW_PAGES = """
import resource, torch
from modeling.device import choose_compute
choose_compute("cpu", "fp32")
for _ in range(4):  # until the heap is as large as it gets
    torch.ones(2**26, dtype=torch.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(2**26, dtype=torch.uint8)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize())
"""


# Hides no package: what is tested is a setting of glibc's allocator, and other C libraries have none.
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_cpu_takes_no_new_pages_for_blocks_that_it_has_freed():
    """In a process of its own: the heap of one that has run other tests has many shapes."""
    done = subprocess.run([sys.executable, "-c", NEW_PAGES], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**24


def test_other_systems_and_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(device.ctypes, "CDLL", lambda _: object())  # which has no mallopt
    assert choose_compute("cpu", "fp32") == CPU
    monkeypatch.setattr(device.sys, "platform", "win32")
    monkeypatch.setattr(device.ctypes, "CDLL", None)
    assert choose_compute("cpu", "fp32") == CPU


def test_cuda_is_chosen_and_described_where_it_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (100, 200))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    compute = choose_compute("auto", "auto")
    assert compute == Compute(torch.device("cuda"), False) and compute.describe() == "GPU, float32"
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert choose_compute("cpu", "fp32").device.type == "cpu"
    with pytest.raises(ConfigError, match="precision=bf16"):
        choose_compute("cuda", "bf16")
    big = torch.zeros(51, dtype=torch.uint8)
    assert compute.place(big) is big


def test_deterministic_kernels_are_what_was_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    for asked in (True, False):
        choose_compute("auto", "auto", asked)
        assert torch.are_deterministic_algorithms_enabled() is asked
        assert torch.backends.cudnn.benchmark is not asked
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_where_no_compiler_works_training_goes_without_unless_it_was_asked_for(monkeypatch, caplog):
    def broken(function):
        raise RuntimeError("no C++ compiler\nfound")

    model = torch.nn.Linear(1, 1)
    assert CPU.compiled(model, None) is model and CPU.compiled(model, False) is model
    monkeypatch.setattr(torch, "compile", broken)
    assert Compute(torch.device("cuda"), False).compiled(model, None) is model
    assert "does not work here (no C++ compiler found): training without it" in caplog.text
    with pytest.raises(ConfigError, match=r"trainer\.compile=true: torch\.compile does not work here"):
        CPU.compiled(model, True)


def test_where_the_compiler_fails_at_the_network_training_goes_without_unless_it_was_asked_for(monkeypatch, caplog):
    def fails_at_networks(function, **_):
        def compiled(x):
            raise RuntimeError("too many registers")

        return compiled if isinstance(function, torch.nn.Module) else function

    model = torch.nn.Linear(1, 1)
    monkeypatch.setattr(torch, "compile", fails_at_networks)
    monkeypatch.setattr(device, "_cannot_compile", lambda _: None)
    forward = Compute(torch.device("cuda"), False).compiled(model, None)
    x = torch.ones(1, 1)
    assert torch.equal(forward(x), model(x)) and torch.equal(forward(x), model(x))
    assert caplog.text.count("torch.compile failed (too many registers): training without it") == 1
    with pytest.raises(RuntimeError, match="too many registers"):
        CPU.compiled(model, True)(x)


def test_where_the_compiler_works_training_is_compiled(monkeypatch):
    model, calls = torch.nn.Linear(1, 1), []
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda x: calls.append(x) or function(x))
    monkeypatch.setattr(device, "_cannot_compile", lambda _: None)
    forward, x = Compute(torch.device("cuda"), False).compiled(model, None), torch.ones(1, 1)
    assert torch.equal(forward(x), model(x)) and torch.equal(forward(x), model(x)) and len(calls) == 2


def test_too_little_memory_is_not_the_compilers_failure(monkeypatch):
    def full(_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch, "compile", lambda function, **_: full)
    monkeypatch.setattr(device, "_cannot_compile", lambda _: None)
    with pytest.raises(torch.OutOfMemoryError):
        Compute(torch.device("cuda"), False).compiled(torch.nn.Linear(1, 1), None)(torch.ones(1, 1))


def test_each_size_of_batch_is_compiled_for_itself(monkeypatch):
    """A compiler that is told of sizes that vary gives up the layout of convolutions."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    forward = CPU.compiled(torch.nn.Linear(3, 3), True)
    before = counter.frame_count
    for n in (4, 6, 8, 4, 6, 8):
        forward(torch.ones(n, 3))
    assert counter.frame_count - before == 3


def test_a_sampler_that_asks_for_it_runs_a_compiled_network(monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    config = group(
        "model",
        "tiny",
        model_channels=8,
        channel_mult=[1, 2],
        num_res_blocks=1,
        attention_resolutions=[4],
        num_heads=1,
        dropout=0.0,
        norm_groups=4,
        class_conditional=False,
    )
    model = build_model(
        config,
        group(
            "diffusion",
            "linear",
            num_timesteps=10,
            prediction_type="epsilon",
            variance="fixed_large",
            min_snr_gamma=None,
        ),
        (8, 8, 3),
        0,
        0,
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    sampler, names = (
        group("sampler", "ddim", steps=3, clip_denoised=True, num_samples=4, batch_size=2, seed=0),
        list(model.state_dict()),
    )
    assert place_trained(model, sampler, CPU) is model
    plain = draw_samples(model, sampler, range(4), (3, 8, 8), CPU)
    before = counter.frame_count
    compiled = place_trained(model, dataclasses.replace(sampler, compile=True), CPU)
    assert torch.equal(draw_samples(compiled, sampler, range(4), (3, 8, 8), CPU), plain) and plain.float().std() > 1
    assert counter.frame_count > before and list(compiled.state_dict()) == names
    monkeypatch.setattr(device, "_cannot_compile", lambda _: "no compiler")
    with pytest.raises(ConfigError, match=r"sampler\.compile=true: torch\.compile does not work here"):
        place_trained(model, dataclasses.replace(sampler, compile=True), CPU)


def test_seeding_the_device_is_seeding_torch():
    torch.manual_seed(2**40 + 1)
    expected = torch.rand(3)
    CPU.seed(2**40 + 1)
    assert torch.equal(torch.rand(3), expected)


def test_what_takes_long_is_stopped_at_once():
    with stop_requests(), pytest.raises(Stopped), stopped_at_once():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    with stop_requests():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped), stopped_at_once():
            pytest.fail("it has begun")


@NEEDS_CUDA
def test_cuda_trains_and_samples_as_the_cpu_does():
    model = build_model(
        group(
            "model",
            "tiny",
            model_channels=8,
            channel_mult=[1, 2],
            num_res_blocks=1,
            attention_resolutions=[4],
            num_heads=1,
            dropout=0.0,
            norm_groups=4,
        ),
        COSINE,
        (8, 8, 3),
        0,
        0,
    ).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # the ends are zero, and hide the rest
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    x, t = torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([0, 9])
    sampler = group("sampler", "ddim", steps=5, clip_denoised=True, num_samples=3, batch_size=2, seed=0)
    expected = model(x, t, x)
    images = draw_samples(model, sampler, range(3), (3, 8, 8), CPU)
    compute = device.choose_compute("cuda", "fp32")
    assert compute.place(torch.zeros(2, dtype=torch.uint8)).is_cuda
    model = compute.place_model(model)
    assert torch.allclose(model(x.cuda(), t.cuda(), x.cuda()).cpu(), expected, rtol=1e-2)  # its convolutions are TF32
    # Their noise is each device's own: only the kind of the result can be compared.
    drawn = draw_samples(model, sampler, range(3), (3, 8, 8), compute)
    assert drawn.shape == images.shape and drawn.dtype == images.dtype and not drawn.is_cuda
    with choose_compute("cuda", "auto").autocast():
        assert torch.allclose(model(x.cuda(), t.cuda(), x.cuda()).float().cpu(), expected, rtol=0.1)


def test_history_is_cut_back_and_drawn(tmp_path):
    path = tmp_path / "train.csv"
    history = Curves(path, 0)
    for step in (1, 2, 3):
        history.add({"step": step, "images": step, "lr": 0.1, "loss": 1 / step, "grad_norm": 2.0, "seconds": step})
    whole = path.read_text()
    with path.open("a") as file:
        file.write("4,4,0.")
    again = Curves(path, 3)
    assert [row["step"] for row in again.rows()] == ["1", "2"]
    kept = path.read_text()
    for bad in ("3,3,0.1,x,2,,3", "3,3,0.1,nan,2,,3", "3,,0.1,1,2,,3", "x,3,0.1,1,2,,3", "3,3,0.1,1,2,,3,4", "3,3,0,1"):
        path.write_text(kept + bad + "\n")  # by a disk
        assert [row["step"] for row in again.rows()] == ["1", "2"], bad
    path.write_text(kept)
    again.add({"step": 3, "images": 3, "lr": 0.1, "loss": 1 / 3, "grad_norm": 2.0, "seconds": 3})
    assert path.read_text() == whole
    again.add({"step": 4, "images": 4, "lr": 0.1, "held_out_loss": 0.5})
    again.publish(tmp_path / "published.csv")
    assert (tmp_path / "published.csv").read_text().startswith("step,images,lr,loss,grad_norm,held_out_loss\n1,")
    again.plot(tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size == (840, 480)


def test_durations():
    shown = [duration(s) for s in (0.4, 89, 120, 5400, 172800)]
    assert shown == ["0 s", "89 s", "2 min", "1.5 h", "2 days"]


def run_progress(monkeypatch, terminal, seconds_a_step):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    shown = Progress(50_000, 32, torch.device("cpu"))
    shown.started(10)
    for step in range(11, 21):
        now[0] += seconds_a_step
        shown.stepped(step)
        shown.logged(step, {"loss": 0.5, "held_out_loss": 0.25}, now[0] + 10 * seconds_a_step)
    shown.close()


def test_plain_lines_are_few_and_estimate_the_time(monkeypatch, caplog):
    with caplog.at_level(logging.INFO):
        run_progress(monkeypatch, False, 6.0)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "going on after step 10"
    assert "5.3 images/s: 3 days for 49990 steps" in lines[1] and "experiment=cifar10_cpu" in lines[2]
    assert len(lines) == 4 and lines[3].startswith("step 16/50000: loss 0.5000, held-out 0.2500, 5.3 images/s")


def test_terminal_gets_one_live_bar(monkeypatch, capsys):
    run_progress(monkeypatch, True, 3.0)
    shown = capsys.readouterr().err
    assert "20/50000" in shown and "loss 0.5000" in shown and "images/s: " in shown


def test_first_signal_asks_and_the_second_would_end():
    before = signal.getsignal(signal.SIGINT)
    with stop_requests():
        assert not stop_requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_requested()
        with pytest.raises(Stopped):
            poll()
        assert {signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} == {signal.SIG_DFL}
    assert not stop_requested()
    assert signal.getsignal(signal.SIGINT) is before


def test_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("CIFAR10_ROOT", raising=False)
    assert state_root() == tmp_path and raw_cifar10() == tmp_path / "data/raw"
    monkeypatch.setenv("CIFAR10_ROOT", "/elsewhere")
    assert str(raw_cifar10()) == "/elsewhere"
    images = tmp_path / "images"
    images.mkdir()
    plain = type("Plain", (), {"out_dir": None})()
    before = prepared_folder(plain, group("data", "folder", path=str(images), test_fraction=0.1))
    (images / "a.png").write_bytes(b"x")
    assert before != prepared_folder(
        plain, group("data", "folder", path=str(images), test_fraction=0.1)
    )  # new files, new arrays


def offline(**changes):
    return WandbConfig(**{"mode": "offline", "project": "p", "entity": None, "timeout": 2.0} | changes)


def test_online_without_a_key_or_a_server_is_offline_and_says_so(monkeypatch, tmp_path, caplog):
    for key in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with caplog.at_level(logging.INFO):
        tracker = WandbRun(offline(mode="online"), {"a": 1}, "id1", "name", tmp_path)
        tracker.log({"x": 1.0}, 1)
        tracker.finish()
    assert "no API key" in caplog.text and "wandb sync" in caplog.text
    monkeypatch.setenv("WANDB_API_KEY", "too-short")
    WandbRun(offline(mode="online"), {"a": 1}, "id3", "name", tmp_path).finish()
    assert "API key" in caplog.text.split("no API key")[-1] and len(list((tmp_path / "wandb").iterdir())) >= 2
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with caplog.at_level(logging.INFO):
        tracker = WandbRun(offline(mode="online"), {"a": 1}, "id2", "name", tmp_path)
        tracker.finish()
    assert "no connection" in caplog.text and len(list((tmp_path / "wandb").glob("offline-run-*"))) == 3


def test_the_environments_mode_wins(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = WandbRun(offline(), {}, "id", None, tmp_path)
    tracker.log({"x": 1.0}, 1)
    tracker.image("x", torch.zeros(2, 2, 3, dtype=torch.uint8), 1)
    tracker.artifact("x", "config", tmp_path)
    tracker.finish()
    assert not (tmp_path / "wandb").exists()
    monkeypatch.setenv("WANDB_MODE", "never")
    with pytest.raises(ConfigError, match="WANDB_MODE=never"):
        WandbRun(offline(), {}, "id", None, tmp_path)


COSINE = group("diffusion", "cosine", num_timesteps=10, prediction_type="epsilon", variance="fixed_small")
MODEL = group(
    "model",
    "tiny",
    model_channels=8,
    channel_mult=[1, 2],
    num_res_blocks=1,
    attention_resolutions=[4],
    num_heads=1,
    dropout=0.0,
    norm_groups=4,
)


def test_a_trained_model_is_its_file(tmp_path):
    model = build_model(MODEL, COSINE, (8, 8, 3), 0, 0)
    config = {"model": vars(MODEL), "diffusion": vars(COSINE)}
    path = tmp_path / "m.safetensors"
    about = {"image_shape": [8, 8, 3], "classes": [], "run": "a-1", "steps": 2}
    save_model(path, model.state_dict(), about | {"config": config})
    loaded, meta = load_trained(path)
    assert torch.equal(loaded.network.conv_in.weight, model.network.conv_in.weight) and not loaded.training
    check_agrees(path, meta, parse_group("model", config["model"]), COSINE)
    with pytest.raises(ConfigError, match=r"diffusion.num_timesteps=20: the model in .* has 10"):
        check_agrees(
            path,
            meta,
            MODEL,
            group("diffusion", "cosine", num_timesteps=20, prediction_type="epsilon", variance="fixed_large"),
        )
    wider = {"model": vars(MODEL) | {"model_channels": 16}, "diffusion": vars(COSINE)}
    save_model(path, model.state_dict(), about | {"config": wider})
    with pytest.raises(UserError, match="is not what it says"):
        load_trained(path)
    for wrong in ({"run": "../elsewhere"}, {"run": "/tmp"}, {"run": 3}, {"steps": "many"}, {"run": None}):
        save_model(path, model.state_dict(), about | {"config": config} | wrong)
        with pytest.raises(UserError, match="is not what it says"):
            load_trained(path)
    for data in ({"name": "x"}, {"name": "shapes", "width": 3}, 3):
        save_model(path, model.state_dict(), about | {"config": config | {"data": data}})
        with pytest.raises(UserError, match="is not what it says"):
            load_trained(path)


def test_a_typed_key_changes_what_the_file_says_and_a_chosen_group_replaces_it():
    linear = group(
        "diffusion",
        "linear",
        num_timesteps=1000,
        prediction_type="epsilon",
        variance="fixed_small",
        min_snr_gamma=None,
        beta_start=1e-4,
        beta_end=0.02,
    )  # as configured
    for named, expected in (
        ({"sampler.steps"}, COSINE),
        ({"diffusion.variance"}, dataclasses.replace(COSINE, variance="fixed_small")),
        ({"diffusion"}, linear),
        ({"experiment", "diffusion.variance"}, linear),
    ):
        assert asked_group(SimpleNamespace(diffusion=linear, named=named), "diffusion", COSINE) == expected
    with pytest.raises(ConfigError, match=r"diffusion.beta_end: the model has another diffusion, without such a key"):
        asked_group(SimpleNamespace(diffusion=linear, named={"diffusion.beta_end"}), "diffusion", COSINE)


@pytest.mark.parametrize(("num_timesteps", "count"), [(1, 5), (2, 1), (1000, 20), (1000, None), (50, 49), (100, 1)])
def test_strata_split_all_steps_but_the_first(num_timesteps, count):
    ranges = strata(num_timesteps, count)
    assert [t for first, end in ranges for t in range(first, end)] == list(range(1, num_timesteps))
    assert count is None or len(ranges) <= count


def test_bits_per_dim_of_a_part_of_the_time_steps_agrees_with_all():
    schedule = NoiseSchedule(linear_betas(60, 1e-3, 0.2))
    model = optimal_model(schedule, lambda x_t, alpha_bar: x_t * alpha_bar.sqrt())
    images = torch.randint(0, 256, (48, 1, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = LabelledImages(images, torch.zeros(48, dtype=torch.int64))
    whole = bits_per_dim(model, images, 48, None, CPU)
    part = bits_per_dim(model, images, 11, 12, CPU)
    spread = math.hypot(whole["bits_per_dim_stderr"], part["bits_per_dim_stderr"])
    assert abs(whole["bits_per_dim"] - part["bits_per_dim"]) < 4 * spread
    assert whole["bits_per_dim"] > 7.5  # uniform levels cost 8 bits
    assert whole["bits_per_dim_timesteps"] == 60 and part["bits_per_dim_timesteps"] == 12
    report = held_out_report(model, images, 10, CPU)
    assert set(report["loss_by_t"]) == {"q1", "q2", "q3", "q4"}
    assert sum(report["loss_by_t"].values()) / 4 == pytest.approx(report["loss"], rel=1e-5)


def test_where_wandb_starts_neither_online_nor_offline_training_goes_on(tmp_path, monkeypatch, caplog):
    def broken(**settings):
        raise RuntimeError(f"no service for {settings['mode']}")

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("wandb.init", broken)
    monkeypatch.setattr("wandb.teardown", lambda: None)
    tracker = WandbRun(dataclasses.replace(offline(), mode="online"), {}, "x", None, tmp_path)
    tracker.log({"x": 1.0}, 1)
    tracker.finish()
    assert tracker.run is None and "no connection (no service for online): this run is offline" in caplog.text
    assert "W&B failed (no service for offline): no more of this run is tracked there" in caplog.text


def test_a_run_that_wandb_refuses_is_not_tracked_and_goes_on(tmp_path):
    """Its service still has the run of a process that was killed a moment ago."""
    first = WandbRun(offline(), {}, "taken", None, tmp_path)
    code = (
        "import sys; from pathlib import Path; from test_reporting import WandbRun, offline\n"
        "tracker = WandbRun(offline(), {}, 'taken', None, Path(sys.argv[1])); tracker.log({'x': 1.0}, 1)\n"
        "print(tracker.run, tracker.lacks(0)); tracker.finish()"
    )
    paths = os.pathsep.join(str(Path(__file__).parents[k]) for k in (0, 1))
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "WANDB_MODE"} | {"PYTHONPATH": paths},
    )
    first.finish()
    assert done.returncode == 0 and done.stdout == "None False\n", done.stderr
    assert "is in use): no more of this run is tracked there" in done.stderr


def test_history_on_a_full_disk_is_one_line(tmp_path):
    path = tmp_path / "train.csv"
    history = Curves(path, 0)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    row = {"step": 1, "images": 1, "lr": 0.1, "loss": 0.5, "grad_norm": 2.0, "seconds": 1}
    history.add(row)
    before = path.read_bytes()
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), limit[1]))
    try:
        with pytest.raises(UserError, match=r"train\.csv cannot be written: File too large"):
            history.add(row)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, previous)
    assert path.read_bytes() == before


def test_a_model_that_computes_nothing_finite_is_refused():
    model = optimal_model(NoiseSchedule(linear_betas(20, 1e-3, 0.2)), lambda x, a: x * math.nan)
    images = LabelledImages(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    config = SimpleNamespace(evaluation=SimpleNamespace(batch_size=4))
    with pytest.raises(UserError, match="the held-out loss is nan: the model diverged"):
        _likelihood(config, model, images, CPU)


def test_the_command_that_goes_on_is_the_one_that_was_typed(monkeypatch):
    for name in ("DVC_STAGE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert resume_command(["main.py", "data.path=a b"]) == "python main.py 'data.path=a b'"
    never = ["main.py", "trainer.resume=never", "seed=1"]
    assert resume_command(never) == "python main.py trainer.resume=never seed=1"  # nothing to resume yet
    assert resume_command(never, "never") == "python main.py seed=1 trainer.resume=auto"
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert resume_command() == "the same torchrun command"
    monkeypatch.setenv("DVC_STAGE", "train")
    assert resume_command() == "the same dvc command"
    assert resume_command(never, "never") == "the same dvc command with trainer.resume=auto"


def test_errors_that_are_no_bugs_have_a_line():
    full = OSError(errno.ENOSPC, "No space left on device", "x.pt")
    assert explain(full, "train") == "x.pt: No space left on device; the same command goes on once that is put right"
    assert explain(OSError(errno.ENOENT, "absent"), "train") is None and explain(KeyError("x"), "train") is None
    assert "lower sampler.batch_size" in explain(MemoryError(), "sample")


def test_who_waits_for_a_lock_gets_it_and_left_over_files_go(tmp_path):
    entered = threading.Event()

    def wait():
        with locked(tmp_path / "lock", wait=True):
            entered.set()

    with locked(tmp_path / "lock", wait=True):
        other = threading.Thread(target=wait)
        other.start()
        assert not entered.wait(0.3)
    assert entered.wait(5)
    other.join()
    (tmp_path / ".a.partial").touch()
    drop_partial(tmp_path, ".*", older_than=60)
    assert (tmp_path / ".a.partial").exists()
    drop_partial(tmp_path, ".*")
    assert not (tmp_path / ".a.partial").exists()
