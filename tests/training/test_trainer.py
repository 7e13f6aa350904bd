"""The training loop: its randomness, its schedule, and that a stopped run goes on bit for bit."""

import copy
import math
import os
import signal
import time

import pytest
import torch
from helpers.configs import group
from helpers.cuda import NEEDS_CUDA
from helpers.training import CPU, DIFFUSION, SMALL, Recorder, adam, make, sgd, weights
from torch._dynamo.utils import counters

from modeling.build import build_model
from modeling.checkpoints.checkpoint import Damaged, checkpoints, read_checkpoint
from modeling.diffusion.layers import Dropout
from modeling.inference.device import Compute, choose_compute
from modeling.inference.held_out import held_out_losses
from modeling.inference.samples import draw_samples
from modeling.reliability.errors import Stopped, UserError, explain
from modeling.reliability.signals import stop_requests
from modeling.seeds import step_seed
from modeling.training.state import CheckpointFolder

RARE = {"log_every": 1000, "sample_every": 1000, "checkpoint_every": 1000}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    recorder = Recorder()
    trainer = make(tmp_path_factory.mktemp("whole"), recorder)
    trainer.run()
    return weights(trainer), recorder


def stopped(folder, step, **changes):
    """What was recorded of a run that a signal stopped after `step`."""
    recorder = Recorder(stop_at=step)
    with stop_requests(), pytest.raises(Stopped, match=f"after step {step}, all work is saved"):
        make(folder, recorder, **changes).run()
    assert read_checkpoint(checkpoints(folder)[-1])["step"] == step
    return recorder


def check_resumed(folder, recorder, start, whole):
    """The same command again: it goes on at `start`, and all is as in a run that nothing disturbed."""
    recorder.stop_at = recorder.kill_at = None
    trainer = make(folder, recorder)
    trainer.run()
    assert recorder.starts == [0, start]
    assert torch.equal(weights(trainer), whole[0]) and recorder.rows == whole[1].rows
    assert recorder.grids.keys() == whole[1].grids.keys()
    assert all(torch.equal(recorder.grids[k], grid) for k, grid in whole[1].grids.items())


def test_events_happen_when_they_are_due(whole):
    _, recorder = whole
    assert recorder.starts == [0] and recorder.steps == list(range(1, 11))
    assert [s for s, row in recorder.rows.items() if "loss" in row] == [3, 6, 9, 10]
    assert [s for s, row in recorder.rows.items() if "held_out_loss" in row] == [5, 10]
    assert list(recorder.grids) == [7, 10] and recorder.grids[7].shape == (2, 3, 8, 8)
    assert recorder.rows[9]["images"] == 36


@pytest.mark.parametrize("step", [1, 3, 5, 6, 8])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, whole, step):
    check_resumed(tmp_path, stopped(tmp_path, step), step, whole)


def test_a_killed_run_goes_on_from_the_last_checkpoint(tmp_path, whole):
    recorder = Recorder(kill_at=7)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, recorder).run()
    check_resumed(tmp_path, recorder, 4, whole)


@pytest.mark.parametrize("steps", [7, 10])
def test_a_finished_run_is_extended_but_trains_nothing_again(tmp_path, whole, steps):
    recorder = Recorder()
    make(tmp_path, recorder, steps=steps, guide_at=4.5 / steps).run()
    check_resumed(tmp_path, recorder, steps, whole)
    assert recorder.steps == list(range(1, 11))


@pytest.mark.parametrize(("guide_at", "step"), [(0.01, 1), (0.4, 4), (0.45, 5), (0.7 + 1e-16, 7), (0.99, 10)])
def test_the_guide_is_the_average_of_its_step(tmp_path, guide_at, step):
    averages = {}

    class Watch(Recorder):
        def stepped(self, step, loss):
            averages[step] = {name: w.clone() for name, w in trainer.ema.model.network.state_dict().items()}

    trainer = make(tmp_path, Watch(), guide_at=guide_at, **RARE)
    trainer.run()
    assert trainer.state.guide.keys() == averages[step].keys()
    assert all(torch.equal(weight, averages[step][name]) for name, weight in trainer.state.guide.items())


def test_a_run_that_starts_later_than_its_guide_takes_what_it_starts_from(tmp_path):
    """A checkpoint of a run without one, taken up with trainer.resume; and the other way round."""
    make(tmp_path / "a", steps=6, guide_at=None).run()
    start = checkpoints(tmp_path / "a")[-1]
    average = read_checkpoint(start)["ema"]["model"]
    trainer = make(tmp_path / "b", guide_at=0.2)
    trainer.folder = CheckpointFolder(tmp_path / "b", start=start)
    trainer.run()
    assert {f"network.{name}" for name in trainer.state.guide} == average.keys()
    assert all(torch.equal(weight, average[f"network.{name}"]) for name, weight in trainer.state.guide.items())
    longer = make(tmp_path / "d", guide_at=0.9)  # that of step 6, which comes with the checkpoint, is not its own
    longer.folder = CheckpointFolder(tmp_path / "d", start=checkpoints(tmp_path / "b")[0])
    longer.run()
    assert not torch.equal(longer.state.guide["conv_in.weight"], trainer.state.guide["conv_in.weight"])
    without = make(tmp_path / "c", guide_at=None)
    without.folder = CheckpointFolder(tmp_path / "c", start=checkpoints(tmp_path / "b")[-1])
    without.run()
    assert without.state.guide is None


def test_a_guide_of_another_network_is_damage(tmp_path):
    trainer = make(tmp_path, steps=5)
    trainer.run()
    state = read_checkpoint(checkpoints(tmp_path)[-1])
    for wrong in ({"w": torch.zeros(1)}, 3, {name: weight[:1] for name, weight in state["guide"].items()}):
        with pytest.raises(Damaged):
            trainer.state.load_state_dict(state | {"guide": wrong})


def test_a_state_beyond_the_last_step_is_not_trained_on(tmp_path):
    """Another process may have saved it after this one chose the folder."""
    make(tmp_path, steps=4).run()
    with pytest.raises(UserError, match="is of step 4 by now: run this again"):
        make(tmp_path, steps=2).run()


def test_state_of_another_device_is_said(tmp_path, caplog):
    make(tmp_path, steps=1).run()
    again = make(tmp_path, steps=2)
    state = read_checkpoint(checkpoints(tmp_path)[-1])
    again.state.load_state_dict(state)
    assert not caplog.text
    again.state.load_state_dict(state | {"device": "cuda"})
    assert "the state was made on cuda: random numbers differ on cpu" in caplog.text


def test_no_memory_for_a_checkpoint_is_not_taken_for_damage(tmp_path, monkeypatch):
    make(tmp_path, steps=2).run()
    again = make(tmp_path, steps=2)

    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(again.model, "load_state_dict", full)
    with pytest.raises(torch.OutOfMemoryError):
        again.run()


@pytest.mark.parametrize("optimizer", [adam(), sgd(momentum=0.9)], ids=lambda config: config.name)
def test_moments_take_the_layout_of_the_parameters(tmp_path, optimizer):
    """A checkpoint of a CPU, taken up in the layout of CUDA: fused kernels read memory, not indices."""
    make(tmp_path, optimizer=optimizer, steps=4).run()
    again = make(tmp_path, optimizer=optimizer, steps=4)
    again.model.to(memory_format=torch.channels_last)
    again.state.resume(CheckpointFolder(tmp_path), 4)
    kept = read_checkpoint(checkpoints(tmp_path)[-1])["optimizer"]["state"]
    for k, parameter in enumerate(again.parameters):
        for name, moment in again.optimizer.state[parameter].items():
            if moment is not None and moment.shape == parameter.shape:
                assert moment.stride() == parameter.stride() and torch.equal(moment, kept[k][name])


def test_reports_change_nothing_and_a_logged_loss_is_the_mean_since_the_last(tmp_path, whole):
    recorder = Recorder()
    trainer = make(tmp_path, recorder, evaluate_every=1, sample_every=2, log_every=1)
    trainer.run()
    assert torch.equal(weights(trainer), whole[0])
    losses = [recorder.rows[step]["loss"] for step in (4, 5, 6)]
    assert whole[1].rows[6]["loss"] == pytest.approx(sum(losses) / 3)


def test_grids_and_held_out_losses_are_those_of_the_average(tmp_path):
    recorder = Recorder()
    trainer = make(tmp_path, recorder, steps=6, plain=True, optimizer=adam(lr=0.05, warmup_steps=0))
    trainer.run()

    def grid_and_loss(model):
        images = draw_samples(model.eval(), group("sampler", "unipc", steps=2), range(2), (3, 8, 8), CPU)
        losses, _ = held_out_losses(model, trainer.test, 250, CPU)
        return images, losses.double().mean().item()

    plain, plain_loss = grid_and_loss(trainer.model)
    averaged, averaged_loss = grid_and_loss(trainer.ema.model)
    assert torch.equal(recorder.grids[6], averaged) and not torch.equal(averaged, plain)
    assert recorder.rows[6]["held_out_loss"] == averaged_loss != plain_loss


def drawn(stream, step):
    return torch.Generator().manual_seed(step_seed(0, stream, step))


@pytest.mark.parametrize(
    ("micro_batch_size", "parts"),
    [(None, {"dropout": slice(4)}), (3, {"dropout": slice(3), "dropout 3": slice(3, 4)})],
)
def test_steps_are_the_definition(tmp_path, micro_batch_size, parts):
    """Weights, EMA and logged values of six SGD steps: in plain PyTorch, from the functions of (seed, step)."""
    network = group("model", "tiny", **SMALL, dropout=0.5, class_conditional=True)
    optimizer = sgd(lr=0.2, warmup_steps=3, lr_decay="linear", grad_clip=0.7)  # clips some of the steps
    often = RARE | {"steps": 6, "log_every": 2, "evaluate_every": 3, "sample_every": 3, "ema_decay": 0.3}
    recorder = Recorder()
    options = {"label_dropout": 0.5, "random_flip": True, "micro_batch_size": micro_batch_size}
    trainer = make(tmp_path, recorder, optimizer, network, **often, **options)
    images, true_labels = trainer.source.batches.images, trainer.source.batches.all_labels
    generator = torch.Generator().manual_seed(0)
    # Its ends are zero, and hide the rest.
    for parameter, averaged in zip(trainer.parameters, trainer.ema.model.parameters(), strict=True):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        averaged.data.copy_(parameter)
    reference = copy.deepcopy(trainer.model).train()
    average = [p.detach().clone() for p in reference.parameters()]
    alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-3, 0.2, 20, dtype=torch.float64), 0)
    order = torch.cat([torch.randperm(10, generator=drawn("order", epoch)) for epoch in range(3)])
    losses, norms, rates = [], [], []
    for step in range(6):
        chosen = order[4 * step : 4 * step + 4]
        x_0 = images[chosen] / 127.5 - 1
        flipped = torch.rand(4, generator=drawn("flip", step)) < 0.5
        x_0[flipped] = x_0[flipped].flip(3)
        withheld = torch.rand(4, generator=drawn("label dropout", step)) < 0.5
        y = true_labels[chosen].masked_fill(withheld, 2)
        generator = drawn("noise", step)
        t, noise = torch.randint(20, (4,), generator=generator), torch.randn(x_0.shape, generator=generator)
        a = alphas_cumprod[t].float().reshape(4, 1, 1, 1)
        x_t = a.sqrt() * x_0 + (1 - a).sqrt() * noise
        loss = 0.0
        for stream, rows in parts.items():
            torch.manual_seed(step_seed(0, stream, step))
            error = reference.network(x_t[rows], t[rows], y[rows]) - noise[rows]
            loss = loss + error.square().sum() / noise.numel()
        gradients = torch.autograd.grad(loss, list(reference.parameters()))
        norm = torch.cat([g.flatten() for g in gradients]).norm().item()
        rate = 0.2 * min((step + 1) / 3, 1) * (1 - step / 6)
        decay = min(0.3, (1 + step) / (10 + step))
        for k, (parameter, gradient) in enumerate(zip(reference.parameters(), gradients, strict=True)):
            parameter.data -= rate * min(1, 0.7 / norm) * gradient
            average[k] = decay * average[k] + (1 - decay) * parameter.detach()
        if step + 1 == 3:  # the first after 0.45 of the steps
            guide = [each.clone() for each in average]
        losses, norms, rates = [*losses, loss.item()], [*norms, norm], [*rates, rate]
    trainer.run()
    expected = torch.cat([p.detach().flatten() for p in (*reference.parameters(), *average, *guide)])
    torch.testing.assert_close(weights(trainer), expected, rtol=0, atol=1e-6)
    for step in (2, 4, 6):
        row = recorder.rows[step]
        assert row["loss"] == pytest.approx((losses[step - 2] + losses[step - 1]) / 2, rel=1e-5)
        assert row["grad_norm"] == pytest.approx((norms[step - 2] + norms[step - 1]) / 2, rel=1e-5)
        assert row["lr"] == pytest.approx(rates[step - 1])


V = {"prediction_type": "v_prediction"}
# Each value of each key in one of them at least: (schedule, its group's changes, class-conditional).
OPTIONS = {
    "none": ("linear", {}, False),
    "sample, cosine": ("cosine", {"prediction_type": "sample"}, False),
    "v, sigmoid, labels": ("sigmoid", V, True),
    "min-SNR": ("linear", V | {"min_snr_gamma": 5.0}, False),
    "learned, labels": ("linear", {"variance": "learned"}, True),
    "all": ("sigmoid", V | {"variance": "learned", "min_snr_gamma": 5.0}, True),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_learns(tmp_path, option):
    """A loss that falls, and a held-out loss in the space of the noise that falls with it; sampling runs."""
    schedule, changes, conditional = OPTIONS[option]
    changes = {"num_timesteps": 20, "variance": "fixed_small"} | changes
    if schedule == "linear":
        changes |= {"beta_start": 1e-3, "beta_end": 0.2}
    network = group("model", "tiny", **SMALL, dropout=0.1, class_conditional=conditional)
    often = RARE | {"steps": 80, "log_every": 20, "evaluate_every": 20, "label_dropout": 0.2 if conditional else 0.0}
    diffusion = group("diffusion", schedule, **changes)
    recorder = Recorder()
    make(tmp_path, recorder, adam(lr=5e-3), network, diffusion, plain=True, **often).run()
    first, last = recorder.rows[20], recorder.rows[80]
    assert last["loss"] < 0.8 * first["loss"] and last["held_out_loss"] < 0.8 * first["held_out_loss"]
    assert recorder.grids[80].shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"micro_batch_size": 1}, [4, 2] + [4] * 17 + [2]),
        ({"batch_size": 3}, [6] + [12] * 5 + [10]),
        ({"batch_size": 3, "micro_batch_size": 64}, [6] + [12] * 5 + [10]),
        ({"batch_size": 100}, [6, 64, 6]),
    ],
)
def test_what_needs_no_gradients_needs_no_more_memory(tmp_path, changes, sizes):
    """The 6 held-out images, and a grid of 70, in batches of at most four times those of a training step."""
    seen, often = [], RARE | {"steps": 1, "sample_images": 70, "sample_steps": 1, "batch_size": 4}
    trainer = make(tmp_path, **often | changes)
    trainer.ema.model.network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    trainer.run()
    assert seen == sizes


def test_non_finite_loss_ends_the_run_and_spares_the_checkpoint(tmp_path):
    with pytest.raises(UserError, match="not finite"):
        make(tmp_path, optimizer=adam(lr=1e30, warmup_steps=0), checkpoint_every=1).run()
    assert all(torch.stack([*torch.load(path)["sums"].values()]).isfinite().all() for path in checkpoints(tmp_path))


def test_losses_are_checked_now_and_then_without_a_log(tmp_path, monkeypatch):
    monkeypatch.setattr("modeling.training.trainer.CHECK_EVERY", 3)
    seen = []
    trainer = make(tmp_path, steps=8, evaluate_every=1000, **RARE)
    check = trainer._check_finite
    monkeypatch.setattr(trainer, "_check_finite", lambda *weights: [seen.append(trainer.step), check(*weights)])
    trainer.run()
    assert seen[:2] == [3, 6]


def test_weights_that_are_not_finite_are_found_before_a_checkpoint(tmp_path):
    trainer = make(tmp_path, steps=1)
    trainer.train_step()
    with torch.no_grad():
        trainer.parameters[0].flatten()[-1] = math.inf
    with pytest.raises(UserError, match="the weights of step 1 is not finite"):
        trainer._save()
    assert checkpoints(tmp_path) == []


@pytest.fixture
def stop_in_report(monkeypatch):
    """A signal comes while the held-out loss is computed, which then takes 0.5 seconds."""

    def losses(*arguments):
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        return held_out_losses(*arguments)

    monkeypatch.setattr("modeling.training.trainer.held_out_losses", losses)
    with stop_requests():
        yield


def test_a_stop_within_a_report_saves_nothing_that_is_not_finite(tmp_path, stop_in_report):
    wild = adam(lr=1e39, warmup_steps=0)  # the loss of the first step is finite
    with pytest.raises(UserError, match="the weights of step 1 is not finite"):
        make(tmp_path, optimizer=wild, evaluate_every=1, **RARE).run()
    assert checkpoints(tmp_path) == []


def test_a_report_that_was_stopped_is_no_time_of_training(tmp_path, stop_in_report):
    trainer = make(tmp_path, evaluate_every=1, **RARE)
    started = time.perf_counter()
    with pytest.raises(Stopped):
        trainer.run()
    (saved,) = checkpoints(tmp_path)
    assert read_checkpoint(saved)["step"] == 1
    assert read_checkpoint(saved)["seconds"] < time.perf_counter() - started - 0.5


@pytest.mark.parametrize(("minutes", "expected"), [(1e-9, [2, 3]), (10.0, [])])
def test_checkpoints_come_after_so_many_minutes_too(tmp_path, minutes, expected):
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, Recorder(kill_at=4), checkpoint_every=1000, checkpoint_minutes=minutes).run()
    assert [read_checkpoint(path)["step"] for path in checkpoints(tmp_path)] == expected


def test_a_compiled_run_goes_on_bit_for_bit_and_agrees_with_one_that_is_not(tmp_path, record_deviation):
    """With a compiler on the machine; without one, the error names trainer.compile=false."""
    small = {"model_channels": 8, "channel_mult": [1], "attention_resolutions": [], "norm_groups": 4}
    smallest = group("model", "tiny", **small, num_res_blocks=1, dropout=0.0)

    def run(name, recorder, compile=True):
        torch.compiler.reset()  # as in another process
        trainer = make(tmp_path / name, recorder, model=smallest, steps=4, checkpoint_every=2, compile=compile)
        trainer.run()
        return trainer

    compiled, plain, rest = Recorder(), Recorder(), Recorder()
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
    checkpoints(tmp_path / "whole")[-1].unlink()
    assert torch.equal(weights(run("whole", rest)), weights(whole)) and rest.starts == [2]
    # What a compiled network drops is decided by the seed of the step too.
    dropping = CPU.compiled(Dropout(0.5).train(), True)

    def dropped(seed):
        torch.manual_seed(seed)
        return dropping(torch.ones(64)) == 0

    assert torch.equal(dropped(1), dropped(1)) and not torch.equal(dropped(1), dropped(2))


@NEEDS_CUDA
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_on_cuda_goes_on_where_it_stopped_bit_for_bit(tmp_path, precision, request):
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    cuda = choose_compute("cuda", precision, deterministic=True)
    whole = make(tmp_path / "whole", compute=cuda)
    whole.run()
    stopped(tmp_path / "part", 5, compute=cuda)
    rest = make(tmp_path / "part", compute=cuda)
    rest.run()
    assert all(p.is_cuda for p in rest.parameters)
    assert torch.equal(weights(rest), weights(whole))


@pytest.mark.parametrize(
    ("dropout", "micro_batch_size", "expected"),
    [(0.0, None, True), (0.0, 4, True), (0.0, 2, False), (0.1, None, False)],
)
def test_passes_are_replayed_where_nothing_is_drawn_and_no_gradient_must_last(
    tmp_path, monkeypatch, dropout, micro_batch_size, expected
):
    asked = []
    monkeypatch.setattr(Compute, "compiled", lambda self, function, wanted, replayed: asked.append((wanted, replayed)))
    make(tmp_path, model=group("model", "tiny", **SMALL, dropout=dropout), micro_batch_size=micro_batch_size)
    assert asked == [(None, expected)]


@NEEDS_CUDA
def test_replayed_steps_on_cuda_are_those_that_are_called_one_by_one(tmp_path, monkeypatch):
    """With evaluation and sampling in between, which use the same memory; but for the order of atomic additions."""
    cuda, model = choose_compute("cuda", "fp32"), group("model", "tiny", **SMALL, dropout=0.0)

    class Watch(Recorder):
        def stepped(self, step, loss):
            gradients.append([p.grad.data_ptr() for p in trainer.parameters])

    def run(name):
        nonlocal trainer
        torch.compiler.reset()
        gradients.clear()
        recorder = Watch()
        trainer = make(tmp_path / name, recorder, group("optimizer", "muon"), model, compute=cuda, compile=True)
        trainer.run()
        return weights(trainer).cpu(), recorder

    trainer, gradients = None, []
    counters.clear()
    replayed, seen = run("replayed")
    assert not counters["inductor"]["cudagraph_skips"]
    assert all(places == gradients[3] for places in gradients[3:])  # once all is recorded
    compiled = Compute.compiled
    monkeypatch.setattr(Compute, "compiled", lambda self, function, wanted, replayed: compiled(self, function, wanted))
    called, expected = run("called")
    torch.testing.assert_close(replayed, called, rtol=1e-3, atol=1e-3)
    assert seen.rows.keys() == expected.rows.keys() and seen.grids.keys() == expected.grids.keys()
    for step, row in expected.rows.items():
        assert seen.rows[step] == pytest.approx(row, rel=1e-3)


@NEEDS_CUDA
def test_gradients_in_bf16_on_cuda_are_those_of_float32():
    """At the paper's width of an attention head, 256, for which CUDA has kernels of its own."""
    wide = {"model_channels": 128, "channel_mult": [1, 2], "attention_resolutions": [16], "norm_groups": 32}
    network = group("model", "tiny", **wide, num_res_blocks=1, num_heads=1, dropout=0.0)
    model = build_model(network, DIFFUSION, (3, 32, 32), 0, 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # the ends are zero, and hide the rest
        parameter.data.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    x, noise = torch.randn(2, 8, 3, 32, 32, generator=generator)
    t = torch.randint(20, (8,), generator=generator)
    found = []
    for precision in ("fp32", "bf16"):
        compute = choose_compute("cuda", precision)
        compute.place_model(model).zero_grad()
        with compute.autocast():
            model(x.cuda(), t.cuda(), noise.cuda()).mean().backward()
        found.append(torch.cat([p.grad.flatten().double().cpu() for p in model.parameters()]))
    exact, fast = found
    assert (fast - exact).norm() < 0.05 * exact.norm()


@NEEDS_CUDA
def test_a_step_on_cuda_waits_for_nothing(tmp_path):
    """Until it is logged, no value comes back and no transfer is waited for."""
    trainer = make(tmp_path, compute=choose_compute("cuda", "auto"), compile=False)
    trainer.train_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@NEEDS_CUDA
def test_a_run_moves_from_cpu_to_cuda_and_back(tmp_path):
    for k, compute in enumerate((CPU, choose_compute("cuda", "fp32"), CPU), 1):
        recorder = Recorder()
        make(tmp_path, recorder, compute=compute, steps=4 * k).run()
        assert recorder.starts == [4 * (k - 1)]
