"""Stage `export`: a trained model as a folder that diffusers.DDPMPipeline.from_pretrained loads."""

import logging
from pathlib import Path

from modeling.diffusers_format import save_diffusers
from modeling.settings import Config
from modeling.stages.sample import trained_model

log = logging.getLogger(__name__)


def run(config: Config, out: Path) -> None:
    """Writes diffusers/ under `out`.

    Raises:
        UserError: bad model file, a model that diffusers cannot express, or an output that cannot be written.
    """
    model, meta, _ = trained_model(config, out)
    save_diffusers(out / "diffusers", model.network.state_dict(), meta)
    log.info("pipeline for diffusers: %s", out / "diffusers")
