"""Stage `export`: a trained model as a folder that diffusers.DDPMPipeline loads."""

import logging
from pathlib import Path

from modeling.interop.diffusers import save_diffusers
from modeling.settings.groups import Config
from modeling.stages.sample import load_for

log = logging.getLogger(__name__)


def run(config: Config, out: Path) -> None:
    """Writes diffusers/ under `out`."""
    model, meta, _ = load_for(config, out)
    meta["config"]["diffusion"]["variance"] = model.variance  # the one that is asked for, if any
    save_diffusers(out / "diffusers", model.network.state_dict(), model.schedule.betas, meta)
    left_out = "sampler.* is" if model.guide is None else "sampler.* and the guide are"
    log.info("pipeline for diffusers: %s; its scheduler is DDPM, %s no part of it", out / "diffusers", left_out)
