"""Compares DVC experiments, the best first: python -m modeling.commands.compare --help."""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modeling.commands import call
from modeling.pages.experiments import Experiment, differences, notes, parse, rank, table
from modeling.pages.html import MOST_BYTES, pictures, plot, render
from modeling.pages.results import Read, Results, folder_reader, thinned
from modeling.reliability.errors import UserError
from modeling.reliability.files import write_atomic
from modeling.reporting.curves import LOSSES

WIDTH = 100  # columns where there is no terminal
LEAST = 5  # columns, with one metric
LONGEST = 24  # characters of a name in one line
LINES = 2  # of the parameters of an experiment, in a quarter of the width
MOST_POINTS = 500  # of a curve
FOR_MARKUP = 400_000  # bytes of a page for its own words, its table and what JSON in HTML needs more
PLOTS = {k: name[0].upper() + name[1:] for k, name in (LOSSES | {"grad_norm": "norm of the gradient"}).items()}


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
    if not any(row.is_experiment for row in rows):
        others = "" if options.all_commits else ", or -A for those of other commits"
        raise UserError(f"no experiments yet: make one with dvc exp run -S experiment=demo{others}")
    telling = [row for row in rows if row.is_experiment or row.metrics]  # not a commit that trained nothing
    if unknown := [name for name in options.names if name not in {row.name for row in rows}]:
        raise UserError(f"no experiment {unknown[0]}: there are {', '.join(row.name for row in telling)}")
    rows = [row for row in rows if row.name in options.names] if options.names else telling
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


def print_table(rows: Sequence[Experiment]) -> None:
    """Prints the table as wide as the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
    headings, cells = table(rows, LINES * (width // 4))
    left_out: list[str] = []
    while len(headings) > LEAST and _needed([headings, *cells]) > width - width // 4:  # the last are the least telling
        left_out.insert(0, headings.pop(-2))
        cells = [[*row[:-2], row[-1]] for row in cells]
    shown = Table(box=None, expand=True, pad_edge=False)
    for heading in headings[:-1]:
        number = heading not in ("rank", "experiment", "created")
        shown.add_column(heading, justify="right" if number else "left", no_wrap=heading != "experiment")
    shown.add_column(headings[-1], ratio=1, min_width=width // 4)
    for row in cells:
        shown.add_row(*map(Text, row))  # as text: a name in brackets is no style
    Console(width=width, highlight=False).print(shown)
    if left_out:
        print(f"no room for: {', '.join(left_out)}; --html shows all")


def _needed(lines: Sequence[Sequence[str]]) -> int:
    """Characters that all columns but the last take, with the blanks between them; longer names are wrapped."""
    return sum(min(max(map(len, column)), LONGEST) + 2 for column in list(zip(*lines, strict=True))[:-1])


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
