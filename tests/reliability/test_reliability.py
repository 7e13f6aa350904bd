"""Errors with a line for the user, atomic files, locks, and stop requests, all in this process."""

import errno
import json
import math
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch

from modeling.reliability import files, signals
from modeling.reliability.errors import ConfigError, Stopped, UserError, explain, short


def test_errors_of_the_machine_have_a_line_and_bugs_have_none():
    full = OSError(errno.ENOSPC, "No space left on device", "x.pt")
    assert explain(full, "train") == "x.pt: No space left on device; run the same command again once that is mended"
    assert explain(OSError(errno.ENOENT, "absent"), "train") is None and explain(KeyError("x"), "train") is None
    for error in (MemoryError(), RuntimeError("CUDA error: out of memory\nSearch for cudaErrorMemoryAllocation")):
        assert "lower sampler.batch_size" in explain(error, "sample")
    assert explain(RuntimeError("CUDA error: device-side assert triggered"), "sample") is None
    compiler = torch._dynamo.exc.TorchDynamoException("no C++\ncompiler")
    assert "torch.compile failed (no C++ compiler)" in explain(compiler, "train")
    assert short(ValueError("a\n  b")) == "a b" and len(short(ValueError("x" * 999))) == 160
    assert short(MemoryError()) == "MemoryError"


# Signals


def test_the_first_signal_is_a_request_and_the_second_would_end_the_process():
    before = signal.getsignal(signal.SIGINT)
    with signals.stop_requests():
        assert not signals.stop_requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.stop_requested()
        with pytest.raises(Stopped):
            signals.poll()
        assert {signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} == {signal.SIG_DFL}
    assert not signals.stop_requested() and signal.getsignal(signal.SIGINT) is before


def test_a_worker_of_torchrun_survives_the_second_signal(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with signals.stop_requests():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped), signals.stopped_at_once():
            pytest.fail("it has begun")


def test_a_long_call_is_stopped_at_once():
    with signals.stop_requests(), pytest.raises(Stopped), signals.stopped_at_once():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)


def test_a_request_to_the_launcher_or_another_worker_counts(tmp_path, monkeypatch):
    signals.stop_workers()
    monkeypatch.setenv("MODELING_JOB", str(tmp_path))
    signals.poll()
    signals.stop_workers()
    with pytest.raises(Stopped):
        signals.poll()


def test_the_command_that_resumes_is_the_one_that_was_typed(monkeypatch):
    for name in ("DVC_STAGE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    assert signals.resume_command(["main.py", "data.path=a b"]) == "python main.py 'data.path=a b'"
    never = ["main.py", "trainer.resume=never", "seed=1"]
    assert signals.resume_command(never) == "python main.py trainer.resume=never seed=1"  # nothing to resume yet
    assert signals.resume_command(never, "never") == "python main.py seed=1 trainer.resume=auto"
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert signals.resume_command(never) == "the same command"  # of srun, say
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert signals.resume_command(never) == "the same torchrun command"
    monkeypatch.setenv("DVC_STAGE", "train")
    assert signals.resume_command(never) == "the same dvc command"
    assert signals.resume_command(never, "never") == "the same dvc command with trainer.resume=auto"


# Files


def test_state_root(monkeypatch):
    monkeypatch.setenv("DVC_ROOT", "/elsewhere")
    assert files.state_root() == Path("/elsewhere")
    monkeypatch.delenv("DVC_ROOT")
    assert (files.state_root() / "main.py").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    files.write_atomic(tmp_path / "x", b"old")
    with pytest.raises(UserError, match="x cannot be written: disk"), files.replacing(tmp_path / "x") as partial:
        partial.write_bytes(b"new")
        raise OSError("disk")
    with pytest.raises(RuntimeError, match="allocate"), files.replacing(tmp_path / "x"):
        torch.empty(2**60, dtype=torch.uint8)
    assert (tmp_path / "x").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    for path in (tmp_path / "x" / "y", tmp_path):  # below a file, and in place of a folder
        with pytest.raises(UserError, match="cannot be written"):
            files.write_atomic(path, b"")
    with pytest.raises(UserError, match="cannot be written"):
        files.make_writable(tmp_path / "x")


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "samples"
    target.mkdir()
    for name in ("1.png", "2.png", "notes.txt"):
        (target / name).touch()
    with (
        pytest.raises(UserError, match="samples cannot be written: disk"),
        files.replacing_folder(target, "*.png") as partial,
    ):
        (partial / "3.png").touch()
        raise OSError("disk")
    assert {path.name for path in target.iterdir()} == {"1.png", "2.png", "notes.txt"}
    target.rename(tmp_path / ".samples.old")  # as a kill between the two renames leaves it
    with files.replacing_folder(target, "*.png") as partial:
        assert (target / "1.png").exists()
        (partial / "3.png").touch()
    assert {path.name for path in target.iterdir()} == {"3.png", "notes.txt"} and len(list(tmp_path.iterdir())) == 1


def test_partial_files_are_dropped_by_age(tmp_path):
    (tmp_path / ".a.partial").touch()
    files.drop_partial(tmp_path, ".*", older_than=60)
    assert (tmp_path / ".a.partial").exists()
    files.drop_partial(tmp_path, ".*")
    assert not (tmp_path / ".a.partial").exists()


def test_a_lock_is_waited_for_or_refused(tmp_path):
    entered = threading.Event()

    def wait():
        with files.locked(tmp_path / "lock", wait=True):
            entered.set()

    with files.locked(tmp_path / "lock", wait=True):
        with pytest.raises(UserError, match=f"process {os.getpid()} on .* is working in"):
            files.locked(tmp_path / "lock", wait=False).__enter__()
        other = threading.Thread(target=wait)
        other.start()
        assert not entered.wait(0.3)
    assert entered.wait(5)
    other.join()
    with pytest.raises(UserError, match="lock cannot be written"):
        files.locked(tmp_path / "lock" / "lock", wait=True).__enter__()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_mentioned(number, tmp_path, monkeypatch, caplog):
    """As Lustre's without flock, or NFS without its daemon."""

    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with files.locked(tmp_path / "a/lock", wait=False):
        assert "a is on a disk without locks" in caplog.text
    assert files.sharers([tmp_path / "a/lock"]) == []


def test_another_error_of_a_lock_is_one_line(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with pytest.raises(UserError, match="lock cannot be written: Input/output error"):
        files.locked(tmp_path / "lock", wait=True).__enter__()


@pytest.mark.parametrize("what", ["folder", "file"])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_disk_that_flushes_no_folder_is_written_to(what, number, tmp_path, monkeypatch):
    """Of a folder some shared disks know no flush; an error of the disk is one, and so is any of the file."""
    fsync = os.fsync

    def fails(descriptor):
        if Path(f"/proc/self/fd/{descriptor}").is_dir() == (what == "folder"):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fails)
    if (what, number) == ("folder", errno.EINVAL):
        files.write_atomic(tmp_path / "x", b"new")
        assert (tmp_path / "x").read_bytes() == b"new"
    else:
        with pytest.raises(UserError, match=f"x cannot be written: {os.strerror(number)}"):
            files.write_atomic(tmp_path / "x", b"new")


def test_processes_that_share_the_cores_are_those_that_hold_a_lock_now(tmp_path, monkeypatch):
    locks = [tmp_path / name / "lock" for name in "abcde"]

    def found():
        return files.sharers([*locks, tmp_path / "absent"])

    with files.locked(locks[0], wait=False), files.locked(locks[1], wait=False), files.locked(locks[2], wait=False):
        assert found() == []  # this process itself
        other, host = os.getppid(), socket.gethostname()
        for lock, owner in zip(locks, (f"{other} on {host}", f"{other} on elsewhere", "no number"), strict=False):
            lock.write_text(f"process {owner}")
        for lock in locks[3:]:
            lock.parent.mkdir()
        locks[3].write_text(f"process {other} on {host}")  # nobody holds it
        locks[4].write_text(f"process {2**22 + 1} on {host}")  # no process has such a number
        assert found() == [other]
        with monkeypatch.context() as patch:
            patch.setattr(os, "sched_getaffinity", lambda process: {process})
            assert found() == []
        monkeypatch.delattr(os, "sched_getaffinity")
        assert found() == [other]
    assert found() == []


def test_a_relative_path_means_the_same_place_under_every_way_of_running(tmp_path, monkeypatch):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in (root, elsewhere):
        folder.mkdir()
    (root / "images").mkdir()
    monkeypatch.setenv("DVC_ROOT", str(root))
    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(elsewhere)
    assert files.existing("data.path", "images") == root / "images"  # plainly: there is none here
    with pytest.raises(ConfigError) as error:
        files.existing("data.path", "x")
    assert str(error.value) == f"data.path=x: there is no {elsewhere / 'x'} and no {root / 'x'}"
    (elsewhere / "images").mkdir()
    assert files.existing("data.path", "images") == elsewhere / "images"
    monkeypatch.setenv("DVC_STAGE", "train")  # in DVC's copy of the repository
    assert files.existing("data.path", "images") == root / "images"
    assert files.existing("data.path", "~/root") == files.existing("data.path", str(root)) == root


def test_json_has_null_for_what_is_no_number(tmp_path):
    files.write_json(tmp_path / "x", {"a": math.nan, "b": {"c": [1, -math.inf]}, "d": 0.5})
    assert json.loads((tmp_path / "x").read_text()) == {"a": None, "b": {"c": [1, None]}, "d": 0.5}
