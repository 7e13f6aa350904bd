"""The real command line and DVC, in processes of their own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
TINY = ["experiment=tiny"]


def spelled_out(recipe, without=""):
    """A recipe of conf/experiment as single overrides, but for those of one group."""
    content = yaml.safe_load((ROOT / f"conf/experiment/{recipe}.yaml").read_text())
    choices = [
        (key.removeprefix("override /"), value) for each in content.pop("defaults") for key, value in each.items()
    ]
    keys = [(f"{group}.{key}", value) for group, values in content.items() for key, value in values.items()]
    shown = [f"{key}={'null' if value is None else value}" for key, value in choices + keys]
    return [each for each in shown if not (without and each.startswith((f"{without}=", f"{without}.")))]


def measured():
    """The variables of coverage, for processes whose lines no others run."""
    return {key: value for key, value in os.environ.items() if key.startswith("COVERAGE_")}


def environment(state, **changes):
    """Of a process without settings of its user; its lines are not measured, which would take a third of its time."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "DVC_", "COVERAGE_"))}
    identity = {f"GIT_{who}_{what}": "t@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    identity["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # of a notebook, and not installed
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return kept | identity | {"PATH": path, "DVC_ROOT": str(state), "OMP_NUM_THREADS": "1"} | changes


def main(state, cwd, *arguments, **changes):
    command = [sys.executable, str(ROOT / "main.py"), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(state, **changes), capture_output=True, text=True)


def copy_repository(folder):
    """A copy of the repository, as Git would hand it over."""
    repository = folder / "repository"
    repository.mkdir()
    for name in (
        "modeling",
        "conf",
        ".dvc/config",
        ".dvc/.gitignore",
        ".dvc/plots.html",
        ".dvcignore",
        ".gitignore",
        "main.py",
        "dvc.yaml",
    ):
        source, target = ROOT / name, repository / name
        target.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    env = environment(repository)
    for command in (["git", "init", "-q"], ["git", "add", "-A"], ["git", "commit", "-qm", "start"]):
        subprocess.run(command, cwd=repository, env=env, check=True)
    return repository
