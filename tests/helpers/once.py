"""Fixtures that take long, made by one of the workers for all of them."""

import fcntl
import os
import shutil


def once(tmp_path_factory, name, make):
    """A copy of the folder that the first worker to need it fills by make(folder); the others wait for it."""
    base = tmp_path_factory.getbasetemp()
    common = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = common / name
    with (common / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            made = common / f"{name}.partial"  # of a maker that failed, too
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            make(made)
            made.rename(folder)
    return shutil.copytree(folder, tmp_path_factory.mktemp(name) / name, symlinks=True)
