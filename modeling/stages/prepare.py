"""Stage `prepare`: any data source becomes one folder of checked arrays."""

import logging
from dataclasses import asdict
from pathlib import Path

from modeling.data import cifar10, folder, read_prepared, shapes, write_prepared
from modeling.errors import ConfigError
from modeling.files import locked
from modeling.paths import prepared_data, raw_cifar10
from modeling.settings import Config, DataConfig, FolderConfig, ShapesConfig

log = logging.getLogger(__name__)


def run(config: Config, out: Path) -> None:
    """Prepares the data that the configuration names.

    Raises:
        UserError: the source is missing or bad, or the target cannot be written.
    """
    _prepare(config, config.data, again=True)


def _prepare(config: Config, data: DataConfig, again: bool) -> Path:
    """Writes the prepared folder of `data` and returns it; a second process waits for the first."""
    target = prepared_data(config, data)
    with locked(target.with_name(f".{target.name}.lock"), wait=True):
        if again or not (target / "data.json").exists():
            _write(data, target)
    return target


def _write(data: DataConfig, target: Path) -> None:
    if isinstance(data, ShapesConfig):
        splits = shapes(data.num_train, data.num_test, data.image_size, data.seed)
    elif isinstance(data, FolderConfig):
        splits = folder(Path(data.path), data.test_fraction)
    else:
        splits = cifar10(raw_cifar10())
    meta = write_prepared(target, *splits, asdict(data))
    size = " x ".join(str(n) for n in meta["shape"])
    log.info("data: %s, %d + %d images of %s, in %s", data.name, meta["num_train"], meta["num_test"], size, target)


def ensure_prepared(config: Config, data: DataConfig) -> Path:
    """The prepared folder of `data`; a plain run makes it if it is not there, a run with an `out_dir` must have it.

    Raises:
        UserError: it is not there, or cannot be made.
        ConfigError: it was made with other settings.
    """
    target = prepared_data(config, data)
    if config.out_dir is None and not (target / "data.json").exists():
        return _prepare(config, data, again=False)
    made_with = read_prepared(target).get("source")
    for key, value in asdict(data).items():
        if isinstance(made_with, dict) and made_with.get(key, value) != value:
            raise ConfigError(
                f"data.{key}={value}: {target} was made with {key}={made_with[key]}: run stage=prepare again"
            )
    return target
