"""The processes of a job, as the command line sees them: started here for trainer.nproc, or by torchrun, or one alone.

trainer.nproc=N runs the same command line N times, told apart by the environment variables that torchrun sets too. They
live in sessions of their own, so a Ctrl-C reaches them once, through the launcher; they end when it does, however it
ends. Whatever goes wrong is told by one of them. No torch here: main.py starts fast. Collectives: distributed.py.
"""

import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from modeling.reliability.errors import ConfigError, Lost, Stopped
from modeling.reliability.signals import STOP_FILE, poll, resume_command, stop_requested
from modeling.settings import Config

JOB = "MODELING_JOB"  # a folder that the processes of trainer.nproc share
RUN_DIR = "MODELING_RUN_DIR"  # Hydra's folder, the launcher's: theirs would be seconds younger
TOGETHER = ("train", "sample", "evaluate")  # the stages that are shared out; the others are the first process's
GRACE = 10.0  # seconds to put things away once another process has failed,
LAST = 60.0  # and once the launcher has gone
LOST = "lost"  # a file of the shared folder: why one has lost the others


def world_size() -> int:
    """The number of processes that torchrun or the launcher has started; 1 in a process that nobody did."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Of this process, in [0, world_size)."""
    return int(os.environ.get("RANK", "0"))


def overrides() -> list[str]:
    """For Hydra: one process alone has a folder and a log file."""
    if rank() > 0:
        return ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none"]
    quoted = os.environ.get(RUN_DIR, "").replace("\\", "\\\\").replace("'", "\\'")
    return [f"hydra.run.dir='{quoted}'"] if quoted else []


def check_processes(config: Config, multirun: bool) -> int:
    """How many processes are to work, from what is configured and what torchrun has started.

    Raises:
        ConfigError: the two disagree, or the batch does not divide, or the command line asks for several jobs.
    """
    asked, started = config.trainer.nproc, world_size()
    if "WORLD_SIZE" in os.environ and asked not in (1, started):
        raise ConfigError(f"trainer.nproc={asked}: torchrun has started {started} processes; leave it out")
    count = max(asked, started)
    if multirun and count > 1:
        raise ConfigError(f"trainer.nproc={count}: not with --multirun; dvc exp run --queue sweeps")
    if config.stage in ("all", "train") and config.trainer.batch_size % count:
        raise ConfigError(
            f"trainer.batch_size={config.trainer.batch_size}: must be divisible by the {count} processes, "
            "see trainer.nproc"
        )
    return count


def must_launch(config: Config) -> bool:
    """Whether the processes are still to be started."""
    return config.trainer.nproc > 1 and world_size() == 1 and config.stage in ("all", *TOGETHER)


def launch(count: int, run_dir: str, command: Sequence[str], resume: str) -> int:
    """Runs `count` processes of this command line to their end, and returns the exit code of the whole.

    A request to stop is passed on; the failure of one ends the others, at the latest after GRACE seconds.

    Args:
        count: of processes.
        run_dir: Hydra's folder of this process.
        command: what was typed: a Python file and its arguments.
        resume: trainer.resume.
    """
    with tempfile.TemporaryDirectory(prefix="ddpm-") as folder:
        environment = {
            "OMP_NUM_THREADS": str(max(1, _cores() // count)),
            **os.environ,
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            JOB: folder,
            RUN_DIR: run_dir,
        }
        workers: list[subprocess.Popen[bytes]] = []
        try:
            for k in range(count):
                own = environment | {"RANK": str(k), "LOCAL_RANK": str(k)}
                # The pipe tells a worker that this process has ended: nothing is ever written to it.
                start = subprocess.Popen(
                    [sys.executable, *command], env=own, stdin=subprocess.PIPE, start_new_session=True
                )
                workers.append(start)
            return _wait(workers, Path(folder), resume_command(command, resume))
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()


def _cores() -> int:
    """That this job may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _wait(workers: Sequence[subprocess.Popen[bytes]], folder: Path, again: str) -> int:
    codes: list[int] = []  # in the order in which they ended
    left = dict(enumerate(workers))
    asked, deadline = False, None
    while left:
        for k, worker in list(left.items()):
            code = worker.poll()
            if code is None:
                continue
            del left[k]
            codes.append(code)
            if code < 0 and deadline is None and _claim(folder):
                name = signal.Signals(-code).name
                print(
                    f"error: process {k} of {len(workers)} was killed ({name}): the last checkpoint is kept; to go on: "
                    f"{again}",
                    file=sys.stderr,
                )
            if code not in (0, Stopped.exit_code) and deadline is None:
                deadline = time.monotonic() + GRACE
        if stop_requested():
            # Not by a signal: whoever stops a group of processes has sent them one, and a second one would kill.
            (folder / STOP_FILE).touch()
        if left and not asked and deadline is not None:
            asked = True
            for worker in left.values():
                worker.terminate()
        if deadline is not None and time.monotonic() > deadline:
            for worker in left.values():
                worker.kill()
        time.sleep(0.05)
    failed = [code for code in codes if code not in (0, Lost.exit_code, Stopped.exit_code)]
    if Stopped.exit_code in codes and not failed:
        return Stopped.exit_code
    if (failed or Lost.exit_code in codes) and _claim(folder):  # nobody has said why
        reason = (folder / LOST).read_text() if (folder / LOST).exists() else "the processes have lost each other"
        print(f"error: {reason}; to go on: {again}", file=sys.stderr)
    return max(failed[0], 1) if failed else int(Lost.exit_code in codes)


@contextmanager
def joined(config: Config, out: Path) -> Iterator[Path]:
    """Within the context, this process is one of its job's; gives the folder of outputs, the same for all of them.

    Raises:
        ConfigError: more processes than devices.
        Lost: the others do not come.
    """
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if world_size() == 1:
        _go_on(config, restarted)
        yield out
        return
    if rank() > 0:
        logging.disable()  # what it has to say, the first says too
    if JOB in os.environ:
        threading.Thread(target=_stop_with_launcher, daemon=True).start()
    from modeling.distributed import collectives as distributed

    with distributed.group(config.device, os.environ.get(JOB)):
        _go_on(config, distributed.any_process(restarted))  # torchrun counts failures, each machine its own
        yield Path(distributed.from_first(lambda: str(out)))


def _go_on(config: Config, restarted: bool) -> None:
    if restarted and config.trainer.resume == "never":
        config.trainer.resume = "auto"  # or the work since the first start were lost


def _stop_with_launcher() -> None:
    os.read(0, 1)  # ends with the launcher
    if not (Path(os.environ[JOB]) / STOP_FILE).exists():  # else a second signal has ended it: this process ends too
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(LAST)
    os.kill(os.getpid(), signal.SIGKILL)  # a process that waits within the backend hears no other


def poll_together() -> None:
    """As signals.poll, but for all processes of the job at once: one that is asked to stop stops all.

    Raises:
        Stopped: a stop was asked for.
    """
    if world_size() == 1:
        poll()
        return
    from modeling.distributed import collectives as distributed

    if distributed.any_process(stop_requested()):
        raise Stopped("stopped")


def wait_for_all() -> None:
    """Returns when all processes of the job have called this."""
    if world_size() > 1:
        from modeling.distributed import collectives as distributed

        distributed.barrier()


def may_tell(error: Exception) -> bool:
    """Whether this process is the one of its job that tells the user how it ended."""
    if world_size() == 1:
        return True
    if JOB in os.environ:
        folder = Path(os.environ[JOB])
        if not isinstance(error, Lost):
            return _claim(folder)
        with suppress(OSError):  # of a lost process the launcher knows more, or else tells this
            (folder / LOST).write_text(str(error))
        return False
    from modeling.distributed import collectives as distributed

    return distributed.is_first_to_tell(error)


def _claim(folder: Path) -> bool:
    try:
        (folder / "told").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # the launcher has gone, or the disk is full
        return True
    return True
