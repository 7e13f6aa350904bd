"""What a run has published, read from a folder or from a DVC experiment; what is missing is empty."""

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from modeling.reliability.errors import UserError, short

OF_EVALUATION = ("evaluate.json", "evaluate-details.json", "samples.png", "nearest.png", "denoising.png")
SERIES = ("loss", "held_out_loss", "lr", "grad_norm")
Item = TypeVar("Item")
Read = Callable[[str], bytes | None]  # the content of reports/<name>; None if it is missing


def folder_reader(reports: Path) -> Read:
    """Reads from a folder reports/ on the disk."""
    return lambda name: path.read_bytes() if (path := reports / name).is_file() else None


class Results:
    """Metrics, details and curves of a run; UserError, with the name of the file, if one is damaged.

    A curve is a list of (step, value); values that are not finite are left out, as JSON has no word for them.
    """

    def __init__(self, read: Read) -> None:
        self.read = read
        self.training = self._json("train-details.json")
        self.evaluation = self._json("evaluate-details.json")
        self.metrics = self._json("train.json") | self._json("evaluate.json")
        self.curves = {name: points for name in SERIES if (points := self._curve(name))}

    def of_training(self) -> "Results":
        """The same without what the evaluation has published."""
        return Results(lambda name: None if name in OF_EVALUATION else self.read(name))

    def _json(self, name: str) -> dict[str, Any]:
        content = self.read(name)
        if content is None:
            return {}
        try:
            return dict(json.loads(content))
        except (TypeError, ValueError) as error:
            raise _damaged(name, error) from None

    def _curve(self, name: str) -> list[tuple[int, float]]:
        content = self.read(f"curves/{name}.csv")
        if content is None:
            return []
        try:
            rows = list(csv.DictReader(io.StringIO(content.decode())))
            points = [(int(row["step"]), float(row[name])) for row in rows]
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(f"curves/{name}.csv", error) from None
        return [(step, value) for step, value in points if math.isfinite(value)]


def _damaged(name: str, error: Exception) -> UserError:
    return UserError(f"reports/{name} is damaged ({short(error)}): run the stage that writes it again")


def thinned(points: list[Item], most: int) -> list[Item]:
    """At most `most` (2 or more) of the points, evenly spaced, the last among them."""
    if len(points) <= most:
        return points
    return [points[round(k * (len(points) - 1) / (most - 1))] for k in range(most)]
