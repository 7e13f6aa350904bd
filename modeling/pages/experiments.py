"""The rows of several experiments: what DVC says of each, their ranks, and the parameters in which they differ."""

import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modeling.pages.numbers import NAMES, is_fid, label, with_error
from modeling.recipe import flat
from modeling.reliability.errors import UserError

MORE_IS_BETTER = ("recognised", "images", "images_per_second")
USUAL = ("wavelet_distance", "bits_per_dim", "held_out_loss")  # of these the first that all have ranks, after FID
MOST_FIDS, MOST_METRICS = 2, 6  # columns; with the others there are ten at most


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

    Unless it is given, it is the FID if all that have metrics have it, else the first of USUAL that all have and that
    compares.
    """
    known = list(dict.fromkeys(key for row in rows for key in row.metrics))
    if sort_by is not None and sort_by not in known:
        raise UserError(f"--sort-by {sort_by}: allowed are {', '.join(known) or 'none yet, as nothing has metrics'}")
    measured = [row.metrics for row in rows if row.metrics]
    usual = [*filter(is_fid, known), *(key for key in USUAL if key not in _of_different_numbers(rows))]
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
    for key, parameter in _of_different_numbers(rows).items():
        found.append(f"{NAMES[key]}: of different numbers of samples ({parameter}), which do not compare")
    return found


def _of_different_numbers(rows: Sequence[Experiment]) -> dict[str, str]:
    """The metrics whose value depends on how many samples there are, if that differs, and the parameter that says it.

    FID has the number in its name.
    """
    numbers = {row.params.get("evaluation.num_samples") for row in rows if "wavelet_distance" in row.metrics}
    return {"wavelet_distance": "evaluation.num_samples"} if len(numbers) > 1 else {}


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
