"""Several processes: real ones, started by the launcher and by torchrun, against one process."""

import dataclasses
import errno
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import psutil
import pytest
import torch
from helpers.configs import group
from helpers.once import once
from helpers.pipeline import ROOT, TINY, environment, measured
from helpers.runs import curves, finish, launch, saved_step
from helpers.training import MODEL, Recorder, make, weights
from PIL import Image

import main as command_line
from modeling.distributed import collectives, launcher
from modeling.reliability import signals
from modeling.reliability.errors import ConfigError, UserError
from modeling.reliability.files import write_atomic

COMMON = [
    *TINY,
    "model.model_channels=8",
    "model.channel_mult=[1,2]",
    "model.attention_resolutions=[4]",
    "precision=fp32",
    "trainer.batch_size=8",
    "trainer.timestep_sampling=stratified",
    "sampler.num_samples=5",
    "sampler.eta=1.0",
    "sampler.batch_size=3",
    "evaluation.bpd_images=5",
    "evaluation.fid_samples=null",
    "optimizer.warmup_steps=0",
    "optimizer.lr=1e-3",
]
LONG = ["model.dropout=0.1", "trainer.steps=60", "trainer.checkpoint_every=5", "trainer.nproc=2"]
LONG += ["trainer.log_every=50", "trainer.sample_every=1000", "trainer.evaluate_every=1000"]


def python(root, *arguments, **changes):
    env = environment(root, WANDB_MODE="disabled", PYTHONPATH=str(ROOT), **changes)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *arguments], cwd=root, env=env, text=True, **pipes)


def start(root, *arguments, torchrun=(), **changes):
    """A process of main.py, or of torchrun with it, whose state lies in `root` and whose outputs in `root`/out."""
    module = ("-m", "torch.distributed.run", *torchrun) if torchrun else ()
    return python(root, *module, ROOT / "main.py", *COMMON, f"out_dir={root / 'out'}", *arguments, **changes)


def ended(process, timeout=120):
    """Exit code, stdout and stderr; nobody is left over."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, stdout, stderr


def alone(root, *arguments, stage="all"):
    """All that one process, or one with the workers of trainer.nproc, prints; they start fast."""
    return finish(root, *arguments, stage=stage, recipe=COMMON, DVC_ROOT=str(root))


def long(root, *changes):
    """The long training by a launcher that starts fast, with its workers."""
    return launch(root, *LONG, *changes, recipe=COMMON, DVC_ROOT=str(root))


def numbers(value):
    if isinstance(value, dict):
        return [number for part in value.values() for number in numbers(part)]
    return [value] if isinstance(value, int | float) else []


def check_equal(one, other, what, record_deviation):
    """Losses and metrics to float tolerance; the very same pictures."""
    found, expected = curves(other / "out"), curves(one / "out")
    assert found.keys() == expected.keys() and found["loss"]
    for name in expected:
        assert found[name] == pytest.approx(expected[name], rel=2e-4)
    for step, loss in expected["loss"].items():
        record_deviation(f"one process: losses of {what}", abs(found["loss"][step] / loss - 1))
        assert found["loss"][step] == pytest.approx(loss, rel=1e-5)
    reports = [numbers(json.loads((root / "out/reports/evaluate-details.json").read_text())) for root in (one, other)]
    assert reports[1] == pytest.approx(reports[0], rel=1e-3)
    pictures = [sorted((root / "out/samples").glob("*.png")) for root in (one, other)]
    assert len(pictures[0]) == len(pictures[1]) == 5
    for a, b in zip(*pictures, strict=True):
        difference = np.asarray(Image.open(a), int) - np.asarray(Image.open(b), int)
        assert abs(difference).max() <= 1  # the rounding of a value between two levels


def two_nodes(root, *arguments, torchrun=()):
    """Two groups of processes that meet by c10d on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    meet = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    meet += ["--rdzv-id=test", "--local-addr=127.0.0.1", *torchrun]
    return [start(root, *arguments, torchrun=meet, GLOO_SOCKET_IFNAME="lo") for _ in range(2)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """All stages in one process."""
    return once(tmp_path_factory, "one", lambda root: alone(root, "model.dropout=0"))


@pytest.fixture
def root(tmp_path):
    """A folder with prepared data, where nothing is trained yet."""
    alone(tmp_path / "root", stage="prepare")
    return tmp_path / "root"


def test_the_number_of_processes_changes_nothing(tmp_path, one, record_deviation):
    printed = alone(tmp_path, "model.dropout=0", "trainer.nproc=4")
    assert "4 processes" in printed and printed.count("bits/dim") == 1  # one of them talks
    check_equal(one, tmp_path, "4 processes", record_deviation)
    assert not list(tmp_path.glob("*.log")) and not list(tmp_path.glob("out/*.log"))
    assert len(list(tmp_path.glob("outputs/*/*/main.log"))) == 1


def test_two_nodes_by_torchrun(tmp_path, one, record_deviation):
    """With micro-batches that do not divide the share."""
    results = [ended(node) for node in two_nodes(tmp_path, "model.dropout=0", "trainer.micro_batch_size=3")]
    assert [code for code, _, _ in results] == [0, 0], results
    check_equal(one, tmp_path, "two nodes, micro-batches of 3", record_deviation)


def test_micro_batches_change_nothing_but_memory(tmp_path):
    seen = []
    still = dataclasses.replace(MODEL, dropout=0.0)

    def run(size, model=still):
        trainer = make(tmp_path / str(size), Recorder(), model=model, batch_size=6, micro_batch_size=size, steps=6)
        trainer.model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
        trainer.run()
        return trainer

    whole = run(None)
    assert {*seen} == {6}
    seen.clear()
    parts = run(4)
    assert seen == [4, 2] * 6
    assert torch.allclose(weights(parts), weights(whole), atol=1e-5)
    assert parts.last_row == pytest.approx(whole.last_row, rel=1e-4)


def test_no_two_parts_of_a_step_drop_the_same(tmp_path):
    trainer = make(tmp_path, Recorder(), batch_size=4, micro_batch_size=2)
    states = []
    trainer.model.register_forward_pre_hook(lambda *_: states.append(torch.get_rng_state()))
    trainer.train_step()
    assert len(states) == 2 and not torch.equal(*states)


def wait_for_step(root, step, *processes):
    """Waits for a checkpoint of at least this step."""
    while saved_step(root, "") < step:
        assert all(process.poll() is None for process in processes), [ended(process) for process in processes]
        time.sleep(0.02)


def disturbed(root, victim, sent):
    """The long training, whose worker `victim`, or whose launcher if it is None, gets a signal after a checkpoint."""
    before, run = saved_step(root, ""), long(root)
    assert run.wait_for(lambda: saved_step(root, "") > before), run.printed()
    ranks = run.workers()
    assert all(os.getsid(rank.pid) == rank.pid for rank in ranks)  # a terminal's Ctrl-C reaches none of them itself
    (ranks[victim] if victim is not None else run).send_signal(sent)
    since = time.monotonic()
    code = run.end(30)
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in ranks):
        assert time.monotonic() - since < 15, "a process is left over"
        time.sleep(0.02)
    assert time.monotonic() - since < 15
    return code, run


@pytest.mark.no_cover
def test_stops_and_deaths_lose_nothing(root, tmp_path):
    """Signals to a rank and to the launcher; afterwards, the files of a run that nothing happened to."""
    calm = shutil.copytree(root, tmp_path / "calm")
    run = long(calm)
    assert run.end() == 0, run.printed()
    for victim, sent, code, line in (
        (1, signal.SIGTERM, 75, r"stopped after step \d+, all work is saved; to go on: python .*trainer.nproc=2.*"),
        (0, signal.SIGKILL, 1, r"error: process 0 of 2 was killed \(SIGKILL\): the last checkpoint is kept; to go .*"),
        (None, signal.SIGINT, 75, r"stopped after step \d+, all work is saved; to go on: python .*trainer.nproc=2.*"),
        (None, signal.SIGKILL, -signal.SIGKILL, None),
    ):
        found, run = disturbed(root, victim, sent)
        assert found == code, run.printed()
        assert line is None or re.fullmatch(line, run.last_line())
    kept, run = saved_step(root, ""), long(root)
    assert run.end() == 0 and f"going on after step {kept}" in run.printed() and 0 < kept < 60
    name = "models/model.safetensors"
    assert (root / "out" / name).read_bytes() == (calm / "out" / name).read_bytes()
    assert curves(root / "out") == curves(calm / "out")


@pytest.mark.no_cover
def test_the_second_signal_ends_all_processes_at_once(root):
    """One of them hangs, so the other waits for it, and the first signal cannot be heeded."""
    run = long(root)
    assert run.wait_for(lambda: saved_step(root, "") >= 10)
    ranks = run.workers()
    ranks[1].suspend()
    run.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert run.process.is_alive()
    run.send_signal(signal.SIGTERM)
    assert run.end(5) == -signal.SIGTERM
    assert psutil.wait_procs(ranks[:1], timeout=5)[0] == ranks[:1]
    ranks[1].resume()
    assert psutil.wait_procs(ranks[1:], timeout=5)[0] == ranks[1:]


@pytest.mark.no_cover
def test_another_number_of_processes_goes_on(root, one, record_deviation):
    """From two that know each other as srun's, to one."""
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "here"}
    train = {"recipe": [*COMMON, "model.dropout=0", "trainer.steps=2"], "DVC_ROOT": str(root), **slurm}
    first, second = [launch(root / str(k), out=root / "out", SLURM_PROCID=str(k), **train) for k in range(2)]
    assert first.end() == second.end() == 0, first.printed() + second.printed()
    assert "2 processes" in first.printed() and not second.printed()
    assert "going on after step 2" in alone(root, "model.dropout=0")
    check_equal(one, root, "2 processes, then 1", record_deviation)


def test_torchrun_restarts_from_the_last_checkpoint(root):
    """Each of two agents counts its own restarts; a process of the second one dies."""
    arguments = ["stage=train", *(a for a in LONG if "nproc" not in a), "trainer.resume=never"]
    agents = two_nodes(root, *arguments, torchrun=["--max-restarts=2"])
    wait_for_step(root, 20, *agents)
    (worker,) = (p for p in psutil.Process(agents[-1].pid).children() if "RANK" in p.environ())
    worker.kill()
    results = [ended(agent) for agent in agents]
    assert all(code == 0 for code, _, _ in results), results
    stdout, stderr = ("".join(result[k] for result in results) for k in (1, 2))
    assert re.search(r"going on after step [2-5][05]", stdout), stdout
    assert stderr.count("another process of this job has ended") <= 1
    assert max(curves(root / "out")["loss"]) == 60


ONE_LINE = {
    "trainer.batch_size=9 trainer.nproc=2": "error: trainer.batch_size=9: must be divisible by the 2 processes",
    "trainer.nproc=0": "error: trainer.nproc=0: must be greater than 0",
    "trainer.micro_batch_size=0": "error: trainer.micro_batch_size=0: must be at least 1",
}


@pytest.mark.parametrize("arguments", ONE_LINE)
def test_bad_numbers_are_one_line(tmp_path, arguments):
    assert finish(tmp_path, *arguments.split(), code=2).startswith(ONE_LINE[arguments])
    assert not (tmp_path / "root/runs").exists()


def test_errors_of_one_rank_and_of_all_are_one_line(root):
    """A checkpoint that only the first process reads, and a loss that all of them see."""
    (root / "bad.pt").write_bytes(b"no checkpoint")
    run = long(root, "trainer.resume=bad.pt")
    assert run.end() == 2 and run.last_line().startswith("error: trainer.resume=")
    run = long(root, "optimizer.lr=1e30", "optimizer.grad_clip=null", "trainer.steps=20")
    assert run.end() == 1 and "is not finite" in run.last_line()
    (bad,) = root.glob("runs/*/bad-step-*.pt")
    assert len(torch.load(bad)["x_0"]) == 8  # the whole batch, not a share


def test_what_processes_tell_each_other(tmp_path):
    """Until one of them dies, which the other one notices."""
    names = ["exchange", "save", "quality", "stop_elsewhere", "lose"]
    env = {"MODELING_JOB": str(tmp_path), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"} | measured()
    command = (tmp_path, ROOT / "tests/distributed/together.py", *names)
    first, second = map(ended, [python(*command, RANK=str(k), LOCAL_RANK=str(k), **env) for k in range(2)])
    assert first[0] == 0 and first[1].split() == names, first
    assert second[0] == -signal.SIGKILL and second[1].split() == names[:-1], second


def test_cores_are_shared_by_the_processes_that_may_use_them(monkeypatch):
    """Of a machine; srun binds each to cores of its own, mpirun may bind none."""
    store = torch.distributed.HashStore()
    for index, place in enumerate(("here [0, 1]", "here [0, 1]", "there [0, 1]", "here [2, 3]")):
        store.set(f"cores/{index}", place)
    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    for allowed, sharing in (({1, 0}, 2), ({2, 3}, 2), ({4}, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, allowed=allowed: allowed, raising=False)
        assert collectives._sharing(store, 1, 4) == sharing


def test_a_process_that_computes_wrongly_is_found(tmp_path, monkeypatch):
    """The checksum at a checkpoint covers the weights and their average."""
    check_same = Mock()
    monkeypatch.setattr("modeling.training.trainer.check_same", check_same)
    trainer = make(tmp_path, Recorder(), steps=4)
    trainer.run()
    ((tensors, what),) = [call.args for call in check_same.call_args_list]
    assert len(tensors) == 2 * len(trainer.parameters) and what == "the weights after step 4"


def config(**changes):
    stage = changes.pop("stage", "train")
    trainer = group("trainer", "default", **{"batch_size": 12, "resume": "never"} | changes)
    return SimpleNamespace(stage=stage, device="cpu", trainer=trainer)


def test_a_job_of_several_and_nproc_must_agree(monkeypatch):
    assert launcher.workers_to_start(config(), False) == 0 and launcher.workers_to_start(config(nproc=4), False) == 4
    assert launcher.workers_to_start(config(nproc=3, stage="sample"), False) == 3  # no batch to divide
    assert launcher.workers_to_start(config(nproc=2, stage="prepare"), False) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launcher.workers_to_start(config(), False) == launcher.workers_to_start(config(nproc=2), False) == 0
    with pytest.raises(ConfigError, match=r"trainer\.batch_size=9: must be divisible by the 2 processes"):
        launcher.workers_to_start(config(batch_size=9), False)
    with pytest.raises(ConfigError, match=r"trainer\.nproc=4: the job has 2 processes already"):
        launcher.workers_to_start(config(nproc=4), False)


def test_only_a_restart_overrules_resume_never(monkeypatch, tmp_path):
    fresh = config()
    with launcher.joined(fresh, tmp_path) as out:
        assert out == tmp_path and fresh.trainer.resume == "never"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with launcher.joined(fresh, tmp_path):
        assert fresh.trainer.resume == "auto"


def test_a_bug_is_a_traceback(capsys):
    assert command_line._tell(ValueError("a bug")) == 1
    assert capsys.readouterr().err == "ValueError: a bug\n"


def test_who_prints_the_last_line(monkeypatch, tmp_path, capsys):
    def printed(code):
        launcher.print_last("why", code)
        return capsys.readouterr().err

    assert printed(1) == printed(75) == "why\n"
    monkeypatch.setenv("RANK", "0")  # by torchrun
    assert printed(1) == printed(2) == printed(69) == printed(75) == "why\n"
    monkeypatch.setenv("RANK", "1")
    assert printed(1) == "why\n" and printed(2) == printed(69) == printed(75) == ""
    monkeypatch.setenv("MODELING_JOB", str(tmp_path))  # by the launcher
    assert printed(1) == printed(75) == ""
    monkeypatch.setenv("MODELING_JOB", str(tmp_path / "gone"))
    assert printed(1) == printed(75) == "why\n"


def test_each_process_has_a_device_of_its_own(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    for have, local in ((1, (1, 2)), (2, (1, 2)), (4, (1, 3))):
        monkeypatch.setattr(torch.cuda, "device_count", lambda have=have: have)
        collectives._take_device(*local)
    assert taken == [0, 1, 1]  # a job of srun --gpus-per-task shows each process one
    starters = ("TORCHELASTIC_RUN_ID", "MODELING_JOB")  # torchrun and the launcher show all devices to all
    for starter, (have, local) in zip(starters, ((1, (0, 2)), (2, (0, 3))), strict=True):
        monkeypatch.setenv(starter, "x")
        monkeypatch.setattr(torch.cuda, "device_count", lambda have=have: have)
        with pytest.raises(ConfigError, match=rf"trainer\.nproc={local[1]}: this machine has {have} CUDA devices"):
            collectives._take_device(*local)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(collectives, "connect", lambda: (Mock(), 0, 3))
    monkeypatch.setattr(collectives, "_sharing", lambda *_: 3)
    for name, value in {"WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"trainer\.nproc=3"), collectives.group("auto"):
        pass


def test_a_machine_knows_its_processes_by_its_name(tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 4)
    for k, host in enumerate(("a", "b", "b", "b")):
        store.set(f"host/{k}", host)
    for k, host, place in ((0, "a", (0, 1)), (3, "b", (2, 3)), (1, "b", (0, 3))):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        assert collectives._place(store, k, 4) == place


def test_one_process_alone_uses_mps(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="device=mps: for one process only"), collectives.group("mps"):
        pass


def launched(work, count=2):
    """The exit code of workers that call work(rank), which gives theirs, instead of going on in main.py."""
    code = launcher.launch(count, ["main.py"], "auto")
    if code is None:
        os._exit(work(int(os.environ["RANK"])))
    return code


def test_one_line_and_the_exit_code_are_the_culprits(capsys, tmp_path):
    """Of workers that end one after the other: each waits until the launcher has noticed the end of the one before."""
    folders = map(str, itertools.count())

    def outcome(*codes, lines=True):
        pids = tmp_path / next(folders)
        pids.mkdir()

        def end(rank):
            write_atomic(pids / str(rank), str(os.getpid()).encode())
            before = pids / str(rank - 1)
            while rank and not (before.exists() and not psutil.pid_exists(int(before.read_text()))):
                time.sleep(0.01)
            if lines:
                launcher.print_last(f"line {rank}", codes[rank])
            return codes[rank]

        code = launched(end, count=len(codes))
        return code, capsys.readouterr().err

    assert outcome(0, 0, lines=False) == (0, "")
    assert outcome(0, 75) == (75, "line 1\n") and outcome(75, 1) == (1, "line 1\n")
    assert outcome(69, 2, 1) == (2, "line 1\n")  # the first that did not only lose the others
    assert outcome(69, 75) == (75, "line 1\n") and outcome(69, 69) == (1, "line 0\n")
    code, line = outcome(69, 3, lines=False)
    assert code == 3 and re.fullmatch(
        r"error: process 1 of 2 ended with exit code 3: the last checkpoint is kept; to go on: .*\n", line
    )


def test_workers_are_told_to_stop_where_the_folder_of_the_job_was_removed(tmp_path):
    """As by what cleans the folder of temporary files."""
    if (pid := os.fork()) == 0:
        os._exit(3)
    codes = {}
    launcher._wait([pid], codes, tmp_path / "removed/stop")
    assert codes == {0: 3} and (tmp_path / "removed/stop").exists()


def test_a_worker_that_hangs_after_a_failure_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "GRACE", 0.5)

    def hang_or_fail(rank):
        if rank == 0:
            (tmp_path / "pid").write_text(str(os.getpid()))
            time.sleep(60)
        while not (tmp_path / "pid").exists():
            time.sleep(0.01)
        return 3

    since = time.monotonic()
    assert launched(hang_or_fail) == 3 and time.monotonic() - since < 30
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_a_stop_waits_for_the_slowest_worker(tmp_path, monkeypatch):
    """However long its step takes."""
    monkeypatch.setattr(launcher, "GRACE", 0.1)
    monkeypatch.setattr(signals, "_requested", True)

    def finish_the_step(rank):
        while not signals.stop_requested():
            time.sleep(0.01)
        time.sleep(rank)
        (tmp_path / str(rank)).touch()
        return 75

    assert launched(finish_the_step) == 75
    assert sorted(os.listdir(tmp_path)) == ["0", "1"]


def test_workers_are_a_job_of_their_own_and_share_the_cores(tmp_path, monkeypatch):
    def note(rank):
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        (tmp_path / str(rank)).write_text(json.dumps([*(os.environ[name] for name in names), os.getsid(0)]))
        return 0

    assert launched(note) == 0
    for rank in range(2):
        *found, session = json.loads((tmp_path / str(rank)).read_text())
        assert found == [str(rank), str(rank), "2", "2"] and session != os.getsid(0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(5), raising=False)
    for given, cores in ((None, "2"), ("7", "7")):
        monkeypatch.setenv("OMP_NUM_THREADS", given or "")
        if given is None:
            monkeypatch.delenv("OMP_NUM_THREADS")
        launcher.share_cores(2)
        assert os.environ["OMP_NUM_THREADS"] == cores


def test_a_worker_that_cannot_be_started_leaves_none_behind(tmp_path, monkeypatch):
    fork = os.fork
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pids = []

    def only_once():
        if pids:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        pids.append(fork())
        return pids[0]

    monkeypatch.setattr(os, "fork", only_once)
    with pytest.raises(UserError, match="process 1 of 2 cannot be started: Resource temporarily unavailable"):
        launched(lambda rank: time.sleep(60) or 0)
    assert not psutil.pid_exists(pids[0]) and not list(tmp_path.iterdir())


def test_exit_codes_are_known_where_the_signal_of_a_childs_end_is_ignored():
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert launched(lambda rank: 3 * rank) == 3
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("rank", [0, 1])
def test_dead_processes_are_not_met_and_absent_ones_waited_for_only_so_long(tmp_path, monkeypatch, rank):
    """A store after a restart: both processes of the start before had found each other."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 2)
    for k in range(2):
        store.set(f"word/{k}", f"dead{k}")
        store.set(f"view/{k}", "dead0 dead1")
    for name, value in {"MODELING_JOB": str(tmp_path), "RANK": str(rank), "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(collectives, "TIMEOUT", timedelta(seconds=0.1))
    with pytest.raises(RuntimeError, match="do not come"):
        collectives.connect()
