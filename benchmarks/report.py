"""The results of a run as a table for people and as a plot."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def _text(values: dict[str, Any], unit: str = "") -> str:
    return f"{values['median']:.3g} ({values['min']:.3g} to {values['max']:.3g}){unit}"


def lines(results: dict[str, Any]) -> Iterator[str]:
    """Markdown: one table a section, every value as median (smallest to largest)."""
    m = results["machine"]
    versions = ", ".join(f"{name} {value}" for name, value in m["versions"].items())
    yield f"{m['device']}, {m['cpu']}, {m['cores']} cores ({', '.join(m['cpu_features'])}), {m['threads']} threads; "
    yield f"Python {m['python']}, {versions}. Mode {results['mode']}; median (smallest to largest) of n rounds."
    for title, row_names, rows in _tables(results):
        yield ""
        yield f"**{title}**"
        yield ""
        yield "| " + " | ".join(row_names) + " |"
        yield "|" + "---|" * len(row_names)
        for row in rows:
            yield "| " + " | ".join(row) + " |"


def _tables(results: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    if training := results.get("training"):
        title = (
            f"Training, whole steps: model={training['model']}, batch {training['batch']}, "
            f"{training['gflop_per_image']:.1f} GFLOP an image; {_text(training['utilisation'])} of the "
            f"{training['precision']} matrix peak, {_text(training['peak_gflops'])} GFLOP/s"
        )
        rows = [
            [name, _text(speed), _text(training["ratio"][name]) if name in training["ratio"] else "1", str(speed["n"])]
            for name, speed in training["images_per_second"].items()
        ]
        yield title, ["who", "images/s", "this project is faster by", "n"], rows
    if step := results.get("step"):
        title = (
            f"A step in its parts, batch {step['batch']}; around the network: {_text(step['share_around_the_network'])}"
        )
        yield title, ["part", "ms"], [[name, _text(value)] for name, value in step["milliseconds"].items()]
        data = step["data"]
        title = f"Data pipeline alone, batch {data['batch']}: {_text(data['ratio'])} times torchvision's"
        yield title, ["who", "images/s"], [[name, _text(v)] for name, v in data["images_per_second"].items()]
    if sampling := results.get("sampling"):
        rows = [
            [
                f"{name} {s['evaluations_of_a_sample']}" + (", extrapolated" if s["extrapolated"] else ""),
                *(_text(s["images_per_second"][who]) for who in ("this project", "diffusers")),
                *(_text(s["evaluations_per_second"][who]) for who in ("this project", "diffusers")),
                _text(s["ratio"]),
            ]
            for name, s in sampling.items()
        ]
        for name, s in sampling.items():
            if "ratio_compiled" in s:
                speeds = [s[per]["this project, compiled"] for per in ("images_per_second", "evaluations_per_second")]
                both = [_text(speeds[0]), "", _text(speeds[1]), ""]
                rows.append([f"{name}, compiled", *both, _text(s["ratio_compiled"])])
        names = ["sampler", "images/s", "diffusers", "evaluations x images/s", "diffusers", "ratio"]
        yield "Sampling, same weights, diffusers' pipeline as it comes", names, rows
    if evaluation := results.get("evaluation"):
        rows = [[name, _text(value)] for name, value in evaluation["images_per_second"].items()]
        yield "Evaluation (bits/dim extrapolated to all T terms)", ["what", "images/s"], rows
    if startup := results.get("startup"):
        rows = [[name, _text(value)] for name, value in startup["seconds_to_first_step"].items()]
        yield "From the command to the first step", ["part", "seconds"], rows
        rows = [[name, _text(value)] for name, value in startup["seconds_of_commands"].items()]
        rows += [[k.replace("_", " "), _text(v)] for k, v in startup.items() if k.startswith("seconds_that")]
        yield "Whole commands of a one-step run", ["command", "seconds"], rows
    if scaling := results.get("scaling"):
        for key, values in scaling.items():
            if key != "model":
                rows = [[name, _text(v) if isinstance(v, dict) else f"{v:.0f}"] for name, v in values.items()]
                yield f"{key.replace('_', ' ')}, model={scaling['model']}", [key.split("_by_")[1], "value"], rows


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars of how many times faster this project is, with the range over the rounds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ratios = {f"training: {k}": v for k, v in results.get("training", {}).get("ratio", {}).items()}
    ratios |= {f"sampling {k}: diffusers": v["ratio"] for k, v in results.get("sampling", {}).items()}
    names = list(ratios)[::-1]
    values = [ratios[name]["median"] for name in names]
    errors = [
        [ratios[n]["median"] - ratios[n]["min"] for n in names],
        [ratios[n]["max"] - ratios[n]["median"] for n in names],
    ]
    figure, axes = plt.subplots(figsize=(9, 0.45 * len(names) + 1.2), layout="constrained")
    axes.barh(names, values, xerr=errors, color="#4878a8", capsize=3)
    axes.axvline(1, color="black", linewidth=1)
    for name, value, high in zip(names, values, errors[1], strict=True):
        axes.annotate(f" {value:.2f}", (value + high, name), va="center")
    axes.set_xlim(0, 1.15 * max(v + h for v, h in zip(values, errors[1], strict=True)))
    m = results["machine"]
    axes.set_xlabel(f"times as fast as ... ({m['device']}, {m['cores']} cores; whiskers: all rounds)")
    figure.savefig(path, dpi=130)
    plt.close(figure)
