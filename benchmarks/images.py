"""Pictures by gradient matching: how good, what a step costs, and what each term of GradInversion adds.

python benchmarks/images.py --data train.zip --resnet resnet20.th                  # all parts; resumable
python benchmarks/images.py --data train.zip --resnet resnet20.th --part ablation --size 8 --batches 3

One line of JSON a unit goes to `--save`; what is there is not done again. Seconds are CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lmleak import attack, grant, load_batches, load_model, observe, score, select
from lmleak.records import Batch, Observation, Victim

LENET = {"kind": "convnet", "config": {"channels_out": [12, 12, 12, 12], "strides": [2, 2, 1, 1]}}
CONVNET = {
    "kind": "convnet",
    "config": {
        "channels_out": [64, 128, 128, 256, 256, 256, 256, 256, 256],
        "kernels": 3,
        "strides": 1,
        "paddings": 1,
        "pools": [1, 1, 1, 1, 1, 3, 1, 1, 3],
        "norm": "batch",
        "activation": "relu",
    },
}
STEPS = {"mlp": 500, "lenet": 500, "resnet20": 1000, "convnet": 200}
COUNTED = {"mlp": 30, "lenet": 120, "resnet20": 12}  #: steps timed in a turn
SOFT = {"gradient": 0.1, "tv": 0.0, "l2": 0.0, "bn": 0.0, "group": 0.0, "noise": 0.02, "warmup": 5}
FIDELITY = SOFT | {"tv": 0.05, "l2": 1e-6, "bn": 0.1}
GROUP = FIDELITY | {"group": 0.3, "group_from": 0.25, "group_every": 5}
#: What each line of the ablation turns on; all have the same seeds.
TERMS = {
    "gradient": SOFT,
    "fidelity": FIDELITY,
    "lazy": GROUP | {"consensus": "lazy"},
    "registered": GROUP | {"consensus": "registered"},
    "bn off": FIDELITY | {"bn_statistics": "off"},
    "bn exact": FIDELITY | {"bn_statistics": "exact"},
}


def model(name: str, resnet: str | None) -> Victim:
    if name == "resnet20":
        return load_model("resnet", weights=resnet, device="cpu")
    return load_model(**{"mlp": {"kind": "mlp"}, "lenet": LENET, "convnet": CONVNET}[name], device="cpu")


def batches(victim: Victim, path: str, count: int, size: int, seed: int) -> list[Batch]:
    return load_batches(victim, "image_folder", path=path, limit=count * size, batch_size=size, seed=seed)


def lean(victim: Victim, observation: Observation, labels: torch.Tensor, start: torch.Tensor) -> Iterator[None]:
    """A hand-written loop of inverting gradients, one restart: nothing that is not needed. Every item is a step."""
    module = victim.module
    parameters = list(module.parameters())
    wanted = list(observation.gradients.values())
    size = sum(g.square().sum() for g in wanted).sqrt()
    x = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.1)
    while True:
        loss = F.cross_entropy(module(x).logits, labels)
        own = torch.autograd.grad(loss, parameters, create_graph=True)
        product = sum((a * b).sum() for a, b in zip(own, wanted, strict=True))
        norm = sum(a.square().sum() for a in own).sqrt()
        rough = (x[..., 1:] - x[..., :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean()
        (slope,) = torch.autograd.grad(1 - product / (norm * size) + 1e-6 * rough, x)
        x.grad = slope.sign_()
        optimizer.step()
        with torch.no_grad():
            x.clamp_(-3, 3)
        yield


def cost(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """CPU milliseconds of a step a restart, lean and ours in turns in one process; medians of the turns."""
    victim = model(name, args.resnet)
    batch = batches(victim, args.data, 1, 1, seed=11)[0]
    seen, known = observe(victim, batch, select(victim)), grant(victim, batch, labels=True)
    start = torch.randn(batch.inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(0))
    loop, count = lean(victim, seen, batch.labels, start), COUNTED[name]

    def ours(restarts: int, steps: int) -> float:
        begun = time.process_time()
        attack(seen, victim, "inverting_gradients", knowledge=known, steps=steps, restarts=restarts)
        return time.process_time() - begun

    def plain(steps: int) -> float:
        begun = time.process_time()
        for _ in range(steps):
            next(loop)
        return time.process_time() - begun

    plain(3)
    times: dict[str, list[float]] = {"lean": [], "ours_1": [], "ours_8": []}
    for _ in range(args.turns):
        times["lean"].append(plain(count) / count)
        # Two lengths: their difference is free of what an attack does once.
        for restarts in (1, 8):
            long, short = ours(restarts, count + 2), ours(restarts, 2)
            times[f"ours_{restarts}"].append((long - short) / count / restarts)
    found = {key: 1000 * statistics.median(values) for key, values in times.items()}
    ratios = {
        f"ratio_{k}": statistics.median(o / p for o, p in zip(times[f"ours_{k}"], times["lean"], strict=True))
        for k in (1, 8)
    }
    return found | ratios


def quality(name: str, index: int, args: argparse.Namespace) -> dict[str, Any]:
    victim = model(name, args.resnet)
    batch = batches(victim, args.data, args.batches_of_one, 1, seed=11)[index]
    fields = {"steps": STEPS[name], "tv": 1e-6 if name in ("mlp", "lenet") else 1e-2, "restarts": args.restarts}
    return measured(victim, batch, "inverting_gradients", fields)


def ablation(term: str, index: int, args: argparse.Namespace) -> dict[str, Any]:
    victim = model("resnet20", args.resnet)
    batch = batches(victim, args.data, args.batches, args.size, seed=7)[index]
    return measured(victim, batch, "gradinversion", TERMS[term] | {"steps": args.steps, "seeds": args.seeds})


def measured(victim: Victim, batch: Batch, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Scores also where the attack says that it found nothing: then of its best candidate."""
    from dataclasses import replace

    known = grant(victim, batch, labels=True, bn_statistics=fields.get("bn_statistics") == "exact")
    seen = observe(victim, batch, select(victim))
    begun = time.process_time()
    found = attack(seen, victim, kind, knowledge=known, seed=batch.index, **fields)
    seconds = time.process_time() - begun
    said = {"status": found.status, "confidence": list(found.confidence)[:1]}
    details = {key: found.details[key] for key in ("cosine", "objective", "shifts") if key in found.details}
    return score(replace(found, status="ok"), batch.reference, ("psnr", "ssim")) | said | details | {"seconds": seconds}


def plan(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Any]]:
    """What is to be measured: a key, and how."""
    if args.part in ("all", "cost"):
        for name in COUNTED:
            yield {"part": "cost", "model": name}, lambda name=name: cost(name, args)
    if args.part in ("all", "quality"):
        for name in args.models:
            for i in range(args.batches_of_one):
                key = {"part": "quality", "model": name, "steps": STEPS[name], "image": i, "restarts": args.restarts}
                yield key, lambda name=name, i=i: quality(name, i, args)
    if args.part in ("all", "ablation"):
        for i in range(args.batches):
            for term in TERMS:
                key = {"part": "ablation", "size": args.size, "term": term, "batch": i}
                yield key | {"steps": args.steps, "seeds": args.seeds}, lambda term=term, i=i: ablation(term, i, args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="CIFAR pictures: a folder or zip as data kind image_folder reads it")
    parser.add_argument("--resnet", help="checkpoint of a trained ResNet-20")
    parser.add_argument("--part", choices=("all", "cost", "quality", "ablation"), default="all")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--batches-of-one", type=int, default=10)
    parser.add_argument("--restarts", type=int, default=1, help="of the attack, where its quality is measured")
    parser.add_argument("--models", nargs="+", choices=tuple(STEPS), default=list(STEPS), help="whose quality")
    parser.add_argument("--size", type=int, default=4, help="pictures a batch of the ablation")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--save", default=Path(__file__).parent / "results" / "images.jsonl", type=Path)
    args = parser.parse_args()
    rows = args.save.read_text().splitlines() if args.save.exists() else []
    lines = [{"restarts": 1} | json.loads(row) for row in rows]
    torch.set_num_threads(1)
    for key, do in plan(args):
        if any(key.items() <= line.items() for line in lines):
            continue
        line = key | do()
        with args.save.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)


if __name__ == "__main__":
    main()
