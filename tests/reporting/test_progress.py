"""The progress bar in a terminal, and the lines elsewhere."""

import logging
import sys

import pytest
import torch

from modeling.reporting import progress
from modeling.reporting.progress import Progress, duration


def test_durations():
    shown = [duration(s) for s in (0.4, 89, 120, 5400, 172800)]
    assert shown == ["0 s", "89 s", "2 min", "1.5 h", "2 days"]


@pytest.fixture
def run(monkeypatch, caplog):
    """Runs steps 11 to `end` of 50,000, each in some seconds."""
    caplog.set_level(logging.INFO)

    def run(terminal, seconds_a_step, device="cpu", end=20):
        now = [0.0]
        monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
        shown = Progress(50_000 if end == 20 else end, 32, torch.device(device))
        shown.started(10)
        for step in range(11, end + 1):
            now[0] += seconds_a_step
            shown.stepped(step)
            row = {"loss": 0.5, "held_out_loss": 0.25} if step == 11 else {"loss": 0.5} if step % 2 == 0 else {}
            shown.logged(step, row, now[0] + 10 * seconds_a_step)
        shown.close()

    return run


def test_plain_lines_are_few_and_estimate_the_time(run, caplog):
    run(False, 6.0)
    assert caplog.messages[:2] == ["going on after step 10", "5.3 images/s: 3 days for 49990 steps"]
    assert "experiment=cifar10_cpu" in caplog.messages[2]
    assert caplog.messages[3:] == ["step 16/50000: loss 0.5000, held-out 0.2500, 5.3 images/s, 3 days left"]


def test_the_last_step_has_a_line(run, caplog):
    run(False, 0.1, end=12)
    assert caplog.messages[1:] == ["step 12/12: loss 0.5000, held-out 0.2500, 320.0 images/s, 0 s left"]


def test_a_terminal_gets_one_live_bar(run, capsys, caplog):
    run(True, 3.0)
    shown = capsys.readouterr().err
    assert "20/50000" in shown and "loss 0.5000, held-out 0.2500" in shown
    assert "10.7 images/s: 41.7 h for 49990 steps" in shown
    assert caplog.messages == ["going on after step 10"]


def test_the_estimate_on_cuda_waits_for_the_device(run, monkeypatch, caplog):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    run(False, 6.0, "cuda")
    assert len(waits) == 2 and "3 days for 49990 steps" in caplog.text and "long for a CPU" not in caplog.text


def test_closing_before_the_start_is_harmless(caplog):
    caplog.set_level(logging.INFO)
    shown = Progress(1, 1, torch.device("cpu"))
    shown.close()
    shown.started(0)
    shown.close()
    assert not caplog.messages
