"""How a configuration differs from conf/, and the command that leads to it."""

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import OmegaConf

from modeling.settings import GROUPS

CONF = Path(__file__).parents[2] / "conf"
NO_RECIPE = ("stage", "out_dir", "named")  # say what to run and where, not what comes out


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration under names like optimizer.lr, without what does not affect the results."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key not in NO_RECIPE:
            found |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {key: value}
    return found


@cache
def composed(*overrides: str) -> dict[str, Any]:
    """What conf/ composes to, flat; with no override: the defaults."""
    with _conf():
        return flat(OmegaConf.to_container(compose("config", list(overrides)), resolve=False))  # type: ignore[arg-type]


@contextmanager
def _conf() -> Iterator[None]:
    if GlobalHydra.instance().is_initialized():  # by main.py, whose search path has conf/
        yield
    else:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            yield


def differences(config: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys of a flat configuration that differ from the default, each with (default, value).

    A key that the default does not have, such as one of another optimizer, has the default None.
    """
    return {key: (default.get(key), value) for key, value in config.items() if default.get(key) != value}


def command(config: Mapping[str, Any]) -> str:
    """The shortest `dvc exp run` that composes to a flat configuration."""
    recipes = [[], *([f"experiment={path.stem}"] for path in sorted((CONF / "experiment").glob("*.yaml")))]
    found = min((_overrides(recipe, config) for recipe in recipes), key=lambda each: (each[0], len(each[1])))[1]
    return shlex.join(["dvc", "exp", "run", *(word for override in found for word in ("-S", override))])


def _overrides(recipe: list[str], config: Mapping[str, Any]) -> tuple[int, list[str]]:
    """What to type to come from a recipe to a configuration, after the number of keys that would be too many."""
    base = composed(*recipe)
    typed = list(recipe)
    for group, schema in GROUPS.items():
        choice = config.get(key := f"{group}.{schema.key}")
        if choice != base.get(key) and (CONF / group / f"{choice}.yaml").exists():
            typed.append(f"{group}={choice}")
    base = composed(*typed)
    changed = [f"{key}={_typed(value)}" for key, value in config.items() if key not in base or base[key] != value]
    return len(base.keys() - config.keys()), typed + changed


def _typed(value: Any) -> str:
    """A value in the grammar of Hydra's overrides."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_typed, value))}]"
    if isinstance(value, str) and not (value.isidentifier() and value.isascii() and value.lower() not in _WORDS):
        return str(QuotedString(text=value, quote=Quote.single).with_quotes())
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


_WORDS = ("null", "true", "false", "nan", "inf")  # what the grammar does not read as text
