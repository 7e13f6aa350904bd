"""HTML that needs nothing but itself: plots and pictures as data URIs, templates with every name escaped."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

MOST_BYTES = 3_000_000  # of a page
# Longest width in pixels and WebP quality (None: lossless), from the best to what always fits.
SHRINK = ((1280, None), (1280, 90), (960, 70), (640, 50), (320, 30), (160, 10))


def render(template: str, **values: Any) -> str:
    """A page from a template beside this file."""
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def plot(series: Mapping[str, Sequence[tuple[int, float]]], ylabel: str, log: bool) -> str:
    """Curves over the step in one plot, as the data URI of an SVG; `log`: log axis where possible."""
    from matplotlib import rc_context, ticker  # here: it takes half a second, which compare does not always need
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 11, "font.family": "sans-serif"}):
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        lines = [
            axes.plot(*zip(*points, strict=True), marker=None if len(points) > 25 else ".")[0]
            for points in series.values()
        ]
        axes.set(xlabel="step", ylabel=ylabel)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        if log and all(value > 0 for points in series.values() for _, value in points):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(
                ticker.LogLocator(subs=(1, 2, 5))
            )  # curves seldom span more than a power of ten
            axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if len(series) > 1:
            legend = axes.legend(lines, [*map(str, range(len(lines)))], fontsize=9)
            for text, name in zip(
                legend.get_texts(), series, strict=True
            ):  # a name with _ or $ would mean more as label
                text.set_parse_math(False)
                text.set_text(name)
        content = io.BytesIO()
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    return _uri("svg+xml", content.getvalue())


def pictures(files: Mapping[str, bytes], most: int) -> dict[str, str]:
    """Pictures as data URIs of `most` bytes in all: WebP without loss where that fits, else smaller and coarser."""
    found: dict[str, str] = {}
    for width, quality in SHRINK:
        found = {name: _uri("webp", _webp(content, width, quality)) for name, content in files.items()}
        if sum(map(len, found.values())) <= most:
            break
    return found


def _webp(content: bytes, width: int, quality: int | None) -> bytes:
    image = Image.open(io.BytesIO(content)).convert("RGB")
    image.thumbnail((width, 2 * width))
    result = io.BytesIO()
    image.save(result, "WebP", **({"lossless": True} if quality is None else {"quality": quality}))
    return result.getvalue()


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
