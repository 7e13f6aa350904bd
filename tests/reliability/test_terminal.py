"""Log lines, the progress of long work, and closed standard streams."""

import io
import logging
import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from helpers.pipeline import ROOT, TINY, environment

from modeling.distributed.shares import sharded_batches
from modeling.reliability import terminal
from modeling.reliability.terminal import Bar, counted, counts, duration, progress, shorten_log


def test_durations():
    shown = [duration(s) for s in (0.4, 89, 120, 5400, 172800)]
    assert shown == ["0 s", "89 s", "2 min", "1.5 h", "2 days"]


def test_counts_name_the_most_frequent():
    assert counts({"a": 2, "b": 3000, "c": 2}) == "3,000 b, 2 a, 2 c"
    many = counts({str(k): 1 for k in range(terminal.NAMED + 5)})
    assert many.startswith("1 0, 1 1, ") and many.endswith(f"1 {terminal.NAMED - 1}, 5 more")


@pytest.fixture
def clock(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    now = [100.0]
    monkeypatch.setattr(terminal.time, "perf_counter", lambda: now[0])
    return now


def test_a_line_each_half_minute_where_there_is_no_terminal(clock, caplog):
    """The time left is that of this process, without its first, slow part."""
    with progress("features", 100, done=20) as shown:
        assert shown.rate() == 0 and not shown.live
        shown.show("")
        for seconds, more in ((29, 10), (9, 20), (30, 15), (30.5, 15)):
            clock[0] += seconds
            shown.advance(more)
    assert caplog.messages == [
        "features: 20/100 images",
        "features: 50/100 images, 22 s left",
        "features: 80/100 images, 28 s left",
    ]


def test_a_part_counts_in_the_whole_of_its_name(clock, caplog):
    with progress("sampling", 6) as whole:
        with progress("sampling", 2) as part:
            assert part is whole
        with progress("features", 2) as other:
            assert other is not whole
        table = sharded_batches("sampling", 3, 2, lambda rows, tell: tell(7.0) or torch.tensor(rows), torch.empty(0))
        assert whole.done == 3 and table.tolist() == [0, 1, 2]
    assert not terminal._open and [*counted("parts", range(3), "parts")] == [0, 1, 2]


def test_batches_tell_how_far_they_are(clock, monkeypatch):
    told = []
    monkeypatch.setattr(Bar, "to", lambda self, done: told.append(done))
    sharded_batches("x", 3, 2, lambda rows, tell: tell(0.5) or torch.tensor(rows), torch.empty(0))
    assert told == [1, 2, 2.5, 3]


def test_only_the_first_process_has_a_bar(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    live = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        bar = Bar("x", 2)
        live.append(bar.live)
        bar.close()
    assert live == [True, False]


def test_lines_are_short_and_of_this_project(monkeypatch, capsys):
    """A bar in the terminal goes on below them."""
    root = logging.Logger("root", logging.INFO)
    root.manager = logging.Manager(root)
    root.addHandler(logging.StreamHandler(sys.stdout))
    file = logging.FileHandler(os.devnull)
    root.addHandler(file)
    monkeypatch.setattr(logging, "getLogger", lambda name=None: root.manager.getLogger(name) if name else root)
    shorten_log()
    logging.getLogger("modeling.x").info("fine")
    logging.getLogger("modeling.x").warning("hm")
    logging.getLogger("matplotlib").info("generated new fontManager")
    lines = capsys.readouterr().out.splitlines()
    assert [line[8:] for line in lines] == [" fine", " WARNING: hm"] and all(line[2] == ":" for line in lines)
    assert type(root.handlers[0]) is logging.FileHandler
    root.setLevel(logging.DEBUG)  # hydra.verbose=true
    shorten_log()
    assert root.level == logging.DEBUG


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "| true"])
def test_closed_streams_end_no_run(tmp_path, closed):
    command = [sys.executable, str(ROOT / "main.py"), *TINY, f"out_dir={tmp_path}", "trainer.steps=2"]
    env = environment(tmp_path, WANDB_MODE="disabled")
    shell = f'set -o pipefail; "$@" {closed}'
    done = subprocess.run(
        ["bash", "-c", shell, "bash", *command], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "reports/evaluate.json").exists() and ("bits/dim" in done.stdout) == (closed == "2>&-")


def test_a_bar_needs_no_semaphore_of_the_system(monkeypatch):
    """A process that is killed would leave it behind, and Python 3.14 would say so."""
    monkeypatch.delattr("tqdm.tqdm._lock", raising=False)
    monkeypatch.delattr("tqdm.std.TqdmDefaultWriteLock.mp_lock", raising=False)  # made once in a process
    made = Mock()
    monkeypatch.setattr("multiprocessing.RLock", made)
    terminal._Lines(io.StringIO()).handle(logging.makeLogRecord({"msg": "a line"}))
    Bar("x", 1).close()
    assert not made.called
