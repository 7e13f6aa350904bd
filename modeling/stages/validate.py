"""Stage `validate`: refuses what a later stage would refuse, while the earlier model and reports are still there.

DVC removes the outputs of a stage before it runs the stage, so this one is the first of its pipeline. It takes seconds.
"""

from contextlib import suppress
from pathlib import Path

import torch

from modeling.build import build_network, check_sampler, check_schedule
from modeling.checkpoints.run_folder import start_checkpoint
from modeling.data.prepared import Prepared, prepared_folder
from modeling.data.sources import FORMS
from modeling.inference.device import choose_compute
from modeling.reliability.errors import ConfigError, UserError
from modeling.reliability.files import existing, make_writable, write_atomic
from modeling.reporting.wandb_mode import wanted_mode
from modeling.settings.groups import Config
from modeling.settings.keys import affects, own_keys


def run(config: Config, out: Path) -> None:
    """Raises UserError if the pipeline cannot run as it is configured; else writes data/validated under `out`."""
    if config.model.weights is not None:
        raise ConfigError(f"model.weights={config.model.weights}: for stage=sample, evaluate and export only")
    choose_compute(config.device, config.precision, config.deterministic, config.threads)
    wanted_mode(config.wandb)
    start_checkpoint(config)
    keys = own_keys(config.data)
    if "path" in keys:
        existing("data.path", keys["path"])
    weights = config.evaluation.inception_weights
    if weights is not None and config.evaluation.fid_samples is not None:
        existing("evaluation.inception_weights", weights)
    check_schedule(config.diffusion)
    if form := known_form(config):
        shape, classes = form
        with torch.device("meta"):  # without memory
            build_network(config.model, config.diffusion, shape, len(classes))
        known = classes if config.model.class_conditional else []
        learned = config.trainer.label_dropout, config.trainer.guide_at is not None
        check_sampler(config.sampler, config.diffusion.num_timesteps, known, *learned)
    for needed in (out / "models", out / "reports"):
        make_writable(needed)
    write_atomic(out / "data" / "validated", b"what the pipeline was asked for can run\n")


def known_form(config: Config) -> tuple[list[int], list[str]] | None:
    """Image shape (C, H, W) and classes of the data; None if that shows only once they are prepared."""
    with suppress(UserError):
        prepared = Prepared(prepared_folder(config, config.data))
        if prepared.source == affects(config.data, "weights"):
            return prepared.shape, prepared.classes
    if config.data.name not in FORMS:
        return None
    (height, width, channels), classes = FORMS[config.data.name](**own_keys(config.data))
    return [channels, height, width], list(classes)
