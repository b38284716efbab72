"""Tokenizers from a folder, and the built-in byte-level one for models without any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmleak.errors import ModelError
from lmleak.models._weights import resolve

#: A real vocabulary has at least the bytes or the letters; transformers 5 returns these few special tokens instead
#: when a folder's vocabulary was not read.
_SMALLEST = 32


def tokenizer_for(address: str, *, fallback: str | None, causal: bool) -> Any:
    """The tokenizer at `address`, padding on the right.

    Args:
        address: hub id, folder, `package:NAME/PATH`, or `bytes`.
        fallback: class name in transformers that reads bare vocabulary files, for folders without a tokenizer.json.
        causal: whether the built-in tokenizer should add no [CLS] and [SEP].

    Raises:
        ModelError: no tokenizer there, or an empty one.
    """
    tokenizer = byte_tokenizer(causal) if address == "bytes" else _from_folder(address, fallback)
    tokenizer.padding_side = tokenizer.truncation_side = "right"  # position_ids count from the left
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ModelError(f"model.tokenizer: '{address}' has neither a padding nor an end-of-text token")
    return tokenizer


def _from_folder(address: str, fallback: str | None) -> Any:
    import transformers

    folder = resolve(address, what="model.tokenizer")
    if not (folder / "tokenizer.json").exists() and not (folder / "tokenizer_config.json").exists() and fallback:
        reader = getattr(transformers, fallback)
    else:
        reader = transformers.AutoTokenizer
    try:
        tokenizer = reader.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # missing files surface as OSError, ValueError, TypeError or KeyError by tokenizer class
        raise ModelError(
            f"model.tokenizer: none could be read from '{folder}' ({_files(folder)}): {_first_line(error)}; "
            "name one with tokenizer: FOLDER, or use the built-in tokenizer: bytes"
        ) from error
    if len(tokenizer) < _SMALLEST:
        raise ModelError(
            f"model.tokenizer: the one in '{folder}' is empty ({len(tokenizer)} tokens; {_files(folder)}): "
            "its vocabulary file is missing or not of this model's kind"
        )
    return tokenizer


def _files(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return "files: " + (", ".join(names[:8]) or "none")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().split("\n", 1)[0]


def byte_tokenizer(causal: bool) -> Any:
    """One token a byte of UTF-8: exact on any text, needs no file, and makes sentences five times longer than words.

    Ids are the special tokens first (0 is padding), then the 256 bytes in order.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    if not causal:
        special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    names = list(dict.fromkeys(special.values()))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*names, *alphabet])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=names[0]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            pre_tokenizers.Split(Regex("."), "isolated"),
        ]
    )
    backend.decoder = decoders.Sequence([decoders.Fuse(), decoders.ByteLevel()])
    if not causal:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B [SEP]",
            special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)
