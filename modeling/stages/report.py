"""Stage `report`: all that a run has published, as one HTML file that needs no server and no network."""

import dataclasses
import json
import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from modeling.pages.html import MOST_BYTES, pictures, plot, render
from modeling.pages.numbers import PUBLISHED_ON, SOURCE, headlines
from modeling.pages.provenance import git, model_metadata, provenance
from modeling.pages.results import Results, folder_reader, thinned
from modeling.recipe import NO_RECIPE, command, composed, differences, flat
from modeling.reliability.errors import UserError
from modeling.reliability.files import state_root, write_atomic
from modeling.reporting.curves import LOSSES
from modeling.settings.groups import Config, SamplerConfig

log = logging.getLogger(__name__)
MOST_POINTS = 2000  # of a curve, in its plot and in the page's data
MOST_GRIDS = 6
FOR_MARKUP = 300_000  # bytes of a page for its own words, its tables and what JSON in HTML needs more
PICTURES = {  # headings, in the order of the page
    "samples.png": "Samples",
    "film.png": "Samples from the same noise during training",
    "denoising.png": "From noise to samples",
    "nearest.png": "Samples and their nearest training images",
}


def run(config: Config, out: Path) -> None:
    """Writes reports/report.html under `out`, else raises UserError.

    It reports what lies in reports/ and models/ under `out`, or if a plain run has nothing there, under the repository.
    """
    source = out if config.out_dir is not None or (out / "reports").exists() else state_root()
    results = Results(folder_reader(source / "reports"))
    if not (results.training or results.metrics):
        raise UserError(f"nothing to report in {source / 'reports'}: run stage=train first")
    path = source / "models" / "model.safetensors"
    meta = model_metadata(path)
    if not _is_of(results.evaluation, meta):
        log.warning(
            "left out: the evaluation in %s, not of %s and its data; run stage=evaluate", source / "reports", path
        )
        results = results.of_training()
    settings = _settings(config, source, meta) | results.evaluation.get("made_with", {})
    settings["diffusion"]["variance"] = results.evaluation.get("variance", settings["diffusion"]["variance"])
    values = flat(settings)
    data = settings["data"]["name"]
    experiment = os.environ.get("DVC_EXP_NAME")
    device = results.training.get("made_on", "")
    content: dict[str, Any] = {
        "experiment": experiment,
        "metrics": results.metrics,
        "training": results.training,
        "evaluation": results.evaluation,
        "curves": {name: thinned(points, MOST_POINTS) for name, points in results.curves.items()},
        "config": settings,
        "differences": differences(values, composed()),
        "provenance": provenance(meta, _about_data(config, source, data), results.training),
        "reproduce": _reproduce(values, experiment),
    }
    plots = _plots(content["curves"])
    shown, grids = _pictures(results, source / "reports" / "samples", len(json.dumps([content, plots])))
    page = render(
        "report.html",
        title=experiment or f"{data}, {settings['model']['name']}",
        subtitle=", ".join(filter(None, ("DDPM", data, settings["model"]["name"], device))),
        headlines=headlines(data, results),
        source=SOURCE if data == PUBLISHED_ON else "",
        plots=plots,
        pictures=shown,
        grids=grids,
        groups=_groups(settings),
        data=content,
    )
    target = out / "reports" / "report.html"
    write_atomic(target, page.encode())
    log.info("report: %s", target)


def _is_of(evaluation: Mapping[str, Any], meta: Mapping[str, Any]) -> bool:
    """Whether an evaluation is of a model and the images that it was trained on, as far as both say so."""
    of, own = ((found.get("data_sha256") or {}).get("train") for found in (evaluation, meta))
    pairs = ((evaluation.get("weights_sha256"), meta.get("sha256")), (of, own))
    return all(None in pair or pair[0] == pair[1] for pair in pairs)


def _settings(config: Config, source: Path, meta: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that the results were made with, but for what evaluation says itself, as nested values."""
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key != "named"}
    named, params = config.named, source / "params.yaml"
    if config.out_dir is None and source == state_root() and params.exists():  # what DVC has run, not this command's
        settings |= OmegaConf.to_container(OmegaConf.load(params))  # type: ignore[arg-type]  # a mapping
        named |= {"sampler"}
    recipe = dict(meta.get("config", {}))
    method = recipe.pop("sampler", {})
    if method and not {"sampler", "experiment"} & named:  # as for samples, see as_recipe in stages/sample.py
        common = {f.name for f in dataclasses.fields(SamplerConfig)}
        settings["sampler"] = {key: value for key, value in settings["sampler"].items() if key in common} | method
    settings["trainer"] |= recipe.pop("trainer", {})  # a model file knows only those of its keys that affect weights
    return settings | recipe


def _about_data(config: Config, source: Path, name: str) -> dict[str, Any]:
    """The metadata of the prepared data; nothing if they are no longer there."""
    path = source / "data" / name / "data.json"
    if config.out_dir is None and not path.exists():
        from modeling.data.prepared import prepared_folder  # here: it imports torch, which a plain run has anyway

        path = prepared_folder(config, config.data) / "data.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _reproduce(values: Mapping[str, Any], experiment: str | None) -> list[str]:
    """Commands, one a line."""
    commit = git("rev-parse", "HEAD")
    lines = [f"git checkout {commit}", command(values)] if commit else [command(values)]
    # The other way: not trained again, but taken from DVC's cache.
    return lines + ([f"dvc exp apply {shlex.quote(experiment)}  # or its files as they are"] if experiment else [])


def _plots(curves: Mapping[str, Sequence[tuple[int, float]]]) -> dict[str, str]:
    losses = {label: curves[name] for name, label in LOSSES.items() if curves.get(name)}
    found = {"Loss": plot(losses, "loss", log=True)} if losses else {}
    for name, heading, log_scale in (("lr", "Learning rate", False), ("grad_norm", "Norm of the gradient", True)):
        if curves.get(name):
            found[heading] = plot({heading.lower(): curves[name]}, heading.lower(), log_scale)
    return found


def _pictures(results: Results, samples: Path, used: int) -> tuple[dict[str, str], dict[str, str]]:
    """Pictures by their headings, and grids by their steps, so small that they fit into a page beside `used` bytes."""
    found = {heading: content for name, heading in PICTURES.items() if (content := results.read(name))}
    paths = thinned(sorted(samples.glob("step-*.png")), MOST_GRIDS)
    grids = {f"step {int(path.stem.removeprefix('step-')):,}": path.read_bytes() for path in paths}
    uris = pictures(found | grids, MOST_BYTES - FOR_MARKUP - used)
    return {name: uris[name] for name in found}, {name: uris[name] for name in grids}


def _groups(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The configuration by groups, the keys of none first."""
    top = {key: value for key, value in settings.items() if not isinstance(value, dict) and key not in NO_RECIPE}
    return {"all stages": top} | {key: value for key, value in settings.items() if isinstance(value, dict)}
