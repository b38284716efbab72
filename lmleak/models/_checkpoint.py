"""Checkpoint files -> a module's parameters, read without running code: safetensors, or tensors alone by torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lmleak.errors import ModelError
from lmleak.models._weights import sha256

Renamed = Callable[[str], str]


def fill(module: Any, weights: str, renamed: Renamed | None = None) -> str:
    """Loads a checkpoint file, or the only one in a folder, into the module.

    Args:
        module: whose parameters and buffers the file must have, all and no others, in their shapes.
        weights: the recipe's `model.weights`; a file's tensors may lie under `state_dict`, their names behind
            `module.` (DataParallel's).
        renamed: a name in the file -> the module's name.

    Returns:
        the weights' name with the file's digest.

    Raises:
        ModelError: no such file, one that cannot be read without running code, or of another architecture.
    """
    path = _file(Path(weights).expanduser())
    state = {name.removeprefix("module."): tensor for name, tensor in _tensors(path).items()}
    if renamed:
        state = {renamed(name): tensor for name, tensor in state.items()}
    # Files from before PyTorch counted batches lack the counters.
    state = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    own = {name: tensor for name, tensor in module.state_dict().items() if not name.endswith("num_batches_tracked")}
    wrong = [name for name in own if name not in state or state[name].shape != own[name].shape]
    wrong += sorted(set(state) - set(own))
    if wrong:
        raise ModelError(
            f"model.weights: '{path}' does not fit this architecture: {len(wrong)} names or shapes differ, "
            f"first {wrong[0]} ({_shape(state.get(wrong[0]))} in the file, {_shape(own.get(wrong[0]))} in the model)"
        )
    module.load_state_dict(state, strict=False)
    return f"{weights} sha256:{sha256(path)[:12]}"


def _shape(tensor: Any) -> str:
    return "absent" if tensor is None else " x ".join(map(str, tensor.shape)) or "a number"


def _file(path: Path) -> Path:
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise ModelError(f"model.weights: '{path}' holds {len(found)} safetensors files; give the file itself")
        return found[0]
    if not path.is_file():
        raise ModelError(f"model.weights: there is no file '{path}'; use a checkpoint file, or weights: random")
    return path


def _tensors(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        import torch

        found = torch.load(path, map_location="cpu", weights_only=True)
        found = found.get("state_dict", found)
        return {str(name): value for name, value in found.items() if isinstance(value, torch.Tensor)}
    except Exception as error:
        raise ModelError(f"model.weights: '{path}' is no checkpoint that can be read without running code") from error
