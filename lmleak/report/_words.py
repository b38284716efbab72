"""Numbers, selections and defenses as a person says them. Text only: escaping is the template's."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from lmleak.report import _grade

#: component -> what it is in a sentence, and its place in a figure (the order data flows through a block)
COMPONENTS = {
    "patch_embedding": "the patch embedding",
    "position_embedding": "the position embeddings",
    "embedding": "the embedding table",
    "conv": "the convolutions",
    "attn_query": "one query matrix",
    "attn_key": "one key matrix",
    "attn_value": "one value matrix",
    "attn_qkv": "the query, key and value matrices",
    "attn_output": "one attention output matrix",
    "ffn_in": "one feed-forward input matrix",
    "ffn_out": "one feed-forward output matrix",
    "linear": "the fully connected layers",
    "norm": "the norms",
    "layer": "a whole layer",
    "stage": "the residual stages",
    "encoder": "the whole encoder",
    "pooler": "the pooler",
    "head": "the head",
    "all": "the whole model",
}
METRICS = {
    "exact_match": "read word for word",
    "rougeL": "ROUGE-L",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "token_accuracy": "token accuracy",
    "ssim": "SSIM",
    "psnr": "PSNR, dB",
    "mse": "squared error",
    "fft2d": "Fourier distance",
    "lpips": "LPIPS",
    "identification": "identified",
    "label_accuracy": "labels",
    "seconds": "CPU seconds",
}
_OUTSIDE = ("patch_embedding", "position_embedding", "embedding", "pooler", "head", "encoder", "stage", "all")
STATUSES = {
    "not_applicable": "n/a",
    "no_signal": "no signal",
    "budget_exhausted": "out of budget",
    "failed": "failed",
}
_SHORT = {"noise_multiplier": "σ", "max_grad_norm": "C", "batch_size": "B"}
_KINDS = {"none": "no defense", "dp_sgd": "DP-SGD", "gaussian_noise": "unclipped noise"}


def metric_name(metric: str) -> str:
    """`rougeL` -> `ROUGE-L`; an unknown metric keeps its key."""
    return METRICS.get(metric, metric)


def percent(value: float | None, metric: str = "") -> str:
    """A score as a person reads it: 0..1 in percent without decimals, PSNR in dB, distances as they are.

    99.7 is 99, never 100.
    """
    if value is None or not math.isfinite(value):
        return "–"
    if metric == "psnr":
        return f"{value:.1f}"
    if metric in _grade.LOWER:
        return f"{value:.2g}".replace("e-0", "e-")
    hundredfold = 100.0 * value
    if 0.0 < hundredfold < 1.0:
        return "<1"
    rounded = math.floor(hundredfold + 1e-9) if 99.0 < hundredfold < 100.0 else round(hundredfold)
    return str(rounded).replace("-", "−")


def share(value: float | None) -> str:
    """Share of the model, two significant digits: 0.0054 -> `0.54 %`."""
    if value is None:
        return "–"
    hundredfold = 100.0 * value
    if hundredfold == 0:
        return "0 %"
    if hundredfold >= 99.95:
        return "100 %"
    return f"{hundredfold:.{max(0, 1 - math.floor(math.log10(hundredfold)))}f} %"


def number(value: Any) -> str:
    """Three significant digits with thousands separators; text and lists as they are."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "∞" if value > 0 else "–"
        if value == 0:
            return "0"
        if abs(value) >= 1000:
            return f"{value:,.0f}"
        return (f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.2g}").replace("e-0", "e-")
    if isinstance(value, (list, tuple)):
        return ", ".join(number(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {number(item)}" for key, item in value.items())
    return str(value)


def seconds(value: float | None) -> str:
    """`0.034` -> `34 ms`, `12.3` -> `12 s`, `200` -> `3 min 20 s`."""
    if value is None:
        return "–"
    if value < 0.9995:
        return f"{1000 * value:.2g} ms" if value < 0.01 else f"{1000 * value:.0f} ms"
    if value < 60:
        return f"{value:.2g} s" if value >= 9.95 else f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def cpu(value: float | None) -> str:
    """CPU seconds in two digits, none below a hundredth: `0.094`, `<0.01`, `310`."""
    if value is None:
        return "–"
    return "<0.01" if value < 0.01 else f"{value:.2g}" if value < 10 else f"{value:,.0f}"


def layers(value: Any) -> str:
    """`[0]` -> `0`, `None` -> `all`, `[0, 3, 4, 5]` -> `0, 3–5`."""
    if value is None or value == []:
        return "all"
    items = value if isinstance(value, (list, tuple)) else [value]
    parts: list[list[int]] = []
    for item in items:
        if not isinstance(item, int):
            return ", ".join(str(item) for item in items)
        if parts and item == parts[-1][1] + 1:
            parts[-1][1] = item
        else:
            parts.append([item, item])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in parts)


def selection(select: Mapping[str, Any]) -> str:
    """What of a block is observed, without its layer: components or module patterns."""
    for key in ("components", "target_modules"):
        value = select.get(key)
        if value:
            return value if isinstance(value, str) else " + ".join(str(item) for item in value)
    return "all"


def seen(select: Mapping[str, Any]) -> str:
    """`{components: [attn_query], layers: [0]}` -> `one query matrix of layer 0`, as part of a sentence."""
    components, where = select.get("components") or [], select.get("layers")
    components = [components] if isinstance(components, str) else list(components)
    single = isinstance(where, (list, tuple)) and len(where) == 1 and "-" not in str(where[0])[1:]
    if len(components) == 1 and components[0] in COMPONENTS:
        what = COMPONENTS[components[0]]
        if not single and what.startswith("one "):
            what = f"the {what[4:].replace('matrix', 'matrices')}"
        if components[0] == "layer" and not single:
            what = "whole layers"
    else:
        what = selection(select)
    if what in [COMPONENTS[name] for name in _OUTSIDE] or what == "all":
        return "the whole model" if what == "all" and where is None else what
    return f"{what} of layer {layers(where)}" if single else f"{what} of layers {layers(where)}" if where else what


def labels(blocks: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """A short label for each distinct `{kind, ...}` block: the kind and the fields in which blocks of that kind differ.

    Returns:
        `key(block)` -> label.
    """
    distinct = {key(block): block for block in blocks}
    found = {}
    for name, block in distinct.items():
        kind = str(block.get("kind", "?"))
        same = [other for other in distinct.values() if other.get("kind") == block.get("kind")]
        fields = [f for f in block if f != "kind" and any(other.get(f) != block[f] for other in same)]
        if kind in ("dp_sgd", "gaussian_noise"):
            always = ("noise_multiplier",) if kind == "dp_sgd" else ("std",)
            fields = [*(f for f in always if f in block), *(f for f in fields if f not in always)]
        shown = " ".join(f"{_SHORT.get(f, f)} {number(block[f])}" for f in fields)
        if block.get("noise_multiplier") == 0:
            kind, shown = "clipping only", " ".join(part for part in shown.split(" ")[2:])
        found[name] = f"{_KINDS.get(kind, kind)} {shown}".strip()
    return found


def guarantees(privacies: Iterable[Mapping[str, Any] | None]) -> list[str]:
    """Each distinct guarantee in words: of one release, then of the training run it is a step of."""
    told: dict[str, None] = {}
    for privacy in privacies:
        words = [(privacy or {}).get("statement"), ((privacy or {}).get("training") or {}).get("statement")]
        if words[0]:
            told[" ".join(str(part) for part in words if part)] = None
    return list(told)


def is_block(value: Any) -> bool:
    """Whether a swept value is a whole `{kind: ...}` block."""
    return isinstance(value, Mapping) and "kind" in value


def key(block: Any) -> str:
    """A block as text that is equal for equal blocks, whatever the order of its keys."""
    import json

    return json.dumps(block, sort_keys=True, default=str)


def visible(text: str) -> str:
    """Control and bidirectional-override characters as visible pictures: what was recovered must not steer the page."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_picture(char) for char in text)


def _picture(char: str) -> str:
    if char == "\n":
        return "⏎"
    if char == "\t":
        return " "
    code = ord(char)
    if code < 0x20 or code == 0x7F:
        return chr(0x2400 + code) if code < 0x20 else "␡"
    if unicodedata.category(char) in ("Cs", "Cn", "Co"):
        return "\ufffd"
    # Joiners (200C, 200D) shape Persian and emoji and stay; marks that reorder their neighbours do not.
    if code in (0x200E, 0x200F, 0x061C) or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069:
        return f"⟨{code:04X}⟩"
    return char
