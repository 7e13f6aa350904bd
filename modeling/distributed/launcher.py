"""The launcher of trainer.nproc, and what each of its workers does at its start and at its end.

trainer.nproc=N runs the same command in N workers, with the environment variables that torchrun sets too. Each worker
has a session of its own, so a Ctrl-C reaches it once, through the launcher, and it ends when the launcher ends. It
writes its last line to the job's folder; the launcher prints that of the first to fail. No torch: main.py starts fast.
"""

import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from modeling.distributed.job import settle
from modeling.reliability.errors import ConnectionLost, Stopped, require
from modeling.reliability.signals import JOB, STOP_FILE, resume_command, stop_requested
from modeling.settings import Config

RUN_DIR = "MODELING_RUN_DIR"  # Hydra's folder of the launcher; a worker's own would be named seconds later
SHARED = ("train", "sample", "evaluate")  # the stages that all processes work on; the first one runs the others
GRACE = 10.0  # seconds that the other workers have to end after a failure
LAST = 60.0  # seconds that a worker has to save after the launcher was killed
HARMLESS = {0: 3, ConnectionLost.exit_code: 2, Stopped.exit_code: 1}  # any other exit code is a failure, and worse


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def overrides() -> list[str]:
    """Hydra's overrides by which one process alone has an output folder and a log file; settles which one that is.

    UserError if that cannot be told, see job.py.
    """
    settle()
    if _rank() > 0:
        return ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none"]
    quoted = os.environ.get(RUN_DIR, "").replace("\\", "\\\\").replace("'", "\\'")
    return [f"hydra.run.dir='{quoted}'"] if quoted else []


def workers_to_start(config: Config, multirun: bool) -> int:
    """Checks the number of processes; gives the number of workers to launch, 0 if this process does the work itself."""
    nproc, started = config.trainer.nproc, int(os.environ.get("WORLD_SIZE", "1"))
    agree = "WORLD_SIZE" not in os.environ or nproc in (1, started)
    require(agree, "trainer.nproc", nproc, f"the job has {started} processes already; leave it out")
    count, batch_size = max(nproc, started), config.trainer.batch_size
    require(count == 1 or not multirun, "trainer.nproc", count, "not with --multirun; dvc exp run --queue sweeps")
    divides = config.stage not in ("all", "validate", "train") or batch_size % count == 0
    allowed = f"must be divisible by the {count} processes, see trainer.nproc"
    require(divides, "trainer.batch_size", batch_size, allowed)
    return nproc if nproc > started and config.stage in ("all", *SHARED) else 0


def launch(count: int, run_dir: str, command: Sequence[str], resume: str) -> int:
    """Runs a Python file with its arguments in `count` workers; prints why they failed and gives the exit code.

    `run_dir` is Hydra's folder of this process, `resume` is trainer.resume.
    """
    import tempfile  # here, since every other command starts faster without it

    # This job may use fewer than the machine has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads, size = str(max(1, cores // count)), str(count)
    workers: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="ddpm-") as folder:
        try:
            for rank in map(str, range(count)):
                env = {"OMP_NUM_THREADS": threads, **os.environ, "RANK": rank, "LOCAL_RANK": rank, JOB: folder}
                env |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, RUN_DIR: run_dir}
                # Nothing is written to the pipe: its end tells a worker that the launcher has ended.
                started = [sys.executable, *command]
                workers.append(subprocess.Popen(started, env=env, stdin=subprocess.PIPE, start_new_session=True))
            codes = _exit_codes(workers, Path(folder, STOP_FILE))
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        first = min(codes, key=lambda k: HARMLESS.get(codes[k], 0))  # of several alike, the first that ended
        code, line = codes[first], Path(folder, f"last-line-{first}")
        if line.exists():
            print(line.read_text(errors="replace"), file=sys.stderr)
        elif code != 0:
            end = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
            advice = f"the last checkpoint is kept; to go on: {resume_command(command, resume)}"
            print(f"error: process {first} of {count} {end}: {advice}", file=sys.stderr)
    return 1 if code < 0 or code == ConnectionLost.exit_code else code


def _exit_codes(workers: Sequence[subprocess.Popen[bytes]], stop: Path) -> Mapping[int, int]:
    """The exit codes by rank, in the order of the ends; none for a worker that still runs GRACE after a failure."""
    codes: dict[int, int] = {}
    deadline = math.inf
    while len(codes) < len(workers) and time.monotonic() < deadline:
        time.sleep(0.05)
        codes |= {k: code for k, worker in enumerate(workers) if k not in codes and (code := worker.poll()) is not None}
        failed = any(code not in (0, Stopped.exit_code) for code in codes.values())
        if failed:
            deadline = min(deadline, time.monotonic() + GRACE)
        if failed or stop_requested():
            stop.touch()  # no signal: whoever stops a group of processes has sent one already, and a second one kills
    return codes


@contextmanager
def joined(config: Config, out: Path) -> Iterator[Path]:
    """Within the context, this process is one of its job's; gives the first one's output folder."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if _alone():
        _go_on(config, restarted)
        yield out
        return
    from modeling.distributed import collectives

    if _rank() > 0:
        logging.disable()  # the first process logs the same
    if JOB in os.environ:
        threading.Thread(target=_end_with_launcher, daemon=True).start()
    with collectives.group(config.device):
        # Asked of all processes: torchrun counts the failures of each machine apart.
        _go_on(config, collectives.any_process(restarted))
        yield Path(collectives.from_first(lambda: str(out)))


def _alone() -> bool:
    """Whether this is the only process of its job, which then needs no torch, whose import takes seconds."""
    return os.environ.get("WORLD_SIZE", "1") == "1"


def _go_on(config: Config, restarted: bool) -> None:
    if restarted and config.trainer.resume == "never":
        config.trainer.resume = "auto"  # or the work since the first start were lost


def _end_with_launcher() -> None:
    os.read(0, 1)  # returns when the launcher ends
    if not Path(os.environ[JOB], STOP_FILE).exists():  # else a second signal has ended it, and ends this process too
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(LAST)
    os.kill(os.getpid(), signal.SIGKILL)  # a process that waits within the backend receives no other signal


def takes_part(stage: str) -> bool:
    """Whether this process works on a stage."""
    return _rank() == 0 or stage in SHARED


def poll_all() -> None:
    """Waits for all processes of the job; raises Stopped in each of them if one was asked to stop."""
    stopped = stop_requested()
    if not _alone():
        from modeling.distributed import collectives

        stopped = collectives.any_process(stopped)
    if stopped:
        raise Stopped("stopped")


def print_last(text: str, code: int) -> None:
    """Prints why this process ends with an exit code, or leaves it to the launcher.

    Under torchrun another rank than 0 prints only a failure of its own, code 1: the other codes rank 0 reports too.
    """
    if JOB in os.environ:
        with suppress(OSError):  # the launcher has gone, or the disk is full
            Path(os.environ[JOB], f"last-line-{_rank()}").write_text(text, errors="backslashreplace")
            return
    elif _rank() > 0 and code != 1:
        return
    with suppress(OSError):  # nobody reads it
        print(text, file=sys.stderr)
