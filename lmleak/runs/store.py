"""Result and reconstruction lines: appended only, read whole or not at all.

A result line ended by a newline is the commit of a unit. Its reconstruction is on disk before it, so a kill at any
moment leaves at most a torn line and an orphaned reconstruction, which readers skip and the next run of the same rank
cuts off.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

RESULTS, RECONSTRUCTIONS = "results", "reconstructions"


class Store:
    """Appends the lines of one rank. Two processes never write to one file."""

    def __init__(self, folder: Path, rank: int = 0):
        self.folder, self._rank = folder, rank
        self._files: dict[str, IO[bytes]] = {}

    def __enter__(self) -> Store:
        done = {(line["cell"], line["batch"]) for line in lines(self._path(RESULTS))}
        _cut(self._path(RESULTS), lambda line: True)
        _cut(self._path(RECONSTRUCTIONS), lambda line: (line["cell"], line["batch"]) in done)
        for name in (RESULTS, RECONSTRUCTIONS):
            self._files[name] = self._path(name).open("ab", buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def append(self, result: Mapping[str, Any], reconstruction: Mapping[str, Any] | None = None) -> None:
        """Commits a unit: its reconstruction first, then its result, each on disk before the call goes on."""
        stamp = {"time": now()}
        if reconstruction is not None:
            self._write(RECONSTRUCTIONS, {**reconstruction, **stamp})
        self._write(RESULTS, {**result, **stamp})

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}-{self._rank}.jsonl"

    def _write(self, name: str, line: Mapping[str, Any]) -> None:
        data = dump(line) + b"\n"
        while data:  # a raw write may be short, on a full disk for one
            data = data[self._files[name].write(data) :]
        os.fsync(self._files[name].fileno())


def dump(value: Any) -> bytes:
    """One line of strict JSON. ASCII, because a recovered text may hold half a surrogate pair."""
    return json.dumps(plain(value), separators=(", ", ": "), allow_nan=False).encode("ascii")


def plain(value: Any) -> Any:
    """JSON types only: tensors and arrays as lists, NaN and infinity as null, anything else as its text."""
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


def now() -> str:
    """UTC, to the microsecond, so that later lines sort later."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def read(folder: Path, name: str) -> dict[tuple[str, int], dict[str, Any]]:
    """The valid line of every (cell, batch), whatever rank wrote it: an answer before a failure, else the latest."""
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for path in sorted(folder.glob(f"{name}-*.jsonl")):
        for line in lines(path):
            key = (line["cell"], line["batch"])
            if better(line, best.get(key)):
                best[key] = line
    return best


def _order(line: Mapping[str, Any]) -> tuple[bool, str]:
    return line.get("status") != "failed", line.get("time", "")


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines only. One without its newline was never committed, even where it happens to parse."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for raw in file:
            if raw.endswith(b"\n") and (line := _parse(raw)) is not None:
                yield line


def _parse(raw: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(raw)
    except ValueError:  # a disk that lost power may hold zeros; the unit counts as not done
        return None
    return line if isinstance(line, dict) and {"cell", "batch"} <= line.keys() else None


def _cut(path: Path, keep: Any) -> None:
    """Cuts a torn last line off, and a last whole line that `keep` refuses."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = before = 0
        last = b""
        for raw in file:
            if not raw.endswith(b"\n"):
                break
            before, last = end, raw
            end += len(raw)
        if last and (line := _parse(last)) is not None and not keep(line):
            end = before
        file.truncate(end)


def replace(path: Path, data: bytes) -> None:
    """Writes a whole file so that a reader sees the old one or the new one, never half of it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def replace_lines(path: Path, new: list[dict[str, Any]]) -> None:
    """Replaces a JSONL file as a whole."""
    replace(path, b"".join(dump(line) + b"\n" for line in new))


class Tail:
    """Follows the lines that all ranks append, from where the last look ended."""

    def __init__(self, folder: Path, name: str = RESULTS):
        self._folder, self._name = folder, name
        self._seen: dict[Path, int] = {}

    def poll(self) -> list[dict[str, Any]]:
        """Lines that are new since the last call."""
        new = []
        for path in sorted(self._folder.glob(f"{self._name}-*.jsonl")):
            start = self._seen.get(path, 0)
            with path.open("rb") as file:
                file.seek(start)
                whole = file.read().rpartition(b"\n")[0]
            if whole:
                self._seen[path] = start + len(whole) + 1
                new += [line for raw in whole.split(b"\n") if (line := _parse(raw)) is not None]
        return new


def better(line: Mapping[str, Any], than: Mapping[str, Any] | None) -> bool:
    """Whether `line` replaces another one of its unit: an answer goes before a failure, else the later one counts."""
    return than is None or _order(line) >= _order(than)
