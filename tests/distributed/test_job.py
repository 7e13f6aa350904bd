"""Which job a process belongs to, from the variables of each program that starts processes."""

import os
from types import SimpleNamespace

import psutil
import pytest

import main as command_line
from modeling.distributed import job, launcher
from modeling.reliability.errors import ConfigError, UserError

SLURM = {"SLURM_JOB_ID": "71", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}
TWO_NODES = SLURM | {"SLURM_STEP_NODELIST": "gpu[03-04]"}
BATCH = {"SLURM_JOB_ID": "71", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
OPEN_MPI = {f"OMPI_COMM_WORLD_{name}": value for name, value in {"SIZE": "4", "RANK": "2", "LOCAL_SIZE": "4"}.items()}
OPEN_MPI |= {"PMIX_NAMESPACE": "156434433"}
MPICH = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALNRANKS": "2"}
PYTORCH_JOB = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
LOCAL = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def derived(env, **given):
    found = job.derive(given, env)
    return tuple(found.get(name) for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"))


ALONE = [
    ({}, {}),
    (BATCH, {}),  # in the shell of sbatch or salloc
    (TWO_NODES | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, {}),  # srun -n1
    (TWO_NODES, {"WORLD_SIZE": "1"}),  # each of the four by itself, as its user says
    ({}, {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "23456"}),  # Kubeflow's, of one
    ({}, {"MASTER_ADDR": "localhost"}),
]


@pytest.mark.parametrize(("env", "given"), ALONE)
def test_alone(env, given):
    assert job.derive(given, env) == {}


def test_of_several():
    srun = derived(TWO_NODES)
    assert srun[:3] == ("4", "3", "gpu03") and 10_000 <= int(srun[3]) < 30_000
    assert derived(TWO_NODES | {"SLURM_STEP_ID": "1"})[3] != srun[3] == derived(TWO_NODES | {"SLURM_PROCID": "1"})[3]
    assert derived(SLURM | {"SLURM_STEP_NODELIST": "gpu03"})[2] == "127.0.0.1"
    assert derived(TWO_NODES, WORLD_SIZE="4", MASTER_ADDR="a", MASTER_PORT="5") == ("4", "3", "a", "5")
    assert derived(TWO_NODES, RANK="3")[:3] == ("4", "3", "gpu03")
    assert derived(TWO_NODES, WORLD_SIZE="2", RANK="0", MASTER_ADDR="a") == ("2", "0", "a", "29500")  # not srun's
    assert derived(OPEN_MPI)[:3] == ("4", "2", "127.0.0.1") and derived(OPEN_MPI)[3] != "29500"
    assert derived(OPEN_MPI | TWO_NODES)[1] == "2"  # mpirun starts its daemons by srun
    assert derived(MPICH) == ("2", "1", "127.0.0.1", "29500")
    assert derived({}, **PYTORCH_JOB) == (*PYTORCH_JOB.values(),)
    assert job.derive(PYTORCH_JOB | LOCAL, {}) == PYTORCH_JOB | LOCAL
    assert job.derive(PYTORCH_JOB | {"LOCAL_RANK": "0"}, {}) == PYTORCH_JOB  # then both are found


NODES = {"cpu1": "cpu1", "cpu1,gpu[03-05]": "cpu1", "gpu[03-05,9],cpu1": "gpu03", "r[1-2]n[07,9]-ib": "r1n07-ib"}


@pytest.mark.parametrize("nodes", NODES)
def test_the_first_host(nodes):
    assert job.first_host(nodes) == NODES[nodes]


REFUSED = [
    ({}, {"WORLD_SIZE": "2"}, "WORLD_SIZE=2: RANK not set: set WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT in every"),
    ({}, {"RANK": "0"}, "RANK=0: WORLD_SIZE not set: set "),
    ({}, {"LOCAL_RANK": "1"}, "LOCAL_RANK=1: WORLD_SIZE and RANK not set: set "),
    ({}, {"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR=: not set, but WORLD_SIZE=2: give it the host of process 0"),
    ({}, {"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE=two: must be a whole number from 1 to "),
    ({}, PYTORCH_JOB | {"RANK": "2"}, "RANK=2: must be less than WORLD_SIZE=2"),
    ({}, {"WORLD_SIZE": "1", "RANK": "1"}, "RANK=1: must be less than WORLD_SIZE=1"),
    ({}, PYTORCH_JOB | {"MASTER_PORT": "0"}, "MASTER_PORT=0: must be a whole number from 1 to 65535"),
    ({}, PYTORCH_JOB | {"LOCAL_RANK": "x"}, "LOCAL_RANK=x: must be a whole number"),
    (BATCH, {"WORLD_SIZE": "4"}, "WORLD_SIZE=4: RANK not set"),  # python in the place of srun python
    (TWO_NODES, {"WORLD_SIZE": "8"}, "WORLD_SIZE=8: srun says 4; unset WORLD_SIZE"),
    (TWO_NODES, {"RANK": "0"}, "RANK=0: srun says 3; unset RANK"),
    (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, {}, "MASTER_ADDR=: not set, but WORLD_SIZE=4"),
]


@pytest.mark.parametrize(("env", "given", "line"), REFUSED)
def test_what_cannot_be_derived_is_one_line(env, given, line):
    with pytest.raises(ConfigError) as refused:
        job.derive(given, env)
    assert str(refused.value).startswith(line)


@pytest.fixture
def environment(monkeypatch):
    """Sets the variables of the process, and nothing else of their kind."""

    def put(env):
        names = {*job.VARIABLES, job.TORCHRUN, "DVC_STAGE"}
        for name in (*os.environ, *names):
            if name in names or name.startswith(("SLURM_", "OMPI_", "PMI")):
                monkeypatch.setenv(name, "")  # so that what the test sets is undone
                monkeypatch.delenv(name)
        for name, value in env.items():
            monkeypatch.setenv(name, value)

    return put


def test_the_variables_of_the_process_are_settled(environment):
    environment(dict.fromkeys(job.VARIABLES, ""))
    assert launcher.overrides() == [] and not {*job.VARIABLES} & {*os.environ}
    environment(PYTORCH_JOB | {"LOCAL_RANK": " "})
    assert "hydra.run.dir=." in launcher.overrides() and "LOCAL_RANK" not in os.environ
    assert {name: os.environ[name] for name in PYTORCH_JOB} == PYTORCH_JOB
    environment({job.TORCHRUN: "x", "WORLD_SIZE": "1", "RANK": "0"})
    job.settle()
    assert os.environ["WORLD_SIZE"] == "1"


def test_a_process_that_is_refused_says_so_whatever_its_rank(environment, capsys):
    environment({"RANK": "1"})
    with pytest.raises(SystemExit, match="2"):
        command_line.main()
    assert capsys.readouterr().err.startswith("error: RANK=1: WORLD_SIZE not set")


def test_several_processes_of_dvc_are_refused(environment, monkeypatch):
    """And not one DVC whose stage is several processes."""
    above = [{"DVC_STAGE": "train"} | TWO_NODES, {}]

    def parents(_):
        return [SimpleNamespace(environ=lambda env=env: env) for env in above]

    monkeypatch.setattr(psutil.Process, "parents", parents)
    environment(TWO_NODES | {"DVC_STAGE": "train"})
    job.settle()
    above[1] = TWO_NODES
    for env in (TWO_NODES, PYTORCH_JOB | {job.TORCHRUN: "x"}):
        environment(env | {"DVC_STAGE": "train"})
        with pytest.raises(UserError, match=r"\d processes of DVC would write the same files: start one, with"):
            job.settle()

    def denied(_):
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil.Process, "parents", denied)
    environment(TWO_NODES | {"DVC_STAGE": "train"})
    job.settle()
