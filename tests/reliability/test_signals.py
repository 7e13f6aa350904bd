"""A stage whose DVC has ended; test_dvc_resume.py kills a real one."""

import os
import signal
from types import SimpleNamespace

import psutil
import pytest

from modeling.reliability import signals


class Above:
    """A process above this one that is seen so many times, and then is a zombie or gone."""

    def __init__(self, name, seen=0, end=psutil.STATUS_ZOMBIE):
        self.name = lambda: name
        self.seen, self.end = seen, end

    def is_running(self):
        return self.seen > 0 or self.end

    def status(self):
        self.seen -= 1
        if self.end is psutil.NoSuchProcess:
            raise psutil.NoSuchProcess(1)
        return psutil.STATUS_SLEEPING if self.seen >= 0 else self.end


@pytest.mark.parametrize("end", [psutil.STATUS_ZOMBIE, psutil.NoSuchProcess, None])
def test_a_stage_asks_itself_to_stop_once_dvc_has_ended(end, monkeypatch, caplog):
    dvc, events = Above("python3", 3, end), []
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(parents=lambda: [Above("sh"), dvc, Above("init")]))
    monkeypatch.setattr(signals.time, "sleep", lambda seconds: events.append(dvc.seen))
    monkeypatch.setattr(os, "kill", lambda *given: events.append(given))
    signals._stop_without_dvc()
    waited = [] if end is psutil.NoSuchProcess else [2, 1, 0]
    assert events == [*waited, (os.getpid(), signal.SIGTERM)] and "git switch main" in caplog.text


def test_in_a_container_nothing_but_a_shell_may_be_above(monkeypatch, caplog):
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(parents=lambda: [Above("bash")]))
    monkeypatch.setattr(os, "kill", lambda *given: pytest.fail("it stops"))
    signals._stop_without_dvc()
    assert not caplog.text
