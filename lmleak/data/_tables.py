"""Tables of texts or pictures, read through `datasets`: local files leave no cache behind, hub ids do."""

from __future__ import annotations

import difflib
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmleak.data._examples import Examples
from lmleak.errors import DataError, did_you_mean

_BUILDERS = {
    ".tsv": "csv",
    ".csv": "csv",
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
}
_TEXT_NAMES = ("text", "sentence", "content", "review", "document")
_LABEL_NAMES = ("label", "labels", "target", "class")
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
_OFFLINE_WAY_OUT = (
    "read a local file instead (data: {kind: local, path: FILE}) or use the built-in data: {kind: sample}"
)


def from_path(
    path: str, split: str, text_column: str | None, label_column: str | None, *, header: Iterable[str] | None = None
) -> Examples:
    """Texts of a file; see `path_table`.

    Args:
        path: file or folder.
        split: as in `path_table`.
        text_column: None takes the only plausible one.
        label_column: None takes the only plausible one, if there is any.
        header: as in `path_table`.

    Raises:
        DataError: missing, unreadable or empty file, no such column, or several plausible ones.
    """
    return _examples(*path_table(path, split, header), text_column, label_column)


def path_table(path: str, split: str, header: Iterable[str] | None = None) -> tuple[Any, dict[str, Any]]:
    """Reads a tsv, csv, jsonl or parquet file, or the file of a folder that is named after `split`.

    Args:
        path: file or folder.
        split: name of the split, with an optional slice as in `train[:100]`. A file is its own split: the name is free.
        header: column names of a file that may lack its header line.

    Returns:
        the table of `datasets`, at least one row, and where it came from.

    Raises:
        DataError: missing, unreadable or empty file.
    """
    file = _file(Path(path).expanduser(), split)
    builder = _BUILDERS[file.suffix.lower()]
    options: dict[str, Any] = {}
    if builder == "csv":
        options["keep_default_na"] = False  # else the sentence "None" or "NA" is a missing value
        if file.suffix.lower() == ".tsv":
            # 56 sentences of SST-2 and Rotten Tomatoes open with a quotation mark; read as quoted, each would swallow
            # the lines up to the next mark.
            options |= {"sep": "\t", "quoting": 3}
        if header and not _has_header(file, header):
            options["column_names"] = list(header)
    if not file.stat().st_size:
        raise DataError(f"data.path: '{file}' is empty")
    name = re.match(r"\w+", split)
    if not name:
        raise DataError(f"data.split: '{split}' is not a split name such as train, dev or train[:100]")
    import datasets

    with _quiet(), tempfile.TemporaryDirectory(prefix="lmleak-") as cache:
        try:
            table = datasets.load_dataset(
                builder, data_files={name[0]: str(file)}, split=split, cache_dir=cache, keep_in_memory=True, **options
            )
        except Exception as error:  # parser errors come wrapped in several classes, the cause says what is wrong
            cause = str(error.__cause__ or error).strip().split("\n", 1)[0]
            if "corresponds to no data" in cause:
                raise DataError(f"data.path: '{file}' has no rows below its header") from error
            raise DataError(f"data.path: '{file}' cannot be read as {file.suffix[1:]}: {cause}") from error
    return _filled(table, {"kind": "local", "path": str(file), "split": split})


def from_hub(
    repository: str, name: str | None, split: str, text_column: str | None, label_column: str | None
) -> Examples:
    """Texts of a data set of the hub; see `hub_table`."""
    return _examples(*hub_table(repository, name, split), text_column, label_column)


def hub_table(
    repository: str, name: str | None, split: str, way_out: str = _OFFLINE_WAY_OUT
) -> tuple[Any, dict[str, Any]]:
    """Reads a data set of the hub, or of its cache: the table of `datasets`, and where it came from.

    Raises:
        DataError: unknown id, configuration or split, or the hub cannot be reached.
    """
    import datasets
    import huggingface_hub
    from huggingface_hub import errors

    address = repository if name is None else f"{repository} ({name})"
    with _quiet():
        try:
            if not datasets.config.HF_HUB_OFFLINE:
                # One listing decides within seconds whether there is a network; load_dataset retries for much longer.
                huggingface_hub.HfApi().dataset_info(repository, timeout=10)
        except errors.RepositoryNotFoundError as error:
            raise DataError(f"data.id: there is no data set '{repository}' on the hub; {way_out}") from error
        except errors.HFValidationError as error:
            raise DataError(f"data.id: '{repository}' is not a hub id; {way_out}") from error
        except Exception as error:
            cached = _cached(repository, name, split)
            if cached is None:
                raise DataError(
                    f"data.id: the hub cannot be reached and '{address}' is not in its cache; {way_out}"
                ) from error
            table = cached
        else:
            table = _load_hub(repository, name, split, address, way_out)
    return _filled(table, {"kind": "hub", "id": address, "split": split})


def _load_hub(repository: str, name: str | None, split: str, address: str, way_out: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(repository, name, split=split)
    except Exception as error:  # unknown split or configuration: ValueError; offline: ConnectionError and others
        why = str(error).strip().split("\n", 1)[0]
        raise DataError(f"data.id: '{address}', split '{split}': {why}; {way_out}") from error


def _cached(repository: str, name: str | None, split: str) -> Any:
    import datasets

    was = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        return datasets.load_dataset(repository, name, split=split)
    except Exception:
        return None
    finally:
        datasets.config.HF_HUB_OFFLINE = was


def _file(path: Path, split: str) -> Path:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in _BUILDERS)
        wanted = next((names for names in _SPLIT_NAMES.values() if split.split("[")[0] in names), None)
        wanted = wanted or (split.split("[")[0],)
        hits = [file for file in files if set(re.split(r"[^a-z0-9]+", file.stem.lower())) & set(wanted)]
        hits = hits or (files if len(files) == 1 else [])
        if len(hits) != 1:
            found = ", ".join(file.name for file in files) or "none"
            raise DataError(
                f"data.path: no single file for split '{split}' in '{path}' (files: {found}); name the file"
            )
        return hits[0]
    if not path.is_file():
        raise DataError(f"data.path: there is no file '{path}'{_nearest(path)}")
    if path.suffix.lower() not in _BUILDERS:
        raise DataError(f"data.path: '{path.name}' is none of {', '.join(_BUILDERS)}")
    return path


def _nearest(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        while not folder.is_dir() and folder != folder.parent:
            folder = folder.parent
        return f" (nearest folder that exists: '{folder}')"
    names = [entry.name for entry in folder.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"; did you mean '{folder / close[0]}'?" if close else f" (folder has: {', '.join(sorted(names)[:8])})"


def _has_header(file: Path, header: Iterable[str]) -> bool:
    with open(file, encoding="utf-8") as lines:
        first = lines.readline().rstrip("\r\n").split("\t")
    return bool(set(first) & set(header))


def _filled(table: Any, source: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if not len(table):
        raise DataError(f"data: '{place(source)}' has no rows in split '{source['split']}'")
    return table, source


def place(source: Mapping[str, Any]) -> Any:
    """What an error message calls a source."""
    return source.get("path") or source.get("id")


def _examples(table: Any, source: dict[str, Any], text_column: str | None, label_column: str | None) -> Examples:
    where = place(source)
    text_column = _text_column(table, text_column, where)
    texts = []
    for row, text in enumerate(table[text_column], start=1):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"data.text_column: row {row} of '{where}' has no text in '{text_column}' but {text!r}")
        texts.append(text.strip())
    label_column, labels = labels_of(table, label_column, text_column, where)
    columns = {"text_column": text_column, "label_column": label_column}
    return Examples(texts=tuple(texts), labels=labels, source=source | columns | {"rows": len(texts)})


def _text_column(table: Any, wanted: str | None, where: Any) -> str:
    columns = table.column_names
    if wanted is not None:
        return column(columns, wanted, "text_column", where)
    strings = [name for name in columns if getattr(table.features[name], "dtype", None) in ("string", "large_string")]
    named = [name for name in strings if name.lower() in _TEXT_NAMES]
    for candidates in (named, strings):
        if len(candidates) == 1:
            return candidates[0]
    raise DataError(f"data.text_column: which column of '{where}' is the text? It has: {', '.join(columns)}")


def labels_of(table: Any, wanted: str | None, other: str, where: Any) -> tuple[str | None, tuple[int, ...]]:
    """The name of the column of labels and its values; none where nothing but `other` is a plausible one.

    Raises:
        DataError: no such column, several plausible ones, or a value that is no class.
    """
    name = _label_column(table, wanted, other, where)
    if name is None:
        return None, ()
    return name, tuple(_label(value, row, name, where) for row, value in enumerate(table[name], start=1))


def _label_column(table: Any, wanted: str | None, text_column: str, where: Any) -> str | None:
    columns = table.column_names
    if wanted is not None:
        return column(columns, wanted, "label_column", where)
    others = [name for name in columns if name != text_column]
    named = [name for name in others if name.lower() in _LABEL_NAMES]
    if len(named) > 1:
        raise DataError(f"data.label_column: which column of '{where}' is the label? It has: {', '.join(columns)}")
    return named[0] if named else None


def column(columns: list[str], wanted: str, field: str, where: Any) -> str:
    """The column, if there is one."""
    if wanted not in columns:
        hint = did_you_mean(wanted, columns)
        raise DataError(f"data.{field}: '{where}' has no column '{wanted}'{hint} (it has: {', '.join(columns)})")
    return wanted


def _label(value: Any, row: int, column: str, where: Any) -> int:
    try:
        number = int(value)
        if isinstance(value, float) and number != value:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise DataError(
            f"data.label_column: row {row} of '{where}' has {value!r} in '{column}'; labels are integers from 0"
        ) from None
    return number


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of `datasets` while reading; the user's setting is put back."""
    import datasets

    bars = not datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if bars:
            datasets.enable_progress_bars()
