"""Denoising diffusion probabilistic models: schedule, network, loss, samplers, training and evaluation.

For notebooks: `from modeling import load_model`, see docs/python.md.
"""

import importlib
from typing import Any

__all__ = ["TrainedModel", "load_model"]


def __getattr__(name: str) -> Any:
    # On first use, since main.py must start without torch; their types are in __init__.pyi, which is no code of a run.
    if name in __all__:
        return getattr(importlib.import_module("modeling.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
