"""Each component of a GPT-2 alone: exact match, CPU seconds and peak memory of `prefix`, one line of JSON a batch.

    python benchmarks/prefix.py --data cola.tsv --tokenizer FOLDER --limit 5 --out prefix.jsonl           # GPT-2 small
    python benchmarks/prefix.py --data cola.tsv --weights FOLDER --layers 0 1 2 --out prefix.jsonl        # trained

A line that is already in --out is not run again; --table prints what is there.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections import defaultdict
from pathlib import Path

COMPONENTS = ("attn_query", "attn_key", "attn_value", "attn_qkv", "attn_output", "ffn_in", "ffn_out")


def main() -> None:
    """Runs what is missing, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CoLA tsv")
    parser.add_argument("--weights", default="random")
    parser.add_argument("--tokenizer", help="folder; for random weights")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 5, 10])
    parser.add_argument("--components", nargs="+", default=list(COMPONENTS))
    parser.add_argument("--tasks", nargs="+", default=["sequence-classification", "causal-lm"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--limit", type=int, default=1, help="batches a cell")
    parser.add_argument("--max-candidates", type=int, default=3_000_000)
    parser.add_argument("--prior", help="text file whose frequent words are tried first")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    if not options.table:
        run(options, done)
    table(done)


def run(options: argparse.Namespace, done: list[dict]) -> None:
    """Appends a line for every (task, batch size, layer, component, batch) that has none."""
    import torch

    from lmleak.attacks import attack
    from lmleak.data import load_batches
    from lmleak.gradients import observe, select
    from lmleak.metrics import score
    from lmleak.models import load_model

    torch.set_num_threads(1)
    seen = {(*line["cell"], line["batch"]) for line in done}
    for task in options.tasks:
        victim = load_model("gpt2", weights=options.weights, tokenizer=options.tokenizer, task=task, device="cpu")
        for b in options.batch_sizes:
            batches = load_batches(
                victim, "cola", path=options.data, max_tokens=16, batch_size=b, limit=b * options.limit
            )
            for layer in options.layers:
                for component in options.components:
                    selection = select(victim, components=[component], layers=[layer], parameters="weight")
                    for batch in batches:
                        cell = (Path(options.weights).name, task, b, layer, component)
                        if (*cell, batch.index) in seen:
                            continue
                        observation = observe(victim, batch, selection)
                        start = time.process_time()
                        fields = {"max_candidates": options.max_candidates, "prior": options.prior}
                        result = attack(observation, victim, "prefix", **fields)
                        line = {
                            "cell": cell,
                            "batch": batch.index,
                            "tokens": sum(map(len, batch.reference.tokens)),
                            "status": result.status,
                            "reason": result.reason,
                            "exact": score(result, batch.reference)["exact_match"] if result.status == "ok" else None,
                            "cpu": time.process_time() - start,
                            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                            **result.details,
                        }
                        done.append(line)
                        with options.out.open("a") as out:
                            out.write(json.dumps(line) + "\n")


def table(lines: list[dict]) -> None:
    """A row a cell: batches, exact match where answered, CPU seconds a sentence, candidates a second, peak memory."""
    cells = defaultdict(list)
    for line in lines:
        cells[tuple(line["cell"])].append(line)
    print("| weights | task | B | layer | component | n | answered | exact | CPU s a sentence | cand/s | peak MB |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for (weights, task, b, layer, component), group in cells.items():
        answered = [line for line in group if line["status"] == "ok"]
        exact = f"{sum(line['exact'] for line in answered) / len(answered):.2f}" if answered else group[0]["status"]
        cpu = sum(line["cpu"] for line in group) / len(group)
        speed = sum(line.get("candidates", 0) for line in group) / max(sum(line["cpu"] for line in group), 1e-9)
        peak = max(line["peak_mb"] for line in group)
        print(
            f"| {Path(weights).name} | {task} | {b} | {layer} | {component} | {len(group)} | {len(answered)} | {exact} "
            f"| {cpu / b:.1f} | {speed:.0f} | {peak:.0f} |"
        )


if __name__ == "__main__":
    main()
