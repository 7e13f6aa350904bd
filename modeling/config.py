"""From the composed configuration to settings: the only module that sees a DictConfig.

OmegaConf checks types and unknown keys against the dataclasses of settings/groups.py; ranges and what must fit together
are checked here. Whatever is wrong raises ConfigError with one line that names the key.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from modeling.reliability.errors import ConfigError, require
from modeling.settings.groups import GROUPS, Config, TopConfig
from modeling.settings.keys import Group

_TOP = [f.name for f in fields(TopConfig)]
_ALLOWED = sorted({*_TOP, "experiment", *GROUPS})


def load_config(cfg: DictConfig, overrides: Sequence[str] = ()) -> Config:
    """Checks a composed configuration and turns it into settings, else raises ConfigError.

    `overrides` are what the user typed, as `group=choice` or `group.key=value`; their keys are kept in Config.named.
    """
    for key in cfg:
        if key not in _ALLOWED:
            raise ConfigError(no_such_key(str(key)))
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        group, _, name = key.partition(".")
        schema = GROUPS.get(group)
        if schema and name == schema.key and (value in schema.choices or group == "model"):
            raise ConfigError(f"{override}: write {group}={value}, which sets all keys of the group")
    groups: dict[str, Any] = {}
    for group, schema in GROUPS.items():
        node = cfg.get(group)
        require(isinstance(node, DictConfig), group, node, "a group of keys is expected")
        choice, allowed = str(node.get(schema.key)), f"allowed are {', '.join(schema.choices)}"
        require(choice in schema.choices or not schema.choices, f"{group}.{schema.key}", choice, allowed)
        groups[group] = _structured(f"{group}.", schema.choices.get(choice, schema.base), node)
    top = _structured("", TopConfig, OmegaConf.masked_copy(cfg, _TOP))
    named = frozenset(re.split(r"[@=]", override.lstrip("+~"))[0] for override in overrides)
    config = Config(**vars(top), **groups, named=named)
    _check_ranges("", top, config)
    for group, values in groups.items():
        _check_ranges(f"{group}.", values, config)
    return config


def _structured(prefix: str, schema: type[Group], node: DictConfig) -> Any:
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), node))
    except OmegaConfBaseException as error:
        key = prefix + str(error.full_key or error.key or "")
        if isinstance(error, ConfigKeyError):
            raise ConfigError(no_such_key(key)) from None
        if isinstance(error, MissingMandatoryValue):
            missing = [prefix + str(k) for k in node if OmegaConf.is_missing(node, k)]
            raise ConfigError(f"{(missing or [key])[0]}: must be given") from None
        raise ConfigError(f"{key.rstrip('.')}: {str(error.msg or error).splitlines()[0]}") from None


def _check_ranges(prefix: str, values: Group, config: Config) -> None:
    for f in fields(values):  # type: ignore[arg-type]  # every group is a dataclass
        value = getattr(values, f.name)
        numbers = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, float)]
        require(all(map(math.isfinite, numbers)), prefix + f.name, value, "must be finite")
        if "holds" in f.metadata:
            require(f.metadata["holds"](value), prefix + f.name, value, f.metadata["allowed"])
    for holds, key, allowed in values.fits(config):
        require(holds, prefix + key, getattr(values, key), allowed)


def no_such_key(key: str) -> str:
    """The message for a key that does not exist, or not for the chosen option of its group."""
    group, _, name = key.partition(".")
    schema = GROUPS.get(group)
    choices = {} if schema is None else schema.choices or {group: schema.base}
    # Every group is a dataclass, which its type does not say.
    keys = {choice: [f.name for f in fields(cls)] for choice, cls in choices.items()}  # type: ignore[arg-type]
    elsewhere = [choice for choice, names in keys.items() if name in names]
    if elsewhere:
        return f"{key}: a key of {' and '.join(f'{group}={choice}' for choice in elsewhere)} only"
    allowed = dict.fromkeys(name for names in keys.values() for name in names) if name and keys else _ALLOWED
    return f"{key}: no such key; allowed are {', '.join(allowed)}"
