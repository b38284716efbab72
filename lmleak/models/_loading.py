"""Config -> Victim, the same way for every text family. Neither global generators nor global logging are changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from lmleak.errors import ModelError, did_you_mean
from lmleak.models._config import Config
from lmleak.models._tokenizers import tokenizer_for
from lmleak.models._weights import digest, resolve
from lmleak.records import Victim
from lmleak.seeds import derive

_AUTO = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "image-classification": "AutoModelForImageClassification",
}
_SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def load(config: Config, seed: int, family: ModuleType, kind: str) -> Victim:
    """Loads weights and tokenizer and puts them into the client's mode.

    Args:
        config: the recipe's `model` block.
        seed: draws new heads and random weights; the same seed gives the same bits.
        family: the kind's module. `MODEL_TYPES` are the Hugging Face types it may load (empty: any), `TOKENIZER` the
            class that reads bare vocabulary files, `TASKS` the tasks it has, `CAUSAL` its direction.
        kind: the family's registry name.

    Raises:
        ModelError: weights, tokenizer and task cannot be had or do not fit together.
        MissingExtra: `package:` names a package that is not installed.
    """
    import torch

    if config.task not in family.TASKS:
        raise ModelError(f"model.task: {kind} has no {config.task} (it has: {', '.join(family.TASKS)})")
    device = _device(config.device)
    with _quiet():
        if config.weights == "random":
            module, tokenizer, name = _random(config, seed, family, kind)
        else:
            module, tokenizer, name = _pretrained(config, seed, family, kind)
    _fit(module, tokenizer)
    module.train(config.mode == "train")
    try:
        module.to(device=device, dtype=getattr(torch, config.dtype))
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ModelError(f"model.device: cannot put the model on '{device}': {str(error).splitlines()[0]}") from error
    return Victim(
        module=module,
        processor=tokenizer,
        family=_adapted(family, module, config),
        kind=kind,
        task=config.task,
        weights=name,
        mode=config.mode,
    )


def outline(config: Config, family: ModuleType, kind: str) -> Victim:
    """The model's names and shapes without its weights: a module on the meta device, and no tokenizer.

    `weights: random` gives the architecture's defaults; otherwise only config.json is read.

    Raises:
        ModelError: see `load`.
    """
    import torch
    import transformers

    if config.task not in family.TASKS:
        raise ModelError(f"model.task: {kind} has no {config.task} (it has: {', '.join(family.TASKS)})")
    with _quiet(), _own_generator(0), torch.device("meta"):
        if config.weights == "random":
            settings = _random_settings(config, family, kind, {})
        else:
            settings = _settings(resolve(config.weights), config, family, kind)
        module = _call(getattr(transformers, _AUTO[config.task]).from_config, settings, attn_implementation="eager")
    known = _adapted(family, module, config)
    return Victim(module=module, processor=None, family=known, kind=kind, task=config.task, weights=config.weights)


def _pretrained(config: Config, seed: int, family: ModuleType, kind: str) -> tuple[Any, Any, str]:
    import torch
    import transformers

    folder = resolve(config.weights)
    settings = _settings(folder, config, family, kind)
    tokenizer = tokenizer_for(config.tokenizer or str(folder), fallback=family.TOKENIZER, causal=family.CAUSAL)
    version = digest(folder)
    with _own_generator(seed):
        module, info = _call(
            getattr(transformers, _AUTO[config.task]).from_pretrained,
            str(folder),
            config=settings,
            attn_implementation=config.attn_implementation,
            dtype=getattr(torch, config.dtype),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    if info.get("mismatched_keys"):
        raise ModelError(
            f"model.weights: shapes do not fit the config: {sorted(map(str, info['mismatched_keys']))[:3]}"
        )
    # A new head is expected (that is what fine-tuning starts from); a new body means these are other weights.
    body = module.base_model_prefix + "."
    missing = sorted(key for key in info["missing_keys"] if key.startswith(body) and ".pooler." not in f".{key}")
    if missing:
        raise ModelError(
            f"model.weights: '{config.weights}' lacks {len(missing)} parameters of the model's body, first {missing[0]}"
        )
    own_memory(module)
    new = sorted({key.rsplit(".", 1)[0] for key in info["missing_keys"]})
    drawn = f" new: {', '.join(new)} (seed {seed})" if new else ""
    return module, tokenizer, f"{config.weights} sha256:{version}{drawn}"


def own_memory(module: Any) -> None:
    """Takes the weights out of the file they may be mapped from.

    A mapped tensor starts where the file has it, 24 bytes past a cache line in MiniLM's; which way it is loaded depends
    on the process group. Matrix kernels round by alignment: the same search found a sentence in one process and not
    in one of two.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()


def _random(config: Config, seed: int, family: ModuleType, kind: str) -> tuple[Any, Any, str]:
    import torch
    import transformers

    if config.tokenizer is None:
        raise ModelError(
            "model.tokenizer: random weights bring no tokenizer; name one (a hub id, a folder, package:NAME/PATH) "
            "or use the built-in byte-level one: tokenizer: bytes"
        )
    tokenizer = tokenizer_for(config.tokenizer, fallback=family.TOKENIZER, causal=family.CAUSAL)
    implied: dict[str, Any] = {"vocab_size": len(tokenizer)}
    implied |= {name: getattr(tokenizer, name, None) for name in _SPECIAL_IDS}
    settings = _random_settings(config, family, kind, implied)
    with _own_generator(seed):
        module = _call(
            getattr(transformers, _AUTO[config.task]).from_config,
            settings,
            attn_implementation=config.attn_implementation,
            dtype=getattr(torch, config.dtype),
        )
    text = json.dumps([kind, config.task, config.config, config.tokenizer, seed], sort_keys=True, default=str)
    return module, tokenizer, f"random config:{hashlib.sha256(text.encode()).hexdigest()[:12]} (seed {seed})"


def _settings(folder: Path, config: Config, family: ModuleType, kind: str) -> Any:
    import transformers

    try:
        settings = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        why = str(error).strip().split("\n", 1)[0]
        raise ModelError(f"model.weights: no usable config.json in '{folder}': {why}") from error
    if family.MODEL_TYPES and settings.model_type not in family.MODEL_TYPES:
        raise ModelError(
            f"model.kind: '{config.weights}' is a '{settings.model_type}' model, not {kind}; "
            f"use kind: {settings.model_type} if `lmleak ls models` lists it, else kind: generic"
        )
    _refuse_unknown(config.config, settings)
    for name, value in config.config.items():
        setattr(settings, name, value)
    if config.task.endswith("classification"):
        settings.num_labels = config.num_labels
    return settings


def _random_settings(config: Config, family: ModuleType, kind: str, implied: dict[str, Any]) -> Any:
    import transformers

    given = dict(config.config)
    model_type = given.pop("model_type", None) or next(iter(family.MODEL_TYPES), None)
    if model_type is None:
        raise ModelError("model.config: random weights of kind generic need config: {model_type: ...}")
    if family.MODEL_TYPES and model_type not in family.MODEL_TYPES:
        raise ModelError(f"model.config.model_type: '{model_type}' is not {kind}; leave it out or use kind: generic")
    try:
        defaults = transformers.AutoConfig.for_model(model_type)
    except (ValueError, KeyError) as error:
        known = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
        raise ModelError(f"model.config.model_type: no '{model_type}'{did_you_mean(model_type, known)}") from error
    _refuse_unknown(given, defaults)
    fields = {name: value for name, value in implied.items() if _canonical(name, defaults) in _known(defaults)} | given
    if config.task.endswith("classification"):
        fields["num_labels"] = config.num_labels
    if model_type in getattr(family, "ARCHITECTURES", {}):
        fields["architectures"] = [family.ARCHITECTURES[model_type]]
    return _call(type(defaults), **fields)


def _known(settings: Any) -> set[str]:
    return {*settings.to_dict(), *settings.attribute_map, *_SPECIAL_IDS}


def _canonical(name: str, settings: Any) -> str:
    return settings.attribute_map.get(name, name)


def _refuse_unknown(given: dict[str, Any], settings: Any) -> None:
    known = _known(settings)
    wrong = [
        f"model.config.{name}: {type(settings).__name__} has no such field{did_you_mean(name, known)}"
        for name in given
        if name not in known
    ]
    if wrong:
        raise ModelError("\n".join(wrong))


def _call(function: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Calls into transformers; whatever it finds wrong with sizes, types or files is a ModelError in one line."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        text = (str(error).strip() or type(error).__name__).split("\n", 1)[0]
        raise ModelError(f"model: {text}") from error


def _fit(module: Any, tokenizer: Any) -> None:
    rows = module.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"model.tokenizer: has {len(tokenizer)} tokens, the model's embedding only {rows} rows: "
            "they do not belong together"
        )
    module.config.pad_token_id = tokenizer.pad_token_id  # a GPT-2 classifier finds the last word by it


def _adapted(family: ModuleType, module: Any, config: Any) -> ModuleType:
    return family.adapt(module, config) if hasattr(family, "adapt") else family


def _device(name: str | None) -> Any:
    import torch

    if name is None:
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env

        # PartialState itself does not read ACCELERATE_USE_CPU.
        return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"model.device: '{name}' is not a device (cpu, cuda, cuda:1, mps, ...)") from error


@contextmanager
def _own_generator(seed: int) -> Iterator[None]:
    """Draws on the CPU from a derived seed; the process's generator continues afterwards as if nothing had happened."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, "model"))  # torch.manual_seed would reseed the GPUs too
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' load report, advice and progress bars, and puts the user's settings back."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
