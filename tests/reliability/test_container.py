"""Limits of containers, from files as the kernel shows them."""

import math

import pytest

from modeling.reliability import container

V1_MEMORY = {"memory.usage_in_bytes": "900", "memory.stat": "cache 5\ninactive_file 1\ntotal_inactive_file 100"}
V2_MEMORY = {"memory.max": "1000", "memory.current": "900", "memory.stat": "anon 7\ninactive_file 30"}
NO_V1_LIMIT = {"memory.limit_in_bytes": str(2**63 - 4096)} | V1_MEMORY

# What the system shows: the groups of the process, the files of groups; the cores of 8 and the bytes of that.
SHOWN = {
    "version 2, the own group": ("0::/", {"": {"cpu.max": "250000 100000"} | V2_MEMORY}, 2, 130),
    "less than a core": ("0::/", {"": {"cpu.max": "50000 100000"}}, 1, math.inf),
    "no limit": ("0::/", {"": {"cpu.max": "max 100000", "memory.max": "max"}}, 8, math.inf),
    "more than there are": ("0::/", {"": {"cpu.max": "1600000 100000"}}, 8, math.inf),
    "of a group above": (
        "0::/a/b",
        {"a": {"cpu.max": "300000 100000"}, "a/b": {"cpu.max": "400000 100000"}},
        3,
        math.inf,
    ),
    "of the least of two": ("0::/a/b", {"a": V2_MEMORY, "a/b": V2_MEMORY | {"memory.max": "950"}}, 8, 80),
    "version 1": (
        "4:memory:/x\n2:cpu,cpuacct:/x\n1:cpuset:/",
        {
            "cpu/x": {"cpu.cfs_quota_us": "400000", "cpu.cfs_period_us": "100000"},
            "memory/x": {"memory.limit_in_bytes": "1000"} | V1_MEMORY,
        },
        4,
        200,
    ),
    "version 1, a path of the machine": (
        "2:cpu:/docker/7f",
        {"cpu": {"cpu.cfs_quota_us": "200000", "cpu.cfs_period_us": "100000"}},
        2,
        math.inf,
    ),
    "version 1 without limits": (
        "4:memory:/\n2:cpu:/\n0::/",
        {"cpu": {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, "memory": NO_V1_LIMIT},
        8,
        2**63 - 4096 - 800,
    ),
    "not Linux": (None, {"": {"cpu.max": "100000 100000"}}, 8, math.inf),
}


@pytest.mark.parametrize("name", SHOWN)
def test_limits_of_containers(name, tmp_path, monkeypatch):
    own, groups, cores, left = SHOWN[name]
    if own is not None:
        (tmp_path / "own").write_text(own + "\n")
    for group, files in groups.items():
        (tmp_path / "groups" / group).mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (tmp_path / "groups" / group / file).write_text(text + "\n")
    monkeypatch.setattr(container, "OWN", tmp_path / "own")
    monkeypatch.setattr(container, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(container.os, "sched_getaffinity", lambda process: range(8), raising=False)
    assert container.cores() == cores
    assert container.memory_left() == pytest.approx(left)


def test_cores_without_affinity(monkeypatch, tmp_path):
    """As on macOS."""
    monkeypatch.setattr(container, "OWN", tmp_path / "absent")
    monkeypatch.delattr(container.os, "sched_getaffinity", raising=False)
    for counted, cores in ((6, 6), (None, 1)):
        monkeypatch.setattr(container.os, "cpu_count", lambda counted=counted: counted)
        assert container.cores() == cores
