"""lmleak: what can someone who sees only some modules' gradients read about the training data?

The names below load on first use, so that `import lmleak` and `lmleak ls` stay free of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "load_model": "lmleak.models",
    "load_batches": "lmleak.data",
    "select": "lmleak.gradients",
    "observe": "lmleak.gradients",
    "grant": "lmleak.gradients",
    "save_observation": "lmleak.gradients",
    "load_observation": "lmleak.gradients",
    "attack": "lmleak.attacks",
    "score": "lmleak.metrics",
    "load_recipe": "lmleak.config",
    "run": "lmleak.runs",
    "load_results": "lmleak.runs",
}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lmleak' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
