"""How a key of the configuration is declared: its range, and what it affects. Imports no torch."""

from collections.abc import Callable, Iterable
from dataclasses import MISSING, field, fields
from functools import partial
from typing import Any


def setting(
    holds: Callable[[Any], bool] = lambda _: True, allowed: str = "", affects: str = "weights", before: Any = MISSING
) -> Any:
    """A key with a range: whether a value `holds`, and what is `allowed`, for the message.

    `before` is the value of model files that are older than the key.
    It affects "weights" (then it is part of a run's fingerprint), "outputs" (what else a run publishes) or "nothing"
    (but speed, memory and safety).
    """
    return field(default=before, metadata={"holds": holds, "allowed": allowed, "affects": affects})


positive = partial(setting, lambda v: v > 0, "must be greater than 0")
not_negative = partial(setting, lambda v: v >= 0, "must be at least 0")
fraction = partial(setting, lambda v: 0 <= v < 1, "must lie in [0, 1)")


def one_of(*allowed: str) -> Any:
    return setting(lambda v: v in allowed, f"allowed are {', '.join(allowed)}")


def at_least(minimum: int, null: str, affects: str = "weights") -> Any:
    return setting(lambda v: v is None or v >= minimum, f"must be at least {minimum}, or null {null}", affects)


def affects(config: Any, what: str) -> dict[str, Any]:
    """The keys of a group that affect `what` (see setting), with their values."""
    keys = (f.name for f in fields(config) if f.metadata.get("affects", "weights") == what)
    return {key: getattr(config, key) for key in keys}


class Group:
    """A group of the configuration."""

    def fits(self, config: Any) -> Iterable[tuple[bool, str, str]]:
        """What must hold between keys, each as (whether it holds, the key to name, what is allowed)."""
        return ()


def own_keys(config: Group) -> dict[str, Any]:
    """The keys that only this choice of a group has, with their values."""
    base = next(cls for cls in type(config).__mro__ if Group in cls.__bases__)
    common = {f.name for f in fields(base)}
    return {key: value for key, value in vars(config).items() if key not in common}
