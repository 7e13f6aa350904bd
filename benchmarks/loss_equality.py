"""Shows that the fast path trains as float32 does: `python -m benchmarks.loss_equality`.

The same steps on the same batches with the same noise, once in float32, not compiled, and once in what the
defaults choose here, beside a second float32 run from another seed, which shows how large a difference means
nothing. Writes the plot, and prints the held-out losses, which are all taken under the same noise.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.project import ROOT, Task, command_line, configure, make_trainer
from modeling.data.prepared import LabelledImages
from modeling.data.sources import shapes
from modeling.inference.device import choose_compute
from modeling.training.trainer import Reporter

RUNS = {
    "float32": ("precision=fp32", "trainer.compile=false", "seed=0"),
    "fast path": ("precision=auto", "seed=0"),
    "float32, another seed": ("precision=fp32", "trainer.compile=false", "seed=1"),
}


class Recorder(Reporter):
    """Keeps the rows that are logged."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def logged(self, step: int, row: dict[str, float], seconds: float) -> None:
        self.rows.append(row)


def train(overrides: tuple[str, ...]) -> list[dict[str, float]]:
    """The logged rows of one run on the embedded shapes."""
    config = configure("data=shapes", *overrides)
    (images, _), (test, labels), _ = shapes(config.data.num_train, config.data.num_test, config.data.image_size, 0)
    held_out = LabelledImages(torch.from_numpy(test).permute(0, 3, 1, 2), torch.from_numpy(labels))
    task = Task(config, images, choose_compute(config.device, config.precision, config.deterministic))
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(task, Path(folder), recorder, held_out).run()
    return recorder.rows


def differences(a: list[dict[str, float]], b: list[dict[str, float]]) -> list[float]:
    """Relative differences of the logged losses, b against a."""
    return [y["loss"] / x["loss"] - 1 for x, y in zip(a, b, strict=True)]


def plot(runs: dict[str, list[dict[str, float]]], path: Path) -> None:
    """The loss curves, and their differences from the first."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6.5), sharex=True, layout="constrained")
    first, *others = runs
    for name, rows in runs.items():
        steps = [row["step"] for row in rows]
        top.plot(steps, [row["loss"] for row in rows], label=name, alpha=0.8, linewidth=1.2)
    for k, name in enumerate(others, 1):
        bottom.plot(steps, [100 * d for d in differences(runs[first], runs[name])], color=f"C{k}", label=name)
    top.set(ylabel="training loss (mean since the last point)", yscale="log")
    bottom.set(xlabel="step", ylabel=f"difference from {first}, %")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "loss_equality.png")
    parser.add_argument("overrides", nargs="*", help="of the configuration, such as model=small")
    arguments = parser.parse_args()
    every = max(1, arguments.steps // 80)
    common = (
        "experiment=demo",
        "model.class_conditional=false",
        "trainer.label_dropout=0",
        "optimizer.lr_decay=none",
        f"trainer.steps={arguments.steps}",
        f"trainer.log_every={every}",
        f"trainer.evaluate_every={arguments.steps}",
        f"trainer.sample_every={arguments.steps}",
        f"trainer.checkpoint_every={arguments.steps}",
        *arguments.overrides,
    )
    runs: dict[str, list[dict[str, float]]] = {}
    for name, overrides in RUNS.items():
        runs[name] = train((*common, *overrides))
        print(f"{name}: held-out loss after {arguments.steps} steps {runs[name][-1]['held_out_loss']:.5f}", flush=True)
    for name in list(runs)[1:]:
        found = differences(runs["float32"], runs[name])
        half = [100 * d for d in found[len(found) // 2 :]]
        print(
            f"{name} against float32, second half of the steps, {len(half)} logged losses: mean difference "
            f"{statistics.mean(half):+.2f} %, largest {max(map(abs, half)):.2f} %"
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    plot(runs, arguments.out)


if __name__ == "__main__":
    command_line(main)
