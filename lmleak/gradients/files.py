"""An Observation on disk: `gradients.safetensors` and `observation.json` in one folder, nothing pickled.

A gradient captured elsewhere (an update log, another framework) is attacked the same way: write its tensors under the
model's parameter names and say in the JSON what `save` says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from lmleak.errors import LmleakError, did_you_mean
from lmleak.records import Entry, Observation

if TYPE_CHECKING:
    from torch import Tensor

    from lmleak.records import Victim

GRADIENTS, FACTS = "gradients.safetensors", "observation.json"
FORMAT = 1
#: Key of the JSON -> its types. All but the first three may be left out.
_TYPES: dict[str, tuple[type, ...]] = {
    "entries": (list,),
    "batch_size": (int,),
    "task": (str,),
    "reduction": (str,),
    "mode": (str,),
    "defense": (dict,),
    "privacy": (dict, type(None)),
    "format": (int,),
}
_REQUIRED = ("entries", "batch_size", "task")
_CHOICES = {
    "task": ("sequence-classification", "causal-lm", "masked-lm", "image-classification"),
    "reduction": ("mean", "sum"),
    "mode": ("eval", "train"),
}


def save(observation: Observation, folder: str | Path) -> Path:
    """Writes an observation; existing files of these names are replaced.

    Args:
        observation: what the attacker sees.
        folder: made where it is missing.

    Returns:
        The folder.

    Raises:
        LmleakError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    facts = asdict(observation)
    facts.pop("gradients")
    facts["format"] = FORMAT
    # On the CPU and whole: safetensors refuses views and shared memory.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in observation.gradients.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, str(folder / GRADIENTS))
        (folder / FACTS).write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise LmleakError(f"{folder}: cannot be written ({error.strerror or error}); name another folder") from error
    return folder


def load(folder: str | Path, victim: Victim | None = None) -> Observation:
    """Reads an observation back and checks it.

    Args:
        folder: as given to `save`.
        victim: the public model; with it, names and shapes are checked against its parameters, and the gradients come
            on its device. Without it they come on the CPU.

    Raises:
        LmleakError: a file is missing or damaged, a value is not what it must be, or a gradient does not fit its entry
            or the model; the message names the file and the entry.
    """
    folder = Path(folder)
    facts = _facts(folder / FACTS)
    entries = tuple(_entry(folder / FACTS, place, row) for place, row in enumerate(facts.pop("entries")))
    if not entries:
        raise LmleakError(f"{folder / FACTS}: entries: none, so nothing is observed; list the gradients' parameters")
    gradients = _gradients(folder / GRADIENTS, entries)
    if victim is not None:
        _fit(folder / FACTS, entries, victim)
        device = next(victim.module.parameters()).device
        gradients = {name: tensor.to(device) for name, tensor in gradients.items()}
    facts.pop("format", None)
    return Observation(gradients=gradients, entries=entries, **{"reduction": "mean"} | facts)


def _facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LmleakError(
            f"{path}: {error.strerror or error}; an observation is a folder with {FACTS} and {GRADIENTS}"
        ) from error
    except ValueError as error:
        raise LmleakError(f"{path}: not JSON: {error}; save the observation again") from error
    if not isinstance(facts, dict):
        raise LmleakError(f"{path}: holds a {type(facts).__name__}, not an object with {', '.join(_REQUIRED)}")
    if facts.get("format", FORMAT) != FORMAT:
        raise LmleakError(f"{path}: format {facts['format']!r}, this version reads {FORMAT}; update lmleak")
    for key in _REQUIRED:
        if key not in facts:
            raise LmleakError(f"{path}: '{key}' is missing")
    for key, value in facts.items():
        if key not in _TYPES:
            raise LmleakError(f"{path}: unknown key '{key}'{did_you_mean(key, _TYPES)}")
        if not isinstance(value, _TYPES[key]) or isinstance(value, bool):
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in _TYPES[key])
            raise LmleakError(f"{path}: {key}: {value!r} is not a {wanted}")
        if value not in _CHOICES.get(key, (value,)):
            hint = did_you_mean(str(value), _CHOICES[key])
            raise LmleakError(f"{path}: {key}: '{value}' is not one of {', '.join(_CHOICES[key])}{hint}")
    if facts["batch_size"] < 1:
        raise LmleakError(f"{path}: batch_size: {facts['batch_size']} is not 1 or more")
    return facts


def _entry(path: Path, place: int, row: Any) -> Entry:
    where = f"{path}: entries[{place}]"
    known = Entry.__dataclass_fields__
    if not isinstance(row, Mapping) or not all(isinstance(row.get(k), str) for k in ("name", "parameter", "module")):
        raise LmleakError(f"{where}: needs the strings name, parameter and module, and shape")
    for key in row:
        if key not in known:
            raise LmleakError(f"{where}: unknown key '{key}'{did_you_mean(key, known)}")
    shape, part = row.get("shape"), row.get("part")
    if not _sizes(shape) or not (part is None or (_sizes(part) and len(part) == 3)):
        raise LmleakError(f"{where}: '{row['name']}': shape is a list of sizes, part null or [dimension, start, stop]")
    return Entry(**dict(row) | {"shape": tuple(shape), "part": None if part is None else tuple(part)})


def _sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)


def _gradients(path: Path, entries: tuple[Entry, ...]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise LmleakError(f"{path}: no such file; an observation is a folder with {FACTS} and {GRADIENTS}")
    try:
        tensors = load_file(str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise LmleakError(f"{path}: not a safetensors file ({error}); save the observation again") from error
    for entry in entries:
        if entry.name not in tensors:
            raise LmleakError(f"{path}: no gradient '{entry.name}'{did_you_mean(entry.name, tensors)}")
        tensor = tensors[entry.name]
        if tuple(tensor.shape) != entry.shape:
            raise LmleakError(
                f"{path}: '{entry.name}' is {tuple(tensor.shape)}, but {FACTS} says {entry.shape}; one of them is wrong"
            )
        if not tensor.is_floating_point():
            raise LmleakError(f"{path}: '{entry.name}' holds {tensor.dtype}, not floating-point numbers")
    extra = set(tensors) - {entry.name for entry in entries}
    if extra:
        raise LmleakError(f"{path}: '{min(extra)}' is not among the entries of {FACTS}; add it there or leave it out")
    return {entry.name: tensors[entry.name] for entry in entries}


def _fit(path: Path, entries: tuple[Entry, ...], victim: Victim) -> None:
    parameters = dict(victim.module.named_parameters())
    for entry in entries:
        if entry.parameter not in parameters:
            hint = did_you_mean(entry.parameter, parameters) or "; `lmleak modules` lists the names"
            raise LmleakError(f"{path}: the model has no parameter '{entry.parameter}'{hint}")
        shape = list(parameters[entry.parameter].shape)
        if entry.part is not None:
            dim, start, stop = entry.part
            if dim >= len(shape) or not start < stop <= shape[dim]:
                raise LmleakError(f"{path}: '{entry.name}': part {list(entry.part)} lies outside {tuple(shape)}")
            shape[dim] = stop - start
        if tuple(shape) != entry.shape:
            raise LmleakError(
                f"{path}: '{entry.name}' is {entry.shape}, in the model {tuple(shape)}; load the model it comes from"
            )
