"""`make bench`: this project against its peers on this machine, in one run, as ratios with their spread.

Prints tables and writes benchmarks/results/<machine>.json, .md and .png. `--quick` takes a few minutes on two CPU
cores, `--tiny` only shows that everything runs. Nothing else should run beside it.
"""

import argparse
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench import report, sections, startup
from benchmarks.bench.scaling import scaling
from benchmarks.bench.size import Size, sized
from benchmarks.machine import describe
from benchmarks.measure import NOISY, Elsewhere
from benchmarks.project import RESULTS
from modeling.inference.device import choose_compute

SECTIONS: dict[str, Callable[[Size, Elsewhere], dict[str, Any]]] = {
    "training": sections.training,
    "step": sections.step,
    "sampling": sections.sampling,
    "evaluation": lambda size, _: sections.evaluation(size),
    "startup": lambda size, _: startup.measure(size.rounds, size.commands),
    "scaling": lambda size, _: scaling(size),
}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command line; returns all results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", dest="mode", action="store_const", const="quick", help="a few minutes on two cores")
    mode.add_argument("--tiny", dest="mode", action="store_const", const="tiny", help="only that it runs")
    parser.add_argument("--only", nargs="+", default=[*SECTIONS], choices=SECTIONS, metavar="SECTION")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.set_defaults(mode="full")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.filterwarnings("ignore", module=NOISY)
    device = choose_compute("auto", "auto").device
    size = sized(device, given.mode)
    results: dict[str, Any] = {"mode": given.mode, "machine": describe(device)}
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / (results["machine"]["name"] + ("" if given.mode == "full" else f"-{given.mode}") + ".json")
    if len(given.only) < len(SECTIONS) and path.exists():
        results = json.loads(path.read_text()) | results
    with Elsewhere() as elsewhere:
        for name in SECTIONS:
            if name in given.only:
                logging.info("%s ...", name)
                results[name] = SECTIONS[name](size, elsewhere)
    path.write_text(json.dumps(results, indent=2) + "\n")
    report.plot(results, path.with_suffix(".png"))
    text = "\n".join(report.lines(results))
    path.with_suffix(".md").write_text(text + "\n")
    print(text)
    return results


if __name__ == "__main__":
    main()
