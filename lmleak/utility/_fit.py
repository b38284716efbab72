"""Plain training before a study, so that gradients of fresh and of trained models can be compared; kept by content."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lmleak.gradients.losses import model_losses
from lmleak.records import Batch, Victim
from lmleak.seeds import derive, generator
from lmleak.utility._score import together


def cache_folder() -> Path:
    """Where trained weights are kept: LMLEAK_CACHE, else `lmleak` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LMLEAK_CACHE") or Path(base) / "lmleak")


def fitted(
    victim: Victim,
    records: Callable[[], Sequence[Batch]],
    block: Mapping[str, Any],
    seed: int,
    said: Callable[[str], None] = lambda _: None,
) -> Victim:
    """A copy trained on every weight by AdamW; the same call again reads what the first one kept.

    Args:
        victim: left as it was found.
        records: makes the batches of one record each; called only where nothing is kept.
        block: a recipe's resolved `train`.
        seed: of the order and of dropout.
        said: progress, one line an epoch.

    Returns:
        the victim with trained weights, named by a digest of everything that led to them.
    """
    from safetensors.torch import load_file, save_file

    text = json.dumps([victim.weights, dict(block), seed, torch.__version__], sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    made = replace(
        victim,
        module=copy.deepcopy(victim.module),
        weights=f"{victim.weights} trained {block['epochs']} epochs {name}",
    )
    path = cache_folder() / "trained" / f"{name}.safetensors"
    if path.exists():
        kept = load_file(path, device=str(next(made.module.parameters()).device))
        with torch.no_grad():
            for key, tensor in _state(made).items():
                tensor.copy_(kept[key])
        return made
    _train(made, records(), block, seed, said)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    save_file({key: tensor.detach().clone().contiguous() for key, tensor in _state(made).items()}, new)
    os.replace(new, path)
    return made


def _state(victim: Victim) -> dict[str, torch.Tensor]:
    """Parameters, tied ones once, and buffers such as BatchNorm's statistics."""
    return {**dict(victim.module.named_parameters()), **dict(victim.module.named_buffers())}


def _train(
    victim: Victim, records: Sequence[Batch], block: Mapping[str, Any], seed: int, said: Callable[[str], None]
) -> None:
    module = victim.module
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=block["lr"], weight_decay=0.0)
    size = block["batch_size"]
    starts = range(0, len(records), size)
    done, total = 0, len(starts) * block["epochs"]
    modes = {m: m.training for m in module.modules()}
    devices = {p.device.index for p in wanted if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(i for i in devices if i is not None)):
        torch.manual_seed(derive(seed, "train", "dropout"))
        module.train()
        for epoch in range(block["epochs"]):
            order = torch.randperm(len(records), generator=generator(seed, "train", epoch)).tolist()
            mean = 0.0
            for start in starts:
                for group in optimizer.param_groups:
                    group["lr"] = block["lr"] * (1 - done / total)
                batch = together([records[i] for i in order[start : start + size]], victim)
                loss = model_losses(module, batch.inputs, batch.labels, victim.task, "mean").sum()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                done, mean = done + 1, mean + float(loss.detach()) / len(starts)
            said(f"trained epoch {epoch + 1} of {block['epochs']}: loss {mean:.3f}")
    for parameter in wanted:
        parameter.grad = None
    for m, training in modes.items():
        m.training = training
