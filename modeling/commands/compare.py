"""Compares DVC experiments, the best first: python -m modeling.commands.compare --help."""

import argparse
import json
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modeling.commands import call
from modeling.pages.html import MOST_BYTES, pictures, plot, render
from modeling.pages.numbers import is_fid, label, with_error
from modeling.pages.results import Read, Results, folder_reader, thinned
from modeling.recipe import flat
from modeling.reliability.errors import UserError
from modeling.reliability.files import write_atomic

WIDTH = 100  # columns where there is no terminal
LINES = 2  # of the parameters of an experiment, in a quarter of the width
MORE_IS_BETTER = ("recognised", "images", "images_per_second")
USUAL = ("wavelet_distance", "bits_per_dim", "held_out_loss")  # of these the first that all have ranks, after FID
MOST_FIDS, MOST_METRICS = 2, 6  # columns; with the others there are ten at most
MOST_POINTS = 500  # of a curve
FOR_MARKUP = 400_000  # bytes of a page for its own words, its table and what JSON in HTML needs more
PLOTS = {"loss": "Training loss", "held_out_loss": "Held-out loss (EMA)", "grad_norm": "Norm of the gradient"}


@dataclass
class Experiment:
    """A row: an experiment, the workspace or a commit."""

    name: str
    rev: str
    created: str
    state: str  # "queued", "running" or "failed" in DVC's words, else empty
    metrics: dict[str, float]
    params: dict[str, Any]
    is_experiment: bool
    rank: int | None = field(default=None, init=False)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m modeling.commands.compare",
        description="The DVC experiments, the best first, and the parameters in which they differ.",
    )
    parser.add_argument("names", nargs="*", help="experiments to compare; all of this commit unless you name some")
    parser.add_argument(
        "--sort-by", metavar="NAME", help="a metric, such as held_out_loss; otherwise FID or the wavelet distance"
    )
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a page with curves and samples too")
    parser.add_argument("-A", "--all-commits", action="store_true", help="the experiments of all commits")
    return parser.parse_args(arguments)


def run(arguments: Sequence[str]) -> None:
    """Prints the table and writes the page, else raises UserError."""
    options = parse_arguments(arguments)
    rows = parse(shown_by_dvc(options.all_commits))
    experiments = [row for row in rows if row.is_experiment]
    if not experiments:
        others = "" if options.all_commits else ", or -A for those of other commits"
        raise UserError(f"no experiments yet: make one with dvc exp run -S experiment=demo{others}")
    if unknown := [name for name in options.names if name not in {row.name for row in rows}]:
        raise UserError(f"no experiment {unknown[0]}: there are {', '.join(row.name for row in rows)}")
    if options.names:
        rows = [row for row in rows if row.name in options.names]
    metric = rank(rows, options.sort_by)
    rows.sort(key=lambda row: (row.rank is None, row.rank))
    print_table(rows)
    for note in notes(rows, metric):
        print(note)
    if options.html:
        write_atomic(options.html, page(rows, metric).encode())
        print(f"page: {options.html}")


def shown_by_dvc(all_commits: bool) -> list[dict[str, Any]]:
    """What `dvc exp show --json` prints; UserError with DVC's own words if it fails."""
    command = [sys.executable, "-m", "dvc", "exp", "show", "--json", *(["--all-commits"] if all_commits else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        raise UserError(f"dvc exp show: {(said or ['ERROR: failed'])[0].removeprefix('ERROR: ')}")
    return list(json.loads(done.stdout))


def parse(shown: Iterable[Mapping[str, Any]]) -> list[Experiment]:
    """The rows of the workspace and the commits, each with the experiments that start from it."""
    found = []
    for baseline in shown:
        found.append(_row(baseline, None, is_experiment=False))
        for branch in baseline.get("experiments") or ():
            found.append(_row(branch["revs"][0], branch["executor"], is_experiment=True))  # the first is the newest
    return found


def _row(state: Mapping[str, Any], executor: Mapping[str, Any] | None, is_experiment: bool) -> Experiment:
    data = state.get("data") or {}
    files = (each.get("data") or {} for each in (data.get("metrics") or {}).values())
    metrics = {key: value for each in files for key, value in each.items() if isinstance(value, int | float)}
    params = (data.get("params") or {}).get("params.yaml", {}).get("data") or {}
    doing = str((executor or {}).get("state") or ("failed" if state.get("error") else "")).replace("success", "")
    return Experiment(
        name=state.get("name") or state["rev"][:7] if state["rev"] != "workspace" else "workspace",
        rev=state["rev"],
        created=(data.get("timestamp") or "").replace("T", " ")[5:16],  # month to minute
        state=doing,
        metrics={} if doing else metrics,  # those of an unfinished one would be those of its commit
        params={key: value for key, value in flat(params).items() if not key.startswith("wandb.")},
        is_experiment=is_experiment,
    )


def rank(rows: Sequence[Experiment], sort_by: str | None) -> str:
    """Numbers the rows by a metric, and returns its name, "" if there is none; equal values share a number.

    Unless it is given, it is the FID if all that have metrics have it, else the first of USUAL that all have.
    """
    known = list(dict.fromkeys(key for row in rows for key in row.metrics))
    if sort_by is not None and sort_by not in known:
        raise UserError(f"--sort-by {sort_by}: allowed are {', '.join(known) or 'none yet, as nothing has metrics'}")
    measured = [row.metrics for row in rows if row.metrics]
    usual = [*filter(is_fid, known), *USUAL]
    common = [key for key in usual if key in known and all(key in metrics for metrics in measured)]
    metric = sort_by or next(iter([*common, *(key for key in reversed(usual) if key in known), *known]), "")
    values = sorted((row.metrics[metric] for row in rows if metric in row.metrics), reverse=metric in MORE_IS_BETTER)
    for row in rows:
        row.rank = values.index(row.metrics[metric]) + 1 if metric in row.metrics else None
    return metric


def differences(rows: Sequence[Experiment]) -> list[dict[str, Any]]:
    """For each row the parameters in which the rows differ: first those in which this one is unlike most.

    A commit without metrics does not count and has none.
    """
    counted = [row for row in rows if row.is_experiment or row.metrics]
    keys = dict.fromkeys(key for row in counted for key in row.params)
    usual = {}
    for key in keys:
        values = Counter(json.dumps(row.params.get(key)) for row in counted)
        if len(values) > 1:
            usual[key] = values.most_common(1)[0][0]
    found = []
    for row in rows:
        own = {key: row.params[key] for key in usual if key in row.params and row in counted}
        found.append(dict(sorted(own.items(), key=lambda item: json.dumps(item[1]) == usual[item[0]])))
    return found


def notes(rows: Sequence[Experiment], metric: str) -> list[str]:
    """What is to be known about the order."""
    found = [f"best first by {metric}"] if metric else []
    if len({row.params.get("data.name") for row in rows if row.metrics}) > 1:
        found.append("these experiments have different data: their numbers do not compare")
    return found


def table(rows: Sequence[Experiment], width: int) -> tuple[list[str], list[list[str]]]:
    """Headings and cells; at most ten columns, the last of them the parameters in `width` characters at most."""
    known = dict.fromkeys(key for row in rows for key in row.metrics)
    fids = [*filter(is_fid, known)][:MOST_FIDS]
    others = (*USUAL, "recognised", "images", "images_per_second")
    metrics = [*fids, *(key for key in others if key in known)][:MOST_METRICS]
    cells = []
    for row, differs in zip(rows, differences(rows), strict=True):
        numbers = [with_error(row.metrics, key) if key in row.metrics else "" for key in metrics]
        shown = textwrap.shorten(" ".join(f"{key}={value}" for key, value in differs.items()), width, placeholder=" …")
        cells.append([row.state or str(row.rank or "-"), row.name, row.created, *numbers, shown])
    return ["rank", "experiment", "created", *map(label, metrics), "differs in"], cells


def print_table(rows: Sequence[Experiment]) -> None:
    """Prints the table as wide as the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
    headings, cells = table(rows, LINES * (width // 4))
    shown = Table(box=None, expand=True, pad_edge=False)
    for heading in headings[:-1]:
        number = heading not in ("rank", "experiment", "created")
        shown.add_column(heading, justify="right" if number else "left", no_wrap=heading != "experiment")
    shown.add_column(headings[-1], ratio=1, min_width=width // 4)
    for row in cells:
        shown.add_row(*map(Text, row))  # as text: a name in brackets is no style
    Console(width=width, highlight=False).print(shown)


def page(rows: Sequence[Experiment], metric: str) -> str:
    """The HTML page: the table, the curves of all rows in one plot for each metric, and their samples."""
    results = {row.name: Results(reader(row)) for row in rows if row.metrics}
    curves = {
        name: {key: thinned(points, MOST_POINTS) for key, points in each.curves.items()}
        for name, each in results.items()
    }
    plots = {}
    for key, heading in PLOTS.items():
        if series := {name: found[key] for name, found in curves.items() if found.get(key)}:
            plots[heading] = plot(series, heading, log=True)
    differs_in = {row.name: differs for row, differs in zip(rows, differences(rows), strict=True) if differs}
    data = {
        "experiments": [vars(row) | {"curves": curves.get(row.name, {})} for row in rows],
        "sorted_by": metric,
        "differs_in": differs_in,
        "parameters": sorted({key for differs in differs_in.values() for key in differs}),
    }
    samples = {name: content for name, each in results.items() if (content := each.read("samples.png"))}
    headings, cells = table(rows, LINES * WIDTH // 4)
    return render(
        "compare.html",
        title="DVC experiments",
        subtitle=f"{len(rows)} of the repository {Path.cwd().name}",
        headings=headings,
        rows=cells,
        notes=notes(rows, metric),
        plots=plots,
        samples=pictures(samples, MOST_BYTES - FOR_MARKUP - len(json.dumps([data, plots]))),
        data=data,
    )


def reader(row: Experiment) -> Read:
    """Reads the reports of a row: those of the workspace from the disk, others from Git and DVC's cache."""
    if row.rev == "workspace":
        return folder_reader(Path("reports"))
    from dvc.api import DVCFileSystem

    files = DVCFileSystem(rev=row.rev)

    def read(name: str) -> bytes | None:
        try:
            return bytes(files.read_bytes(f"reports/{name}"))
        except Exception:  # no such file, or not in the cache: DVC's errors for that are of many kinds
            return None

    return read


def main() -> None:
    call(run)


if __name__ == "__main__":
    main()
