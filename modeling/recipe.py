"""How a configuration differs from what conf/ composes to, and the command that leads to it."""

import logging
import os
import shlex
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.utils import JobRuntime
from hydra.version import VersionBase
from omegaconf import OmegaConf

from modeling.reliability.errors import ConfigError
from modeling.settings.groups import GROUPS

log = logging.getLogger(__name__)
CONF = Path(__file__).parents[1] / "conf"
COMPOSE = "dvc exp run composes it anew"
LOCK = threading.RLock()  # Hydra has one state for all threads
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
    with conf_dir():
        values = OmegaConf.to_container(compose("config", list(overrides)), resolve=False)
        return flat(values)  # type: ignore[arg-type]  # a mapping


@contextmanager
def conf_dir() -> Iterator[None]:
    """Where Hydra's compose finds conf/ and nothing else; afterwards Hydra is as it was."""
    with LOCK:
        # Of main.py, or of a notebook's own project.
        hydra, version, job = GlobalHydra.instance().hydra, VersionBase.instance().version_base, JobRuntime.instance()
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(CONF), job.get("name"), version_base="1.3"):
                yield
        finally:
            GlobalHydra.instance().hydra = hydra
            VersionBase.instance().version_base = version


def differences(config: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys of a flat configuration that differ from the default, each with (default, value).

    A key that the default does not have, such as one of another optimizer, has the default None.
    """
    return {key: (default.get(key), value) for key, value in config.items() if default.get(key) != value}


def closest(config: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """The recipe and choices with the fewest words to type for a flat configuration, and what they compose to."""
    recipes = [[], *([f"experiment={path.stem}"] for path in sorted((CONF / "experiment").glob("*.yaml")))]
    typed, *others = sorted((recipe + _choices(recipe, config) for recipe in recipes), key=len)
    best = (*_words(typed, config), typed)
    for typed in others:
        if best[:2] > (False, len(typed)):  # else no shorter one follows, and to compose takes a tenth of a second
            best = min(best, (*_words(typed, config), typed))
    return best[2], composed(*best[2])


def _words(typed: list[str], config: Mapping[str, Any]) -> tuple[bool, int]:
    """Whether choices bring a key too many, which no override takes away; how many words there are to type."""
    base = composed(*typed)
    return not base.keys() <= config.keys(), len(typed) + len(differences(config, base))


def _choices(recipe: list[str], config: Mapping[str, Any]) -> list[str]:
    """The choices of a configuration that are not those of a recipe."""
    base, typed = composed(*recipe), []
    for group, schema in GROUPS.items():
        choice = config.get(key := f"{group}.{schema.key}")
        if choice != base.get(key) and (CONF / group / f"{choice}.yaml").exists():
            typed.append(f"{group}={choice}")
    return typed


def command(config: Mapping[str, Any]) -> str:
    """The shortest `dvc exp run` that composes to a flat configuration."""
    typed, base = closest(config)
    overrides = typed + [f"{key}={in_grammar(value)}" for key, (_, value) in differences(config, base).items()]
    return shlex.join(["dvc", "exp", "run", *(word for override in overrides for word in ("-S", override))])


def check_keys(params: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The `differences` of params.yaml, nested, to what conf/ composes to; ConfigError if the keys are not the same."""
    values = flat(params)
    _, base = closest(values)
    if keys := sorted(values.keys() ^ base.keys()):
        raise ConfigError(f"params.yaml and conf/ differ in the key {keys[0]} ({len(keys)} in all): {COMPOSE}")
    return differences(values, base)


def check_params(params: Mapping[str, Any]) -> None:
    """Logs the values in params.yaml that conf/ does not compose to; ConfigError if the keys are not the same.

    For `dvc repro`, which takes params.yaml as it is; `dvc exp run` has just composed it.
    """
    if "DVC_EXP_NAME" not in os.environ and (changed := check_keys(params)):
        shown = [f"{key}={value} (conf/ has {default})" for key, (default, value) in sorted(changed.items())[:3]]
        log.warning("params.yaml is not what conf/ composes to: %s; %s", ", ".join(shown), COMPOSE)


def in_grammar(value: Any) -> str:
    """A value in the grammar of Hydra's overrides."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(in_grammar, value))}]"
    if isinstance(value, str) and not (value.isidentifier() and value.isascii() and value.lower() not in _WORDS):
        return str(QuotedString(text=value, quote=Quote.single).with_quotes())
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


_WORDS = ("null", "true", "false", "nan", "inf")  # what the grammar does not read as text
