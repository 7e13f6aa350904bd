"""What a training run says: in a terminal, and elsewhere."""

import logging
import sys

import pytest
import torch
from helpers.training import trainer_config

from modeling.reliability import terminal
from modeling.reporting.progress import Progress


@pytest.fixture
def run(monkeypatch, caplog):
    """Runs steps 11 to `end` of 50,000, each in some seconds; the first one takes `first` seconds."""
    caplog.set_level(logging.INFO)

    def run(isatty, seconds_a_step, device="cpu", end=20, first=None, **changes):
        now, asked = [0.0], []
        monkeypatch.setattr(terminal.time, "perf_counter", lambda: now[0])
        monkeypatch.setattr(sys.stderr, "isatty", lambda: isatty, raising=False)
        steps = 50_000 if end == 20 else end
        shown = Progress(trainer_config(steps=steps, batch_size=32, **changes), torch.device(device))
        shown.started(10)
        for step in range(11, end + 1):
            now[0] += first if first and step == 11 else seconds_a_step
            shown.stepped(step, lambda step=step: asked.append(step) or 0.5)
            row = {"loss": 0.25, "held_out_loss": 0.125} if step in (12, end) else {"loss": 0.25} if step == 14 else {}
            shown.logged(step, row)
        shown.close()
        return asked

    return run


def test_lines_tell_the_loss_each_half_minute_and_the_speed_of_this_process(run, caplog):
    """The first step is slow, and so was what came before."""
    assert run(False, 4.0, first=4.9) == [11, 19]  # the loss is read only then: nothing else waits for the device
    assert caplog.messages[0] == "going on after step 10"
    assert caplog.messages[1] == "training: 11/50000 steps, loss 0.5000"
    assert caplog.messages[2] == "8.0 images/s: 2 days for 49990 steps"
    assert "experiment=cifar10_cpu" in caplog.messages[3]
    assert caplog.messages[4:] == ["training: 19/50000 steps, loss 0.5000, held-out 0.1250, 8.0 images/s, 2 days left"]


def test_one_long_step_tells_how_long_all_of_them_take(run, caplog):
    run(False, 12.0, end=11, first=12.0)
    assert caplog.messages[1:2] == ["2.7 images/s: 12 s for 1 steps"]
    caplog.clear()
    run(False, 12.0, first=12.0)
    assert caplog.messages[1] == "2.7 images/s: 7 days for 49990 steps" and "experiment=demo" in caplog.messages[2]
    assert sum("images/s:" in line for line in caplog.messages) == 1


@pytest.mark.parametrize("unsteady", [{"compile": True}, {"device": "cuda"}])
def test_a_first_step_that_compiles_tells_nothing(run, monkeypatch, caplog, unsteady):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    run(False, 3.0, first=60.0, **unsteady)
    assert "10.7 images/s: 41.7 h for 49990 steps" in caplog.text and "days for" not in caplog.text
    cuda = unsteady.get("device") == "cuda"
    assert len(waits) == 4 * cuda and ("long for a CPU" in caplog.text) != cuda


def test_the_last_step_has_a_line(run, caplog):
    assert run(False, 0.1, end=12) == [11]
    assert caplog.messages[2:] == ["training: 12/12 steps, loss 0.2500, held-out 0.1250, 320.0 images/s"]


def test_a_terminal_gets_one_live_bar(run, capsys, caplog):
    run(True, 3.0)
    shown = capsys.readouterr().err
    assert "20/50000 steps" in shown and "loss 0.5000" in shown and "loss 0.2500, held-out 0.1250" in shown
    assert caplog.messages == ["going on after step 10", "10.7 images/s: 41.7 h for 49990 steps", caplog.messages[2]]


def test_closing_before_the_start_is_harmless(caplog):
    caplog.set_level(logging.INFO)
    shown = Progress(trainer_config(), torch.device("cpu"))
    shown.close()
    shown.started(0)
    shown.close()
    assert not caplog.messages
