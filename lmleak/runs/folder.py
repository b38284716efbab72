"""The run folder as a whole: where it is, whose it is, its run.json, and the lock that keeps a second run out."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from lmleak.config import Recipe
from lmleak.errors import RunError
from lmleak.runs.store import plain, replace

#: What a kill can leave in a folder that has no run.json yet; such a folder may be taken over.
_BEFORE_START = {".lock", "recipe.yaml", "log.txt"}


def find(recipe: Recipe, root: Path) -> Path | None:
    """The latest run folder of this recipe under `root`, None where there is none."""
    found = [path for path in root.glob(f"*-{recipe.id}") if (path / "run.json").exists()]
    return max(found, key=lambda path: path.name.rsplit("-", 2)[1:], default=None)


def create(recipe: Recipe, root: Path) -> Path:
    """Makes `<name>-<utc>-<id>` under `root`."""
    while True:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        folder = root / f"{recipe.name}-{stamp}-{recipe.id}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # another start within the same second
            time.sleep(0.2)
            continue
        return folder


def check_owner(folder: Path, recipe: Recipe) -> None:
    """Refuses a folder that holds anything but this recipe's run, or nothing.

    Raises:
        RunError: another recipe's run, named with what differs; or no run folder at all.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: is a file, not a run folder")
    facts = read_facts(folder)
    if facts is None:
        if not is_new(folder):
            raise RunError(f"{folder}: holds other files and no run.json; name an empty or a new folder")
    elif facts.get("recipe") != recipe.id:
        raise RunError(
            f"{folder}: holds a run of another recipe, '{facts.get('name')}' ({facts.get('recipe')}), not "
            f"'{recipe.name}' ({recipe.id}){_difference(folder, recipe)}; name another folder by --run-dir"
        )


def _difference(folder: Path, recipe: Recipe) -> str:
    import yaml

    try:
        old = _flat(yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError):
        return ""
    new = _flat(yaml.safe_load(recipe.to_yaml()))
    changes = [
        f"{key} {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted({*old, *new} - {"name"})
        if old.get(key) != new.get(key)
    ]
    more = f" and {len(changes) - 4} more" if len(changes) > 4 else ""
    return f": {', '.join(changes[:4])}{more}" if changes else ""


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {key: value}
    return {k: v for name, item in value.items() for k, v in _flat(item, f"{key}.{name}" if key else str(name)).items()}


def read_facts(folder: Path) -> dict[str, Any] | None:
    """run.json, or None where there is none.

    Raises:
        RunError: it is damaged.
    """
    path = folder / "run.json"
    if not path.exists():
        return None
    try:
        facts = json.loads(path.read_bytes())
    except ValueError as error:
        raise RunError(f"{path}: damaged: {error}") from error
    if not isinstance(facts, dict):
        raise RunError(f"{path}: damaged: not a mapping")
    return facts


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Replaces run.json."""
    replace(folder / "run.json", json.dumps(plain(facts), indent=1, allow_nan=False).encode("ascii") + b"\n")


def is_new(folder: Path) -> bool:
    """Whether a run may start here: no such folder, or an empty one, or one whose start was killed."""
    return not folder.exists() or {path.name for path in folder.iterdir()} <= _BEFORE_START


class Lock:
    """Keeps a second run out of the folder. The kernel drops it when the last holder dies, however it dies.

    Rank 0 takes it alone, the other ranks then share it: a run whose rank 0 was killed stays locked until its
    orphaned workers have ended.
    """

    def __init__(self, folder: Path):
        self._path = folder / ".lock"
        self._file: IO[bytes] | None = None

    def take(self, *, shared: bool = False) -> None:
        """Takes the lock, or turns an exclusive one into a shared one.

        Raises:
            RunError: another run holds it.
        """
        try:
            import fcntl
        except ImportError:  # Windows: no lock, as accelerate runs one process there
            return
        self._file = self._file or self._path.open("ab")
        mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(self._file, mode | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            message = f"{self._path.parent}: another run is working in this folder; wait for it or stop it"
            raise RunError(message) from error

    def release(self) -> None:
        """Gives the lock back."""
        if self._file:
            self._file.close()
            self._file = None
