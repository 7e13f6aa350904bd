"""The training loop: its randomness, its schedule, and that a stopped run goes on bit for bit."""

import dataclasses
import math
import os
import signal
import time

import pytest
import torch
from helpers.configs import group
from helpers.cuda import NEEDS_CUDA
from helpers.training import CPU, DIFFUSION, MODEL, Recorder, adam, make, weights
from torch import nn
from torch.overrides import TorchFunctionMode

from modeling.build import build_model
from modeling.checkpoints.checkpoint import checkpoints, read_checkpoint
from modeling.data.prepared import LabelledImages
from modeling.diffusion.layers import Dropout
from modeling.diffusion.model import DiffusionModel
from modeling.diffusion.schedule import NoiseSchedule, linear_betas
from modeling.inference.device import choose_compute
from modeling.inference.held_out import held_out_losses, held_out_timesteps
from modeling.inference.samples import draw_samples
from modeling.reliability.errors import Stopped, UserError, explain
from modeling.reliability.signals import stop_requests
from modeling.seeds import step_seed
from modeling.settings import own_keys
from modeling.training.batches import draw_timesteps
from modeling.training.optimizer import OPTIMIZERS, build_optimizer, learning_rate
from modeling.training.state import CheckpointFolder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    recorder = Recorder()
    trainer = make(tmp_path_factory.mktemp("whole"), recorder)
    trainer.run()
    return weights(trainer), recorder


def test_events_happen_when_they_are_due(whole):
    _, recorder = whole
    assert recorder.starts == [0] and recorder.steps == list(range(1, 11))
    assert [s for s, row in recorder.rows.items() if "loss" in row] == [3, 6, 9, 10]
    assert [s for s, row in recorder.rows.items() if "held_out_loss" in row] == [5, 10]
    assert list(recorder.grids) == [7, 10] and recorder.grids[7].shape == (2, 3, 8, 8)
    assert recorder.rows[9]["images"] == 36


@pytest.mark.parametrize("stop_at", [1, 3, 5, 6, 8])
def test_stopped_run_goes_on_bit_for_bit(tmp_path, whole, stop_at):
    recorder = Recorder()
    recorder.stop_at = stop_at
    with stop_requests(), pytest.raises(Stopped, match=f"after step {stop_at}"):
        make(tmp_path, recorder).run()
    recorder.stop_at = None
    assert read_checkpoint(checkpoints(tmp_path)[-1])["step"] == stop_at
    trainer = make(tmp_path, recorder)
    trainer.run()
    assert recorder.starts == [0, stop_at]
    assert torch.equal(weights(trainer), whole[0])
    assert recorder.rows == whole[1].rows
    assert all(torch.equal(recorder.grids[k], grid) for k, grid in whole[1].grids.items())


def test_a_stop_under_never_says_how_to_go_on(tmp_path):
    recorder = Recorder()
    recorder.stop_at = 2
    with stop_requests(), pytest.raises(Stopped, match="all work is saved"):
        make(tmp_path, recorder, resume="never").run()


def test_state_of_another_device_is_said(tmp_path, caplog):
    make(tmp_path, Recorder(), steps=1).run()
    again = make(tmp_path, Recorder(), steps=2)
    state = read_checkpoint(checkpoints(tmp_path)[-1])
    again.state.load_state_dict(state)
    assert not caplog.text
    again.state.load_state_dict(state | {"device": "cuda"})
    assert "the state was made on cuda: random numbers differ on cpu" in caplog.text


def test_killed_run_goes_on_from_the_last_checkpoint(tmp_path, whole):
    class Killed(Recorder):
        def stepped(self, step):
            super().stepped(step)
            if step == 7:
                raise KeyboardInterrupt

    recorder = Killed()
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, recorder).run()
    rest = Recorder()
    rest.rows, rest.grids = recorder.rows, recorder.grids
    trainer = make(tmp_path, rest)
    trainer.run()
    assert rest.starts == [4] and torch.equal(weights(trainer), whole[0]) and rest.rows == whole[1].rows


def test_longer_run_extends_a_finished_one(tmp_path, whole):
    recorder = Recorder()
    make(tmp_path, recorder, steps=7).run()
    trainer = make(tmp_path, recorder)
    trainer.run()
    assert recorder.starts == [0, 7] and torch.equal(weights(trainer), whole[0]) and recorder.rows == whole[1].rows


def test_finished_run_trains_nothing_again(tmp_path, whole):
    recorder = Recorder()
    first = make(tmp_path, recorder)
    first.run()
    recorder.steps.clear()
    again = make(tmp_path, recorder)
    again.run()
    assert recorder.steps == [] and torch.equal(weights(again), whole[0]) and recorder.rows == whole[1].rows


def test_sampling_and_evaluation_change_nothing(tmp_path, whole):
    trainer = make(tmp_path, Recorder(), evaluate_every=1, sample_every=2, log_every=1)
    trainer.run()
    assert torch.equal(weights(trainer), whole[0])


def test_non_finite_loss_ends_the_run_and_spares_the_checkpoint(tmp_path):
    trainer = make(tmp_path, Recorder(), optimizer=adam(lr=1e30, betas=[0.9, 0.99], warmup_steps=0), checkpoint_every=1)
    with pytest.raises(UserError, match="not finite"):
        trainer.run()
    assert all(torch.stack([*torch.load(path)["sums"].values()]).isfinite().all() for path in checkpoints(tmp_path))


def test_training_learns(tmp_path):
    recorder = Recorder()
    make(tmp_path, recorder, steps=150, log_every=50, optimizer=adam(lr=3e-3, betas=[0.9, 0.99])).run()
    assert recorder.rows[150]["loss"] < 0.8 * recorder.rows[50]["loss"] < 0.8


OPTIONS = {
    "sample": group(
        "diffusion",
        "linear",
        num_timesteps=20,
        prediction_type="sample",
        variance="fixed_small",
        min_snr_gamma=None,
        beta_start=1e-3,
        beta_end=0.2,
    ),
    "v_prediction": group(
        "diffusion",
        "linear",
        num_timesteps=20,
        prediction_type="v_prediction",
        variance="fixed_small",
        min_snr_gamma=None,
        beta_start=1e-3,
        beta_end=0.2,
    ),
    "cosine": group("diffusion", "cosine", num_timesteps=20, prediction_type="epsilon", variance="fixed_small"),
    "sigmoid": group("diffusion", "sigmoid", num_timesteps=20, prediction_type="epsilon", variance="fixed_small"),
    "min-SNR": group(
        "diffusion",
        "linear",
        num_timesteps=20,
        prediction_type="v_prediction",
        variance="fixed_small",
        min_snr_gamma=5.0,
        beta_start=1e-3,
        beta_end=0.2,
    ),
    "learned": group(
        "diffusion",
        "linear",
        num_timesteps=20,
        prediction_type="epsilon",
        variance="learned",
        min_snr_gamma=None,
        beta_start=1e-3,
        beta_end=0.2,
    ),
    "all": group(
        "diffusion", "sigmoid", num_timesteps=20, prediction_type="v_prediction", variance="learned", min_snr_gamma=5.0
    ),
}


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_learns(tmp_path, option, conditional):
    """A loss that falls, and a held-out loss in the space of the noise that falls with it; sampling runs."""
    recorder = Recorder()
    network = dataclasses.replace(MODEL, class_conditional=conditional)
    fast = adam(lr=5e-3, betas=[0.9, 0.99])
    changes = {"steps": 120, "log_every": 40, "evaluate_every": 40, "sample_every": 120, "checkpoint_every": 1000}
    changes["label_dropout"] = 0.2 if conditional else 0.0
    make(tmp_path, recorder, optimizer=fast, model=network, diffusion=OPTIONS[option], plain=True, **changes).run()
    first, last = recorder.rows[40], recorder.rows[120]
    assert last["loss"] < 0.8 * first["loss"] and last["held_out_loss"] < 0.8 * first["held_out_loss"]
    assert recorder.grids[120].shape == (2, 3, 8, 8)


def test_a_conditional_network_is_told_the_class_and_sometimes_not(tmp_path):
    trainer = make(tmp_path, Recorder(), model=dataclasses.replace(MODEL, class_conditional=True), label_dropout=0.3)
    given = torch.cat([trainer.source.labels(step) for step in range(500)])
    true = torch.cat([trainer.source.batches.labels(step) for step in range(500)])
    dropped = given == 2
    assert dropped.double().mean().item() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(given[~dropped], true[~dropped])


def test_first_step_is_the_definition(tmp_path):
    """One SGD step, computed by hand from the functions of (seed, step) and autograd."""
    sgd = group(
        "optimizer", "sgd", lr=0.1, warmup_steps=0, lr_decay="none", grad_clip=None, momentum=0.0, weight_decay=0.0
    )
    trainer = make(tmp_path, Recorder(), optimizer=sgd, steps=1)
    reference = build_model(MODEL, DIFFUSION, (8, 8, 3), 2, seed=0).train()
    x_0 = trainer.source.batches.batch(0)
    generator = torch.Generator().manual_seed(step_seed(0, "noise", 0))
    t = torch.randint(20, (4,), generator=generator)
    noise = torch.randn(x_0.shape, generator=generator)
    alpha_bar = reference.schedule.alphas_cumprod[t].float().reshape(-1, 1, 1, 1)
    torch.manual_seed(step_seed(0, "dropout", 0))
    predicted = reference.network(alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise, t)
    (predicted - noise).square().mean().backward()
    trainer.run()
    for parameter, expected in zip(trainer.parameters, reference.parameters(), strict=True):
        assert torch.allclose(parameter, expected - 0.1 * expected.grad, atol=1e-6)


class Draws(TorchFunctionMode):
    """Notes the device that every draw of random numbers names."""

    def __init__(self):
        super().__init__()
        self.devices = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.randn, torch.randint):
            self.devices[func.__name__] = kwargs.get("device")
        return func(*args, **kwargs)


def test_time_steps_and_noise_are_drawn_on_the_training_device(tmp_path):
    """Without a GPU the wrong device shows only in what the draw asks for: none would be the CPU."""
    trainer = make(tmp_path, Recorder())
    with Draws() as draws:
        trainer.source.inputs(0)
    assert draws.devices == {"randn": CPU.device, "randint": CPU.device}


@NEEDS_CUDA
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_on_cuda_goes_on_where_it_stopped_bit_for_bit(tmp_path, precision, request):
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    cuda = choose_compute("cuda", precision, deterministic=True)
    whole = make(tmp_path / "whole", Recorder(), compute=cuda)
    whole.run()
    part = Recorder()
    part.stop_at = 5
    with stop_requests(), pytest.raises(Stopped):
        make(tmp_path / "part", part, compute=cuda).run()
    part.stop_at = None
    rest = make(tmp_path / "part", part, compute=cuda)
    rest.run()
    assert all(p.is_cuda for p in rest.parameters)
    assert torch.equal(weights(rest), weights(whole))


@NEEDS_CUDA
def test_gradients_in_bf16_on_cuda_are_those_of_float32():
    """At the paper's width of an attention head, 256, for which CUDA has kernels of its own."""
    model = build_model(
        group(
            "model",
            "tiny",
            model_channels=128,
            channel_mult=[1, 2],
            num_res_blocks=1,
            attention_resolutions=[16],
            num_heads=1,
            dropout=0.0,
            norm_groups=32,
        ),
        DIFFUSION,
        (32, 32, 3),
        0,
        0,
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # the ends are zero, and hide the rest
        parameter.data.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    x, noise = torch.randn(2, 8, 3, 32, 32, generator=generator)
    t = torch.randint(20, (8,), generator=generator)
    found = {}
    for precision in ("fp32", "bf16"):
        compute = choose_compute("cuda", precision)
        compute.place_model(model).zero_grad()
        with compute.autocast():
            model(x.cuda(), t.cuda(), noise.cuda()).mean().backward()
        found[precision] = torch.cat([p.grad.flatten().double().cpu() for p in model.parameters()])
    exact, fast = found.values()
    assert (fast - exact).norm() < 0.05 * exact.norm()


@NEEDS_CUDA
def test_a_step_on_cuda_waits_for_nothing(tmp_path):
    """Until it is logged, no value comes back and no transfer is waited for."""
    trainer = make(tmp_path, Recorder(), compute=choose_compute("cuda", "auto"), compile=False)
    trainer._train_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer._train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@NEEDS_CUDA
def test_a_run_moves_from_cpu_to_cuda_and_back(tmp_path):
    for k, compute in enumerate((CPU, choose_compute("cuda", "fp32"), CPU), 1):
        recorder = Recorder()
        make(tmp_path, recorder, compute=compute, steps=4 * k).run()
        assert recorder.starts == [4 * (k - 1)]


@pytest.mark.parametrize(
    "optimizer",
    [
        adam(betas=[0.9, 0.99]),
        group(
            "optimizer", "sgd", lr=0.1, warmup_steps=0, lr_decay="none", grad_clip=None, momentum=0.9, weight_decay=0.0
        ),
    ],
)
def test_moments_take_the_layout_of_the_parameters(tmp_path, optimizer):
    """A checkpoint of a CPU, taken up in the layout of CUDA: fused kernels read memory, not indices."""
    make(tmp_path, Recorder(), optimizer=optimizer, steps=4).run()
    again = make(tmp_path, Recorder(), optimizer=optimizer, steps=4)
    again.model.to(memory_format=torch.channels_last)
    again.state.resume(CheckpointFolder(tmp_path), 4)
    kept = read_checkpoint(checkpoints(tmp_path)[-1])["optimizer"]["state"]
    for k, parameter in enumerate(again.parameters):
        for name, moment in again.optimizer.state[parameter].items():
            if moment is not None and moment.shape == parameter.shape:
                assert moment.stride() == parameter.stride() and torch.equal(moment, kept[k][name])


def test_a_compiled_run_goes_on_bit_for_bit_and_agrees_with_one_that_is_not(tmp_path, record_deviation):
    """With a compiler on the machine; without one, the error names trainer.compile=false."""
    smallest = group(
        "model",
        "tiny",
        model_channels=8,
        channel_mult=[1],
        num_res_blocks=1,
        attention_resolutions=[],
        num_heads=1,
        dropout=0.0,
        norm_groups=4,
    )
    torch.compiler.reset()

    def run(name, recorder, compile=True):
        trainer = make(tmp_path / name, recorder, model=smallest, steps=6, checkpoint_every=3, compile=compile)
        trainer.run()
        return trainer

    compiled, plain, part = Recorder(), Recorder(), Recorder()
    try:
        whole = run("whole", compiled)
    except Exception as error:
        assert "trainer.compile=false" in str(explain(error, "train"))
        return
    run("plain", plain, compile=False)
    for step, row in plain.rows.items():
        deviation = max(abs(compiled.rows[step][key] / value - 1) for key, value in row.items() if value)
        record_deviation("compiled: losses, gradient norms", deviation)
        assert deviation < 1e-4
    part.stop_at = 3
    with stop_requests(), pytest.raises(Stopped):
        run("part", part)
    part.stop_at = None
    torch.compiler.reset()  # as in another process
    assert torch.equal(weights(run("part", part)), weights(whole))
    # What a compiled network drops is decided by the seed of the step too.
    dropping = CPU.compiled(Dropout(0.5).train(), True)

    def dropped(seed):
        torch.manual_seed(seed)
        return dropping(torch.ones(64)) == 0

    assert torch.equal(dropped(1), dropped(1)) and not torch.equal(dropped(1), dropped(2))


def test_learning_rate():
    assert [learning_rate(adam(warmup_steps=4), s, 10) for s in (0, 1, 3, 9)] == pytest.approx(
        [2.5e-4, 5e-4, 1e-3, 1e-3]
    )
    assert learning_rate(adam(warmup_steps=0, lr_decay="linear"), 4, 10) == pytest.approx(6e-4)
    cosine = [learning_rate(adam(warmup_steps=0, lr_decay="cosine"), s, 9) for s in (0, 3, 9)]
    assert cosine == pytest.approx([1e-3, 0.5e-3 * (1 + math.cos(math.pi / 3)), 0])


@pytest.mark.parametrize("stratified", [False, True])
def test_timesteps_are_uniform(stratified):
    draws = [draw_timesteps(32, 10, stratified, torch.Generator().manual_seed(s)) for s in range(500)]
    counts = torch.stack([torch.bincount(t, minlength=10) for t in draws]).double()
    assert counts.shape[1] == 10 and torch.allclose(counts.mean(0), torch.full((10,), 3.2).double(), atol=0.3)
    assert (counts.std(0).max() < 0.6) == stratified


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_get_the_keys_of_their_group(name):
    parameter = nn.Parameter(torch.ones(2))
    config = group("optimizer", name, lr=0.1)
    changed = {"betas": [0.8, 0.95], "eps": 1e-5, "weight_decay": 0.3, "momentum": 0.95}
    config = dataclasses.replace(config, **{key: changed.get(key, value) for key, value in own_keys(config).items()})
    optimizer = build_optimizer(config, [parameter])
    for key, value in {"lr": 0.1, **own_keys(config)}.items():
        assert optimizer.param_groups[0][key] == pytest.approx(value)
    parameter.sum().backward()
    optimizer.step()
    assert (parameter < 1).all()


class Zero(nn.Module):
    def forward(self, x, t):
        return torch.zeros_like(x)


def test_held_out_loss_of_the_zero_network_is_the_power_of_the_noise():
    model = DiffusionModel(Zero(), NoiseSchedule(linear_betas(100, 1e-4, 0.02)))
    images = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8)
    images = LabelledImages(images, torch.zeros(40, dtype=torch.int64))
    losses, t = held_out_losses(model, images, 40, CPU)
    assert losses.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(losses, held_out_losses(model, images, 7, CPU)[0])  # whatever the batch size
    assert t.min() >= 0 and t.max() < 100


def test_held_out_timesteps_cover_the_range_evenly():
    t = held_out_timesteps(1000, 100)
    assert torch.equal(torch.bincount(t, minlength=100), torch.full((100,), 10))
    assert held_out_timesteps(1, 100).tolist() == [50] and held_out_timesteps(7, 1).tolist() == [0] * 7


def test_losses_are_checked_now_and_then_without_a_log(tmp_path, monkeypatch):
    monkeypatch.setattr("modeling.training.trainer.CHECK_EVERY", 3)
    seen = []
    never = {name: 1000 for name in ("log_every", "evaluate_every", "sample_every", "checkpoint_every")}
    trainer = make(tmp_path, Recorder(), steps=8, **never)
    check = trainer._check_finite
    monkeypatch.setattr(trainer, "_check_finite", lambda *weights: [seen.append(trainer.step), check(*weights)])
    trainer.run()
    assert seen[:2] == [3, 6]


def test_weights_that_are_not_finite_are_found_before_a_checkpoint(tmp_path):
    trainer = make(tmp_path, Recorder(), steps=1)
    trainer._train_step()
    with torch.no_grad():
        trainer.parameters[0].flatten()[-1] = math.inf
    with pytest.raises(UserError, match="the weights of step 1 is not finite"):
        trainer._save()
    assert checkpoints(tmp_path) == []


def test_a_stop_within_a_report_saves_nothing_that_is_not_finite(tmp_path, monkeypatch):
    def losses(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return held_out_losses(*arguments)

    monkeypatch.setattr("modeling.training.trainer.held_out_losses", losses)
    wild = adam(lr=1e39, betas=[0.9, 0.99], warmup_steps=0)  # the loss of the first step is finite
    rare = {"log_every": 1000, "sample_every": 1000, "checkpoint_every": 1000}
    with stop_requests(), pytest.raises(UserError, match="the weights of step 1 is not finite"):
        make(tmp_path, Recorder(), optimizer=wild, evaluate_every=1, **rare).run()
    assert checkpoints(tmp_path) == []


def test_checkpoints_come_after_so_many_minutes_too(tmp_path):
    class Killed(Recorder):
        def stepped(self, step):
            if step == 4:
                raise KeyboardInterrupt

    for minutes, expected in ((1e-9, [2, 3]), (10.0, [])):
        folder = tmp_path / str(minutes)
        with pytest.raises(KeyboardInterrupt):
            make(folder, Killed(), checkpoint_every=1000, checkpoint_minutes=minutes).run()
        assert [read_checkpoint(path)["step"] for path in checkpoints(folder)] == expected


def test_no_memory_for_a_checkpoint_is_not_taken_for_damage(tmp_path, monkeypatch):
    trainer = make(tmp_path, Recorder(), steps=2)
    trainer.run()

    def full(*_):
        raise torch.OutOfMemoryError("full")

    again = make(tmp_path, Recorder(), steps=2)
    monkeypatch.setattr(again.model, "load_state_dict", full)
    with pytest.raises(torch.OutOfMemoryError):
        again.run()


def test_grids_and_held_out_losses_are_those_of_the_average(tmp_path):
    recorder = Recorder()
    trainer = make(tmp_path, recorder, steps=6, plain=True, optimizer=adam(lr=0.05, betas=[0.9, 0.99], warmup_steps=0))
    trainer.run()

    def grid_and_loss(model):
        c = trainer.config
        sampler = group(
            "sampler",
            "ddim",
            steps=c.sample_steps,
            clip_denoised=True,
            num_samples=c.sample_images,
            batch_size=64,
            seed=0,
        )
        images = draw_samples(model.eval(), sampler, range(c.sample_images), (3, 8, 8), CPU)
        losses, _ = held_out_losses(model, trainer.test, 250, CPU)
        return images, losses.double().mean().item()

    plain, plain_loss = grid_and_loss(trainer.model)
    averaged, averaged_loss = grid_and_loss(trainer.ema.model)
    assert torch.equal(recorder.grids[6], averaged) and not torch.equal(averaged, plain)
    assert recorder.rows[6]["held_out_loss"] == averaged_loss != plain_loss


def test_training_noise_is_normal(tmp_path):
    noise = torch.cat([make(tmp_path, Recorder()).source.inputs(k).noise.flatten() for k in range(50)]).double()
    n = len(noise)
    assert abs(noise.mean()) < 5 / n**0.5 and abs(noise.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((noise**4).mean() - 3) < 5 * (96 / n) ** 0.5


def test_a_state_beyond_the_last_step_is_not_trained_on(tmp_path):
    """Another process may have saved it after this one chose the folder."""
    make(tmp_path, Recorder(), steps=4).run()
    with pytest.raises(UserError, match="is of step 4 by now: run this again"):
        make(tmp_path, Recorder(), steps=2).run()


def test_a_report_that_was_stopped_is_no_time_of_training(tmp_path, monkeypatch):
    def losses(*arguments):
        time.sleep(3)
        os.kill(os.getpid(), signal.SIGTERM)
        return held_out_losses(*arguments)

    monkeypatch.setattr("modeling.training.trainer.held_out_losses", losses)
    rare = {"log_every": 1000, "sample_every": 1000, "checkpoint_every": 1000}
    with stop_requests(), pytest.raises(Stopped):
        make(tmp_path, Recorder(), evaluate_every=1, **rare).run()
    (saved,) = checkpoints(tmp_path)
    assert read_checkpoint(saved)["step"] == 1 and read_checkpoint(saved)["seconds"] < 3
