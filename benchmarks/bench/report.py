"""The results of a run as tables in Markdown and as a plot."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.command import figure


def lines(results: dict[str, Any]) -> Iterator[str]:
    """Markdown: one table a section, every value as median (smallest to largest)."""
    m = results["machine"]
    versions = ", ".join(f"{name} {value}" for name, value in m["versions"].items())
    yield f"{m['device']}, {m['cpu']}, {m['cores']} cores ({', '.join(m['cpu_features'])}), {m['threads']} threads; "
    yield f"Python {m['python']}, {versions}. Mode {results['mode']}; median (smallest to largest) of n rounds."
    for name, section in results.items():
        if name not in ("mode", "machine"):
            yield from ("", f"| {name} | |", "|---|---|", *_rows(section))


def _rows(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        name = prefix + key.replace("_", " ")
        if not isinstance(value, dict):
            yield f"| {name} | {f'{value:.4g}' if isinstance(value, float) else value} |"
        elif "median" in value:
            yield f"| {name} | {value['median']:.3g} ({value['min']:.3g} to {value['max']:.3g}), n = {value['n']} |"
        else:
            yield from _rows(value, f"{name}: ")


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars of how many times faster this project is, with the range over the rounds."""
    ratios = {f"sampling {k}: diffusers": v["ratio"] for k, v in results.get("sampling", {}).items()}
    ratios = {f"training: {k}": v for k, v in results.get("training", {}).get("ratio", {}).items()} | ratios
    ratios = dict(reversed(ratios.items()))
    below, above = ([abs(r["median"] - r[end]) for r in ratios.values()] for end in ("min", "max"))
    m = results["machine"]
    with figure(path, 9, 0.45 * len(ratios) + 1.2) as axes:
        axes.barh([*ratios], [r["median"] for r in ratios.values()], xerr=[below, above], color="#4878a8", capsize=3)
        axes.axvline(1, color="black", linewidth=1)
        for name, r in ratios.items():
            axes.annotate(f" {r['median']:.2f}", (r["max"], name), va="center")
        axes.set_xlim(0, 1.15 * max([1, *(r["max"] for r in ratios.values())]))
        axes.set_xlabel(f"times as fast as ... ({m['device']}, {m['cores']} cores; whiskers: all rounds)")
