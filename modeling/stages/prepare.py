"""Stage `prepare`: any data source becomes one folder of checked arrays."""

from pathlib import Path

from modeling.data.prepared import prepare
from modeling.settings import Config


def run(config: Config, out: Path) -> None:
    """Prepares the data that the configuration names."""
    prepare(config, config.data, again=True)
