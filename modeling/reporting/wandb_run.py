"""The W&B run: the only module that imports wandb. Never uploads code, never prompts, never blocks for long.

A run belongs to one experiment (`experiment`). Without a key or a network it is written offline, and one line says how
to open it. Every value is logged with an explicit step, so that a resumed run continues its curves. If a picture fails,
the numbers go on; if W&B fails, training goes on without it. W&B's variables in the environment override conf/.
wandb is imported where it is used: it takes half a second, and `wandb.mode=disabled` and most processes use none of it.
"""

import logging
import os
import re
import shlex
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from modeling.reliability.errors import short
from modeling.reliability.files import state_root
from modeling.reporting.wandb_mode import wanted_mode
from modeling.settings.groups import WandbConfig

log = logging.getLogger(__name__)
MARK = "repeated-by-a-later-folder"  # a file in the offline folders of processes that log in `logging_again`
ONLINE = "on-the-server"  # a file in the folders of processes that the server answered
# What wandb.init would let its argument override, against what W&B documents.
VARIABLES = {
    **{"project": "WANDB_PROJECT", "entity": "WANDB_ENTITY", "name": "WANDB_NAME", "dir": "WANDB_DIR"},
    **{"group": "WANDB_RUN_GROUP", "job_type": "WANDB_JOB_TYPE", "tags": "WANDB_TAGS", "notes": "WANDB_NOTES"},
}
_PROCESS = f"by hand {uuid.uuid4().hex[:8]}"


def experiment() -> str:
    """The experiment of this process: that of `dvc exp run`, "" under `dvc repro`; by hand, each process is its own."""
    return os.environ.get("DVC_EXP_NAME") or ("" if "DVC_STAGE" in os.environ else _PROCESS)


def about_experiment() -> dict[str, str]:
    """What wandb.init is told of a DVC experiment, under its names; nothing by hand.

    The group is the sweep: experiments queued with `--name q` are called q-1, q-2, ...; those without a name have only
    their commit in common.
    """
    name, commit = os.environ.get("DVC_EXP_NAME"), os.environ.get("DVC_EXP_BASELINE_REV", "")[:7]
    if not name:
        return {}
    sweep = re.fullmatch(r"(.+)-\d+", name)
    return {"name": name, "group": sweep[1] if sweep else commit, "notes": f"DVC experiment {name} of commit {commit}"}


def on_server(run_id: str) -> bool:
    """Whether W&B's server has a part of a run: one that was synced, even in part, or logged online.

    A second offline part of such a run would repeat and renumber the rows that the server has.
    """
    files = Path(os.environ.get("WANDB_DIR") or state_root()) / "wandb"
    return any(any(f.glob("*.wandb.sync*")) or (f / ONLINE).exists() for f in _folders(files, run_id))


def _folders(files: Path, run_id: str) -> list[Path]:
    """The folders of a run; W&B numbers those that begin in one second."""
    return [*files.glob(f"*-{run_id}"), *files.glob(f"*-{run_id}-[0-9]*")]


class Picture(NamedTuple):
    path: Path  # of a PNG
    caption: str


def has_key() -> bool:
    """Whether W&B finds an API key, in the environment or where `wandb login` leaves it; asks no server."""
    import wandb

    return bool(wandb.login(prompt=False, verify=False))


class WandbRun:
    """One W&B run, or none if the mode is `disabled` or W&B fails; the same `run_id` continues the same run.

    It gets another id if it is offline and the server has a part of it. `about` holds further arguments of wandb.init.
    Files and caches lie in wandb/ at the repository's root, the run's in a temporary folder if that cannot be written.
    """

    def __init__(
        self, settings: WandbConfig, config: Mapping[str, Any], run_id: str, about: Mapping[str, Any] | None = None
    ) -> None:
        mode = wanted_mode(settings)
        self.run: Any = None
        self.run_id = run_id
        self.folder: Path | None = None  # of this process's files, if the run is offline
        self.first = 0  # the first step that W&B's server does not have
        self.without: set[str] = set()  # the pictures that failed
        if mode == "disabled":
            return
        import wandb
        from wandb.analytics.opentelemetry import opentelemetry_proxy

        # What W&B notes about itself it sends when the process ends: of an offline run too, or for 20 s to no answer.
        opentelemetry_proxy.disable()
        root = state_root()
        for name in ("cache", "data"):  # else in the home folder, which may be read-only
            os.environ.setdefault(f"WANDB_{name.upper()}_DIR", str(root.absolute() / "wandb" / name))
        options = wandb.Settings(
            init_timeout=settings.timeout,
            finish_timeout=settings.timeout,
            save_code=False,
            disable_code=True,
            disable_git=True,  # else W&B uploads the difference to the last commit
            console="off",
            silent=True,
        )
        given = {"project": settings.project, "entity": settings.entity, "dir": str(root), **(about or {})}
        given = {key: value for key, value in given.items() if not os.environ.get(VARIABLES[key])}
        # A model is evaluated again with another sampler.
        given |= {"config": dict(config), "allow_val_change": True, "resume": "allow", "settings": options}
        start = partial(wandb.init, **given)
        if mode == "online":
            try:
                wandb.setup(options)  # else the login asks the server for the name of the user
                if not wandb.login(prompt=False, verify=False):
                    raise RuntimeError("no API key: set WANDB_API_KEY or run `wandb login`")
                self.run = start(mode="online", id=run_id)
            except Exception as error:  # not only W&B's own kinds
                log.warning("W&B: no connection (%s): this run is offline", short(error))
                mode = "offline"
                with suppress(Exception):
                    wandb.teardown()
        with self._guarded():
            if mode == "offline":
                if on_server(run_id):
                    self.run_id = uuid.uuid4().hex[:12]
                    log.info("W&B's server has a part of run %s: this is a new run, %s", run_id, self.run_id)
                self.run = start(mode="offline", id=self.run_id)
            if self.run.offline:
                self.folder = Path(self.run.settings.sync_dir)
            else:
                self.first = int(self.run.step)
                with suppress(OSError):
                    Path(self.run.settings.sync_dir, ONLINE).touch()
            for section in ("train", "held_out", "samples"):
                self.run.define_metric(f"{section}/*", step_metric="train/images")
            for loss in ("train/loss", "held_out/loss"):
                self.run.define_metric(loss, step_metric="train/images", summary="min")

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Catches every error of W&B's process, its network or its files: from then on, nothing is logged to W&B."""
        try:
            yield
        except Exception as error:  # each part of W&B has its own kinds, and none may end a training
            log.warning("W&B failed (%s): no more of this run is tracked there", short(error))
            self.run = None

    def log(self, values: Mapping[str, float | Picture], step: int) -> None:
        """Logs numbers and pictures of a step, unless W&B's server has that step already."""
        if self.run is None or step < self.first:
            return
        numbers = {key: value for key, value in values.items() if not isinstance(value, Picture)}
        pictures = {key: value for key, value in values.items() if isinstance(value, Picture)}
        with self._guarded():
            self.run.log(numbers, step=step)
        for key, picture in pictures.items():
            self._log_picture(key, picture, step)

    def _log_picture(self, key: str, picture: Picture, step: int) -> None:
        """Logs a picture; one that fails costs a warning, the first time, and nothing else."""
        if self.run is None:
            return
        import wandb

        try:
            self.run.log({key: wandb.Image(str(picture.path), caption=picture.caption)}, step=step)
        except Exception as error:  # of Pillow, the disk or W&B
            if key not in self.without:
                log.warning("W&B: %s of step %d is missing there (%s)", key, step, short(error))
            self.without.add(key)

    def summarize(self, values: Mapping[str, float]) -> None:
        """Puts final numbers into the run's summary: columns of the table of runs, not charts of one point."""
        if self.run is not None:
            with self._guarded():
                self.run.summary.update(dict(values))

    @contextmanager
    def logging_again(self) -> Iterator[None]:
        """Within the context, all that earlier processes logged is logged again; then their offline folders go."""
        if self.folder is not None:
            with suppress(OSError):
                (self.folder / MARK).touch()
        yield
        if self.run is not None:
            for folder in _folders(Path(self.run.settings.sync_dir).parent, self.run_id):
                repeated = (folder / MARK).exists() and not any(folder.glob("*.wandb.sync*"))
                if repeated and folder != self.folder:
                    shutil.rmtree(folder, ignore_errors=True)

    def finish(self, exit_code: int = 0) -> None:
        """Ends the run, and logs how to open it."""
        if self.run is None:
            return
        url = None if self.folder else self.run.url  # offline, to ask for it is a warning
        with self._guarded():
            self.run.finish(exit_code=exit_code)
        if self.folder is not None:
            shortest = min(str(self.folder), os.path.relpath(self.folder), key=len)
            log.info("W&B (offline): wandb leet %s", shlex.quote(shortest))
        else:
            log.info("W&B: %s", url)
