"""The launcher of trainer.nproc, and what each of its workers does at its start and at its end.

trainer.nproc=N runs the same command line in N workers, with the environment variables that torchrun sets too. Workers
live in sessions of their own, so a Ctrl-C reaches them once, through the launcher, and they end when it ends. Each
leaves its last line in the job's folder; the launcher prints that of the first to fail. No torch here: main.py starts
fast. Collectives: collectives.py.
"""

import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from modeling.reliability.errors import ConfigError, ConnectionLost, Stopped
from modeling.reliability.signals import JOB, STOP_FILE, resume_command, stop_requested
from modeling.settings import Config

RUN_DIR = "MODELING_RUN_DIR"  # Hydra's folder, the launcher's: a worker's would be seconds younger
SHARED = ("train", "sample", "evaluate")  # the stages that all processes work on; the others are the first one's
GRACE = 10.0  # seconds to end once another worker has failed,
LAST = 60.0  # and to save once the launcher has been killed
NO_FAILURE = (Stopped.exit_code, ConnectionLost.exit_code, 0)  # from what matters most to what matters least


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def overrides() -> list[str]:
    """Hydra's overrides that give one process alone a folder and a log file."""
    if _rank() > 0:
        return ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none"]
    quoted = os.environ.get(RUN_DIR, "").replace("\\", "\\\\").replace("'", "\\'")
    return [f"hydra.run.dir='{quoted}'"] if quoted else []


def workers_to_start(config: Config, multirun: bool) -> int:
    """The number of workers that this process must launch, once it is checked; 0 if it does the work itself."""
    nproc, started = config.trainer.nproc, int(os.environ.get("WORLD_SIZE", "1"))
    if "WORLD_SIZE" in os.environ and nproc not in (1, started):
        raise ConfigError(f"trainer.nproc={nproc}: torchrun has started {started} processes; leave it out")
    count = max(nproc, started)
    if multirun and count > 1:
        raise ConfigError(f"trainer.nproc={count}: not with --multirun; dvc exp run --queue sweeps")
    if config.stage in ("all", "train") and config.trainer.batch_size % count:
        raise ConfigError(
            f"trainer.batch_size={config.trainer.batch_size}: must be divisible by the {count} processes, "
            "see trainer.nproc"
        )
    return nproc if nproc > started and config.stage in ("all", *SHARED) else 0


def launch(count: int, run_dir: str, command: Sequence[str], resume: str) -> int:
    """Runs a command, a Python file and its arguments, in `count` workers; prints why they failed, gives the exit code.

    Hydra's folder of this process is `run_dir`; `resume` is trainer.resume.
    """
    # This job may use fewer than the machine has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="ddpm-") as folder:
        environment = {
            "OMP_NUM_THREADS": str(max(1, cores // count)),
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
                workers.append(
                    subprocess.Popen([sys.executable, *command], env=own, stdin=subprocess.PIPE, start_new_session=True)
                )
            codes = _exit_codes(workers, Path(folder))
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        # The worker that decides; of several alike, the first that ended.
        rank = min(codes, key=lambda k: NO_FAILURE.index(codes[k]) if codes[k] in NO_FAILURE else -1)
        code = codes[rank]
        line = _line_file(folder, rank)
        if line.exists():
            print(line.read_text(errors="replace"), file=sys.stderr)
        elif code != 0:
            end = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
            advice = f"the last checkpoint is kept; to go on: {resume_command(command, resume)}"
            print(f"error: process {rank} of {count} {end}: {advice}", file=sys.stderr)
    return 1 if code < 0 or code == ConnectionLost.exit_code else code


def _exit_codes(workers: Sequence[subprocess.Popen[bytes]], folder: Path) -> Mapping[int, int]:
    """The exit codes by rank, in the order of the ends; none for who still runs GRACE seconds after a failure."""
    codes: dict[int, int] = {}
    deadline = math.inf
    while len(codes) < len(workers) and time.monotonic() < deadline:
        time.sleep(0.05)
        codes |= {k: code for k, worker in enumerate(workers) if k not in codes and (code := worker.poll()) is not None}
        failed = any(code not in (0, Stopped.exit_code) for code in codes.values())
        if failed:
            deadline = min(deadline, time.monotonic() + GRACE)
        if failed or stop_requested():
            # Not by a signal: whoever stops a group of processes has sent them one, and a second one would kill.
            (folder / STOP_FILE).touch()
    return codes


def _line_file(folder: str, rank: int) -> Path:
    return Path(folder) / f"last-line-{rank}"


@contextmanager
def joined(config: Config, out: Path) -> Iterator[Path]:
    """Within the context, this process is one of its job's; gives the first one's folder of outputs."""
    from modeling.distributed import collectives

    if _rank() > 0:
        logging.disable()  # what it has to say, the first says too
    if JOB in os.environ:
        threading.Thread(target=_end_with_launcher, daemon=True).start()
    with collectives.group(config.device):
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        # Asked of all processes: torchrun counts the failures of each machine apart.
        if collectives.any_process(restarted) and config.trainer.resume == "never":
            config.trainer.resume = "auto"  # or the work since the first start were lost
        yield Path(collectives.from_first(lambda: str(out)))


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
    from modeling.distributed import collectives

    if collectives.any_process(stop_requested()):
        raise Stopped("stopped")


def print_last(text: str, code: int) -> None:
    """Prints why this process ends with an exit code, or leaves it to the launcher.

    Under torchrun, rank 0 prints its line, and another rank only a failure of its own: what ends it with another exit
    code than 1 is known to rank 0 too.
    """
    if JOB in os.environ:
        with suppress(OSError):  # the launcher has gone, or the disk is full
            _line_file(os.environ[JOB], _rank()).write_text(text, errors="backslashreplace")
            return
    elif _rank() > 0 and code != 1:
        return
    print(text, file=sys.stderr)
