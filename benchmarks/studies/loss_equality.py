"""Shows that the fast path trains as float32 does: `python -m benchmarks.studies.loss_equality`.

The same --steps on the same batches with the same noise, once in float32, not compiled, and once in what the defaults
choose here, beside a second float32 run from another seed, which shows how large a difference means nothing. The
held-out losses are all taken under the same noise. Writes the losses and their plot.
"""

import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.command import as_json, figure, run_study
from benchmarks.machine import describe
from benchmarks.project import RESULTS, compute_of, configure, trainer_on
from modeling.data.prepared import prepare
from modeling.reliability.terminal import counted
from modeling.training.trainer import Reporter

RUNS = {
    "float32": ("precision=fp32", "trainer.compile=false", "seed=0"),
    "fast path": ("precision=auto", "seed=0"),
    "float32, another seed": ("precision=fp32", "trainer.compile=false", "seed=1"),
}
Rows = list[dict[str, float]]


class Recorder(Reporter):
    """Keeps the logged rows."""

    def __init__(self) -> None:
        self.rows: Rows = []

    def logged(self, step: int, row: dict[str, float], seconds: float) -> None:
        """See Reporter."""
        self.rows.append(row)


def train(*overrides: str) -> Rows:
    """The logged rows of one run on the embedded shapes."""
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as folder:
        config = configure(*overrides, f"out_dir={folder}")
        trainer_on(config, prepare(config, config.data, again=True), Path(folder), recorder).run()
    return recorder.rows


def differences(a: Rows, b: Rows) -> list[float]:
    """Differences of the logged losses, b against a, in percent."""
    return [100 * (y["loss"] / x["loss"] - 1) for x, y in zip(a, b, strict=True)]


def measure(overrides: list[str], steps: int) -> dict[str, Any]:
    """Trains all runs and compares them with the first."""
    intervals = [f"trainer.{name}_every={steps}" for name in ("evaluate", "sample", "checkpoint")]
    plain = ["experiment=demo", "model.class_conditional=false", "trainer.label_dropout=0", "optimizer.lr_decay=none"]
    common = [*plain, *intervals, f"trainer.steps={steps}", f"trainer.log_every={max(1, steps // 80)}", *overrides]
    runs = {name: train(*common, *own) for name, own in counted("training", [*RUNS.items()], "runs")}
    found = {}
    for name in [*RUNS][1:]:
        all_of_them = differences(runs["float32"], runs[name])
        half = all_of_them[len(all_of_them) // 2 :]
        found[name] = {"mean": statistics.mean(half), "largest": max(map(abs, half)), "losses": len(half)}
    return {
        "steps": steps,
        "held_out_loss": {name: rows[-1]["held_out_loss"] for name, rows in runs.items()},
        "percent_from_float32_over_the_second_half": found,
        "rows": runs,
        "machine": describe(compute_of(configure(*common)).device),
    }


def text(found: dict[str, Any]) -> str:
    """All but the rows."""
    return as_json({key: value for key, value in found.items() if key != "rows"})


def plot(found: dict[str, Any], path: Path) -> None:
    """The loss curves, and their differences from the first."""
    first = found["rows"]["float32"]
    with figure(path, 8, 6.5, rows=2, sharex=True) as (top, bottom):
        for k, (name, rows) in enumerate(found["rows"].items()):
            steps = [row["step"] for row in rows]
            top.plot(steps, [row["loss"] for row in rows], label=name, alpha=0.8, linewidth=1.2)
            if k:
                bottom.plot(steps, differences(first, rows), color=f"C{k}", label=name)
        top.set(ylabel="training loss (mean since the last point)", yscale="log")
        bottom.set(xlabel="step", ylabel="difference from float32, %")
        for axes in (top, bottom):
            axes.grid(alpha=0.3)
            axes.legend()


main = partial(run_study, measure, plot, text, RESULTS / "loss_equality", steps=2000)

if __name__ == "__main__":
    main()
