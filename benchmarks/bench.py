"""`make bench`: this project against its peers on this machine, in one run, as ratios with their spread.

Prints tables and writes benchmarks/results/<machine>.json and .png. `--quick` takes a few minutes on two CPU cores,
`--tiny` only shows that everything runs. Nothing else should run beside it.
"""

import argparse
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import machine, report, sections, startup
from benchmarks.measure import NOISY, Elsewhere
from benchmarks.project import command_line
from modeling.inference.device import choose_compute

ROOT = Path(__file__).parent


def measure(mode: str, only: list[str]) -> dict[str, Any]:
    """All sections, or those in `only`."""
    device = choose_compute("auto", "auto").device
    size = sections.sized(device, mode)
    rounds = {"full": 5, "quick": 2, "tiny": 1}[mode]
    measured: dict[str, Callable[[Elsewhere], dict[str, Any]]] = {
        "training": lambda elsewhere: sections.training(size, elsewhere),
        "step": lambda elsewhere: sections.step(size, elsewhere),
        "sampling": lambda elsewhere: sections.sampling(size, elsewhere),
        "evaluation": lambda _: sections.evaluation(size),
        "startup": lambda _: startup.measure(rounds, commands=mode != "tiny"),
        "scaling": lambda _: sections.scaling(size),
    }
    found: dict[str, Any] = {"mode": mode, "machine": machine.describe(device)}
    with Elsewhere() as elsewhere:
        for name, section in measured.items():
            if not only or name in only:
                logging.info("%s ...", name)
                found[name] = section(elsewhere)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", dest="mode", action="store_const", const="quick", help="a few minutes on two cores")
    mode.add_argument("--tiny", dest="mode", action="store_const", const="tiny", help="only that it runs")
    parser.add_argument("--only", nargs="+", default=[], metavar="SECTION", help="training, step, sampling, ...")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the results")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.filterwarnings("ignore", module=NOISY)
    results = measure(arguments.mode or "full", arguments.only)
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = arguments.out / (results["machine"]["name"] + ("" if results["mode"] == "full" else f"-{results['mode']}"))
    kept = (
        json.loads(name.with_suffix(".json").read_text())
        if arguments.only and name.with_suffix(".json").exists()
        else {}
    )
    results = kept | results
    name.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
    report.plot(results, name.with_suffix(".png"))
    text = "\n".join(report.lines(results))
    name.with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    command_line(main)
