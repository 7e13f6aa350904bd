"""Whether and where W&B is told of a run. Imports no wandb, which takes half a second."""

import os

from modeling.reliability.errors import ConfigError
from modeling.settings.groups import WandbConfig

MODES = ("online", "offline", "disabled")


def wanted_mode(settings: WandbConfig) -> str:
    """The mode that WANDB_MODE, or else conf/, asks for; ConfigError if it is unknown."""
    mode = os.environ.get("WANDB_MODE") or settings.mode
    if mode not in MODES:
        raise ConfigError(f"WANDB_MODE={mode}: allowed are {', '.join(MODES)}")
    return mode
