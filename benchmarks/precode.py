"""PRECODE on its own demonstration network: four attackers, and what the defense costs in accuracy.

An MLP 3072-1024-1024-10 with drawn weights, one CIFAR-10 picture, label granted; the same pictures and draws for
everybody. Every answer is a line of a JSONL file as soon as it is there, and is not sought again.

    python benchmarks/precode.py --save precode.jsonl --pictures test_500x10.zip
    python benchmarks/precode.py --save precode.jsonl --mnist t10k-images-idx3-ubyte.gz
    python benchmarks/precode.py --save precode.jsonl --table                                (prints, runs nothing)
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import torch
from attacks import append, read

from lmleak import attack, grant, load_batches, load_model, observe, score, select
from lmleak.defenses import install
from lmleak.records import Victim
from lmleak.seeds import derive

PRECODE = {"kind": "precode"}
MATCHING = {"kind": "inverting_gradients", "steps": 500, "lr": 0.1}
#: Name -> whether the model is defended, what is observed, and the attack.
ATTACKERS = {
    "no defense": (False, {}, MATCHING),
    "all gradients": (True, {}, MATCHING),
    "before the bottleneck": (True, {"layers": [0, 1]}, MATCHING),
    "noise solved": (True, {}, MATCHING | {"noise": "solved"}),
    "analytic": (True, {"layers": [0]}, {"kind": "analytic"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, required=True, help="JSONL, appended to")
    parser.add_argument("--pictures", help="folder or zip of CIFAR-10 pictures in class folders: the attacks")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--mnist", help="an images-idx3 file: the accuracy of trained models")
    parser.add_argument("--seeds", type=int, default=3, help="trainings with and without the defense")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.pictures and not asked.table:
        attacks(asked)
    if asked.mnist and not asked.table:
        trainings(asked)
    print(table(read(asked.save)))


def attacks(asked: argparse.Namespace) -> None:
    plain = load_model("mlp", device="cpu")
    victims = {True: install(plain, PRECODE), False: plain}
    batches = load_batches(plain, "image_folder", path=asked.pictures, limit=asked.count)
    known = {(line["attacker"], line["picture"]) for line in read(asked.save) if "attacker" in line}
    for batch in batches:
        for name, (defended, chosen, fields) in ATTACKERS.items():
            if (name, batch.index) in known:
                continue
            victim, defense = victims[defended], PRECODE if defended else None
            seen = observe(victim, batch, select(victim, **chosen), defense, seed=derive(0, "observe", batch.index))
            start = time.process_time()
            made = attack(seen, victim, knowledge=grant(victim, batch, labels=True), seed=batch.index, **fields)
            line = {"attacker": name, "picture": batch.index, "status": made.status}
            # What is refused is no answer: SSIM 0, 0 dB.
            values = score(made, batch.reference, ["psnr", "ssim"])
            line |= {key: value or 0.0 for key, value in values.items()}
            line |= {"cpu": round(time.process_time() - start, 2)}
            append(asked.save, line)
            print(json.dumps(line), flush=True)


def trainings(asked: argparse.Namespace) -> None:
    """8,000 digits to train on, 2,000 to test: AdamW, batches of 64. Defended models draw in the test, too."""
    known = {(line["model"], line["seed"]) for line in read(asked.save) if "model" in line}
    for seed in range(asked.seeds):
        for name in ("plain", "PRECODE"):
            if (name, seed) in known:
                continue
            victim = load_model("mlp", seed=seed, config={"channels": 1, "image_size": 28}, device="cpu")
            if name == "PRECODE":
                victim = install(victim, PRECODE, seed)
            batches = load_batches(victim, "idx", path=asked.mnist, batch_size=1000, shuffle=True)
            start = time.process_time()
            accuracy = trained(victim, batches, asked.epochs, seed)
            line = {"model": name, "seed": seed, "epochs": asked.epochs, "accuracy": accuracy}
            append(asked.save, line | {"cpu": round(time.process_time() - start, 1)})
            print(json.dumps(line), flush=True)


def trained(victim: Victim, batches: list, epochs: int, seed: int) -> float:
    """Test accuracy after the last epoch."""
    from lmleak.gradients.losses import forward, model_losses

    pixels = torch.cat([batch.inputs["pixel_values"] for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    module, size = victim.module, 8000
    for part in module.modules():
        if hasattr(part, "noise_seed"):
            part.noise_seed = None  # another draw at every step
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.0)
    module.train()
    for _ in range(epochs):
        for rows in torch.randperm(size).split(64):
            losses = model_losses(module, {"pixel_values": pixels[rows]}, labels[rows], victim.task, "mean")
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
    module.eval()
    with torch.no_grad():
        found = forward(module, {"pixel_values": pixels[size:]}).argmax(1)
    return float((found == labels[size:]).double().mean())


def table(lines: list[dict]) -> str:
    out = ["attacker                 pictures  SSIM mean (least, most)   PSNR dB mean (least, most)   CPU s"]
    groups = defaultdict(list)
    for line in lines:
        groups[line.get("attacker") or line["model"]].append(line)
    for name in ATTACKERS:
        own = groups.pop(name, [])
        if not own:
            continue
        ssim, psnr = ([line[key] for line in own] for key in ("ssim", "psnr"))
        spread = f"{mean(ssim):6.3f} ({min(ssim):.3f}, {max(ssim):.3f})"
        decibels = f"{mean(psnr):6.1f} ({min(psnr):.1f}, {max(psnr):.1f})"
        out.append(f"{name:<24} {len(own):>8}  {spread:<24}  {decibels:<26}  {mean(x['cpu'] for x in own):5.1f}")
    for name, own in groups.items():
        rates = [100 * line["accuracy"] for line in own]
        more = f" (standard deviation {stdev(rates):.2f})" if len(rates) > 1 else ""
        out.append(
            f"MNIST, {name}: {mean(rates):.2f} % of 2,000{more}, {len(rates)} trainings of {own[0]['epochs']} epochs"
        )
    return "\n".join(out)


if __name__ == "__main__":
    main()
