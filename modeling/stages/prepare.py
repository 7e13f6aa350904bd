"""Stage `prepare`: any data source becomes one folder of checked arrays."""

from pathlib import Path

from modeling.data.prepared import prepare
from modeling.data.sources import FORMS
from modeling.reliability.errors import ConfigError
from modeling.settings.groups import Config
from modeling.settings.keys import own_keys
from modeling.settings.sizes import misfit


def run(config: Config, out: Path) -> None:
    """Prepares the data that the configuration names; ConfigError, before any work, if the model cannot take it."""
    if known_form := FORMS.get(config.data.name):
        height, width, _ = known_form(**own_keys(config.data))[0]
        if why := misfit(config.model, height, width):
            raise ConfigError(why)
    prepare(config, config.data, again=True)
