"""What a result was made with: versions, device, command. No host or user names."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lmleak

_LIBRARIES = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "tokenizers",
    "opacus",
    "safetensors",
    "numpy",
    "scipy",
    "rouge-score",
    "evaluate",
)


def describe(argv: Sequence[str] | None, device: Any, processes: int) -> dict[str, Any]:
    """The part of run.json that is about this start of the run.

    Args:
        argv: the command; that of this process by default.
        device: of rank 0.
        processes: number of ranks.
    """
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "version": lmleak.__version__,
        "commit": _commit(),
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]] if argv is None else list(argv),
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": {name: found for name in _LIBRARIES if (found := _version(name))},
        "device": {"type": "cpu" if device.type == "cpu" else str(device), "name": name},
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "processes": processes,
    }


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What may make the units of a resumed run differ from those already done, one phrase each."""
    old, new = before.get("versions") or {}, after["versions"]
    phrases = [f"{name} {old.get(name)} -> {new.get(name)}" for name in _LIBRARIES if old.get(name) != new.get(name)]
    fields = ("version", "commit", "python", "device", "threads")
    differ = [name for name in fields if before.get(name) != after[name]]
    return phrases + [f"{name} {before.get(name)} -> {after[name]}" for name in differ]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout that lmleak is imported from, `+` behind it where files differ; None if installed."""
    home = Path(lmleak.__file__).resolve().parents[1]
    if not (home / ".git").exists():
        return None
    try:
        made = subprocess.run(
            ["git", "-C", str(home), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return made.stdout.strip() or None
