"""The environment of all tests, and their common fixtures."""
# ruff: noqa: E402  # the environment comes before what reads it

import os
import sys
from collections.abc import Callable, Generator
from contextlib import nullcontext
from importlib.util import find_spec

from helpers.measuring import import_unmeasured, leave_out_what_is_not_ours, unmeasured

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two tests run at a time, and threads that wait for a core waste it
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at the first product of a process
if "TEST_CUDA" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what they compare bit for bit, and how long they wait, is for a CPU

LONG = ("test_processes", "test_dvc_resume", "test_pipeline", "test_kill", "test_benchmarks", "test_faults")
# They run, often, lines that other tests run: measuring would make them several times as slow for nothing.
UNMEASURED = ("test_architecture", "test_benchmarks", "test_docs", "test_dvc_resume", "test_extending", "test_faults")
UNMEASURED += ("test_fuzz", "test_kill", "test_peers", "test_terminal")

if "PYTEST_XDIST_WORKER" in os.environ:  # while all workers start, and not in the middle of a test
    import_unmeasured("torch._dynamo", "hypothesis", "wandb", "matplotlib.pyplot", "scipy.stats", "diffusers")
    leave_out_what_is_not_ours()

import pytest
import torch
from helpers.configs import group

from modeling.build import build_schedule
from modeling.diffusion.schedule import SCHEDULES, NoiseSchedule

# What compares with peers or runs a linter is left out, and said so, where requirements-dev.txt is not installed.
DEV = find_spec("diffusers") is not None
NEED_DEV = ["diffusion/test_peers.py", "interop/test_diffusers.py", "test_benchmarks.py"]
collect_ignore = [] if DEV else NEED_DEV


def pytest_report_header() -> str:
    left_out = f"left out are {', '.join(NEED_DEV)} and the tests marked dev"
    return "" if DEV else f"requirements-dev.txt is not installed: {left_out}"


@pytest.hookimpl(wrapper=True, trylast=True)  # within what pytest-cov does for no_cover
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    with unmeasured() if item.get_closest_marker("no_cover") else nullcontext():
        return (yield)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not DEV:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("dev")])
        items[:] = [item for item in items if not item.get_closest_marker("dev")]
    # What takes long begins first, so that no worker is left with it alone: a compiler without its cache, too.
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    items.sort(key=lambda item: "compile" not in item.name)
    for item in items:
        if item.path.stem in UNMEASURED and not item.get_closest_marker("measured"):
            item.add_marker(pytest.mark.no_cover)
    if not torch.cuda.is_available():
        reason = "there is no CUDA device here" if "TEST_CUDA" in os.environ else "runs with TEST_CUDA=1"
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason=reason))  # hides no package: a GPU cannot be installed


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    """Each of the registry, with the keys of its conf file."""
    config = group("diffusion", request.param)
    config.num_timesteps = len(getattr(config, "betas", range(config.num_timesteps)))  # a table decides by itself
    return build_schedule(config)


@pytest.fixture(autouse=True)
def no_process_is_left():
    """Ends what a failed test has left running or stopped."""
    yield
    if "helpers.processes" in sys.modules:
        sys.modules["helpers.processes"].end_all()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


DEVIATION = "deviation: "  # what marks one among the properties of a test


@pytest.fixture
def record_deviation(record_property: Callable[[str, object], None]) -> Callable[[str, float], None]:
    """Notes how far an item is from its reference; the largest of each is printed at the end of the run."""
    return lambda item, value: record_property(DEVIATION + item, value)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    largest: dict[str, float] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name.startswith(DEVIATION):
                    item = name.removeprefix(DEVIATION)
                    largest[item] = max(largest.get(item, 0.0), value)
    if largest:
        terminalreporter.section("largest relative deviations")
        for item, value in sorted(largest.items()):
            terminalreporter.write_line(f"{value:8.1e}  {item}")
