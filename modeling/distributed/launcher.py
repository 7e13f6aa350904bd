"""The launcher of trainer.nproc, and what each of its workers does at its start and at its end.

trainer.nproc=N forks N workers, with the environment variables that torchrun sets too. The launcher has imported
PyTorch by then, so that they start at once and share its memory, but has not touched CUDA, which no fork survives. Each
worker has a session of its own, so a Ctrl-C reaches it once, through the launcher, and it ends when the launcher ends.
It writes its last line to the job's folder; the launcher prints that of the first to fail. No torch at the top of this
file: main.py starts fast.
"""

import logging
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from modeling.distributed.job import settle
from modeling.reliability.container import cores
from modeling.reliability.errors import ConnectionLost, Stopped, UserError, require
from modeling.reliability.signals import JOB, STOP_FILE, resume_command, stop_requested

if TYPE_CHECKING:  # main.py --help starts without it
    from modeling.settings.groups import Config

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
    return ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none"] if _rank() > 0 else []


def workers_to_start(config: "Config", multirun: bool) -> int:
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


def share_cores(count: int) -> None:
    """Gives each of `count` workers its part of the cores, unless the user has said how many threads there are.

    Before PyTorch is imported, which reads the variable then, and under OMP_PROC_BIND ties this process to one core.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // count)))


def launch(count: int, command: Sequence[str], resume: str) -> int | None:
    """Forks `count` workers and returns None in each of them.

    In the launcher: waits for their end, prints why they failed and gives the exit code. `command` is a Python file
    with its arguments, `resume` is trainer.resume.
    """
    import tempfile  # here, since every other command starts faster without it

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it was ignored, no exit code would be left
    folder = tempfile.mkdtemp(prefix="ddpm-")
    workers: list[int] = []
    codes: dict[int, int] = {}
    forked = False
    try:
        forked = _fork(count, folder, workers)
        if forked:
            return None
        _wait(workers, codes, Path(folder, STOP_FILE))
        first = min(codes, key=lambda k: HARMLESS.get(codes[k], 0))  # of several alike, the first that ended
        code, line = codes[first], Path(folder, f"last-line-{first}")
        if line.exists():
            print(line.read_text(errors="replace"), file=sys.stderr)
        elif code != 0:
            end = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
            advice = f"the last checkpoint is kept; to go on: {resume_command(command, resume)}"
            print(f"error: process {first} of {count} {end}: {advice}", file=sys.stderr)
    finally:
        if not forked:
            for rank, worker in enumerate(workers):
                if rank not in codes:
                    os.kill(worker, signal.SIGKILL)
                    os.waitpid(worker, 0)
            shutil.rmtree(folder, ignore_errors=True)
    return 1 if code < 0 or code == ConnectionLost.exit_code else code


def _fork(count: int, folder: str, workers: list[int]) -> bool:
    """Forks `count` workers and notes their process ids; whether this process is one of them."""
    # Nothing is written to it: its end tells a worker that the launcher has ended.
    ends, open_while_launcher_lives = os.pipe()
    sys.stdout.flush()  # or each worker would print it again
    for rank in range(count):
        try:
            pid = os.fork()
        except OSError as error:
            raise UserError(f"process {rank} of {count} cannot be started: {error.strerror}") from None
        if pid == 0:
            os.close(open_while_launcher_lives)
            os.setsid()
            os.dup2(ends, 0)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), JOB: folder}
            os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
            return True
        workers.append(pid)
    os.close(ends)
    return False


def _wait(workers: Sequence[int], codes: dict[int, int], stop: Path) -> None:
    """Notes the exit codes by rank, in the order of the ends; none of a worker that runs GRACE after a failure."""
    deadline = math.inf
    while len(codes) < len(workers) and time.monotonic() < deadline:
        time.sleep(0.05)
        for rank in {*range(len(workers))} - codes.keys():
            ended, status = os.waitpid(workers[rank], os.WNOHANG)
            if ended:
                codes[rank] = os.waitstatus_to_exitcode(status)
        failed = any(code not in (0, Stopped.exit_code) for code in codes.values())
        if failed:
            deadline = min(deadline, time.monotonic() + GRACE)
        if failed or stop_requested():
            stop.parent.mkdir(exist_ok=True)  # whatever cleans the folder of temporary files may have taken it
            stop.touch()  # no signal: whoever stops a group of processes has sent one already, and a second one kills


@contextmanager
def joined(config: "Config", out: Path) -> Iterator[Path]:
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


def _go_on(config: "Config", restarted: bool) -> None:
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
