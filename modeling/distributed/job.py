"""Which job this process belongs to: torchrun's environment variables, derived from those of whoever has started it.

torchrun and the launcher of trainer.nproc set all of them. Kubeflow's PyTorchJob, and scripts that export some by hand,
leave LOCAL_RANK out, which collectives.py then finds; srun and mpirun have names of their own. No torch.
"""

import os
import re
import zlib
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple, NoReturn

from modeling.reliability.errors import ConfigError, UserError, require
from modeling.reliability.signals import TORCHRUN

VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
DEFAULT_PORT = "29500"  # torchrun's too


class Starter(NamedTuple):
    """The names of the variables that a program sets in each process that it starts; empty if it has none."""

    name: str
    size: str
    rank: str
    here: str  # how many of its processes are on this machine,
    nodes: str  # or the list of its machines; process 0 runs on the first
    job: tuple[str, ...]  # what tells its jobs apart


# In a shell of salloc or sbatch there is no step, so a process in it is alone. Under mpirun, the step is mpirun's own.
STARTERS = (
    Starter(
        "mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "", ("PMIX_NAMESPACE",)
    ),
    Starter("mpirun", "PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "", ()),
    Starter(
        "srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "", "SLURM_STEP_NODELIST", ("SLURM_JOB_ID", "SLURM_STEP_ID")
    ),
)


def settle() -> None:
    """Sets torchrun's variables for a process of several, and unsets them for one that is alone.

    Raises:
        ConfigError: they say half of what is needed, or contradict each other.
        UserError: it is DVC that was started several times.
    """
    if TORCHRUN not in os.environ:
        given = {name: value for name in VARIABLES if (value := os.environ.pop(name, "").strip())}
        os.environ.update(derive(given, os.environ))
    count = os.environ.get("WORLD_SIZE", "1")
    if count != "1" and "DVC_STAGE" in os.environ and _dvc_is_one_of_several():
        raise UserError(
            f"{count} processes of DVC would write the same files: start one, with trainer.nproc={count}, or several "
            "of python main.py, without DVC"
        )


def derive(given: Mapping[str, str], env: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables from those of them that are `given` and from an environment; none for a lone process.

    ConfigError as in `settle`.
    """
    starter = _starter(env)
    size, rank = given.get("WORLD_SIZE"), given.get("RANK")
    if size == "1" and rank in (None, "0"):
        return {}  # whoever has started how many of them
    if size is None or rank is None:
        if starter is None:
            half = next((name for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK") if name in given), None)
            return _refuse_half(half, given) if half else {}
        for name, value, is_so in (("WORLD_SIZE", size, env[starter.size]), ("RANK", rank, env[starter.rank])):
            require(value in (None, is_so), name, value, f"{starter.name} says {is_so}; unset {name}")
        size, rank = env[starter.size], env[starter.rank]
    count, index = _number("WORLD_SIZE", size, 1, 10**6), _number("RANK", rank, 0, 10**6)
    require(index < count, "RANK", index, f"must be less than WORLD_SIZE={count}")
    if count == 1:
        return {}
    found = {"WORLD_SIZE": size, "RANK": rank, "MASTER_PORT": DEFAULT_PORT}
    if starter is not None and env[starter.size] == size:
        found |= _meeting_place(starter, env)
    found |= given
    require("MASTER_ADDR" in found, "MASTER_ADDR", "", f"not set, but WORLD_SIZE={size}: give it the host of process 0")
    _number("MASTER_PORT", found["MASTER_PORT"], 1, 65535)
    local = [name for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE") if name in given]
    for name in local:
        _number(name, given[name], 0, count)
        if len(local) == 1:
            del found[name]  # collectives.py finds both
    return found


def _starter(env: Mapping[str, str]) -> Starter | None:
    return next((s for s in STARTERS if all(env.get(name) for name in (s.size, s.rank, s.here or s.nodes))), None)


def _meeting_place(starter: Starter, env: Mapping[str, str]) -> dict[str, str]:
    """MASTER_ADDR, if it is known, and MASTER_PORT, which two jobs on one machine hardly ever share."""
    found = {}
    if name := ".".join(env[key] for key in starter.job if key in env):
        found["MASTER_PORT"] = str(10_000 + zlib.crc32(name.encode()) % 20_000)
    nodes = env.get(starter.nodes, "")
    if env.get(starter.here) == env[starter.size] or first_host(nodes) == nodes != "":
        found["MASTER_ADDR"] = "127.0.0.1"  # a single machine's name may not resolve
    elif nodes:
        found["MASTER_ADDR"] = first_host(nodes)
    return found


def first_host(nodes: str) -> str:
    """The first of Slurm's list of machines: "gpu03" of "gpu[03-05,9],cpu1"."""
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).split(",")[0]


def _number(name: str, value: str, least: int, most: int) -> int:
    number = int(value) if re.fullmatch(r"\d{1,7}", value) else -1
    require(least <= number <= most, name, value, f"must be a whole number from {least} to {most}")
    return number


def _refuse_half(name: str, given: Mapping[str, str]) -> NoReturn:
    missing = " and ".join(other for other in ("WORLD_SIZE", "RANK") if other not in given)
    raise ConfigError(
        f"{name}={given[name]}: {missing} not set: set WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT in every "
        f"process, or unset {name} to run one"
    )


def _dvc_is_one_of_several() -> bool:
    """Whether the DVC above this stage has a rank, and not only the stage."""
    import psutil  # here, since only a job under DVC needs it

    ranks = ("RANK", *(starter.rank for starter in STARTERS))
    with suppress(psutil.Error, StopIteration):  # what is above may belong to somebody else, or be out of sight
        environments = (process.environ() for process in psutil.Process().parents())
        dvc = next(env for env in environments if "DVC_STAGE" not in env)
        return any(dvc.get(name) for name in ranks)
    return False
