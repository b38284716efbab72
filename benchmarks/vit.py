"""Pictures from ONE matrix of a vision transformer: the figures of `span` and `subspace`, and what matching gets.

Every picture is a line of a JSONL file as soon as it is done, and what is in the file is not run again, so a long run
may be stopped and resumed. Nothing is granted to `span` and `subspace`; `inverting_gradients` is granted the label and
as much CPU time. Times are CPU seconds of one thread, attack only.

    python benchmarks/vit.py --cifar FOLDER --save benchmarks/results/vit.jsonl --study closed      (d - n >= p + 1)
    ... --study few        fewer equations than pixels, down to ViT-B/16 at 224 x 224 (built-in photos)
    ... --study formats    half precision and noise
    ... --study deep       block 2 and the last but one
    ... --table            prints, runs nothing

FOLDER holds train_500x10.zip and test_500x10.zip: class folders, or labels.csv. `trained`: 200 steps of batches of 16
from the untrained weights, kept under --weights.
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

from lmleak import attack, grant, load_batches, load_model, observe, score, select
from lmleak.records import Victim

CLOSED = [(192, 4, 4), (128, 4, 4), (256, 8, 4)]  #: width, pixels along a patch, blocks
FEW = [(192, 8, 4), (128, 8, 4)]
DEEP = (192, 4, 6)
TRAINED = (192, 4, 6)
TRAININGS = ("trained 1e-4", "trained 5e-4")  #: AdamW's rate; at the second the patches' inputs become nearly alike
FORMATS: list[dict[str, Any]] = [
    {"kind": "quantize", "to": "float16"},
    {"kind": "quantize", "to": "bfloat16"},
    {"kind": "gaussian_noise", "std": 1e-6},
    {"kind": "gaussian_noise", "std": 1e-5},
    {"kind": "gaussian_noise", "std": 1e-4},
]
KEYS = ("study", "model", "component", "layer", "defense", "attack", "picture")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", type=Path, required=True, help="JSONL, appended to")
    parser.add_argument("--cifar", type=Path, help="folder of the two zips")
    parser.add_argument("--weights", type=Path, default=Path("runs/vit_weights"), help="folder of trained weights")
    parser.add_argument("--study", default="closed,few,formats,deep")
    parser.add_argument("--pictures", type=int, default=20)
    parser.add_argument("--matched", type=int, default=5, help="pictures that inverting_gradients gets")
    parser.add_argument("--generous", type=int, default=500, help="steps it gets beside those of equal time")
    parser.add_argument("--only", default="", help="words that a cell must hold: trained attn_query block4")
    parser.add_argument("--table", action="store_true", help="print the tables of what is there and stop")
    asked = parser.parse_args()
    if not asked.table:
        torch.set_num_threads(1)
        asked.save.parent.mkdir(parents=True, exist_ok=True)
        for study in asked.study.split(","):
            for cell in cells(study):
                if all(word in f"{cell} block{cell[3]}" for word in asked.only.split()):
                    measure(asked, study, *cell)
    print(table(read(asked.save)))


def cells(study: str) -> Iterator[tuple[tuple[int, int, int], str, str, int, dict, str]]:
    """Shape, weights, component, layer, defense and attack."""
    none: dict[str, Any] = {"kind": "none"}
    if study == "closed":
        for weights in ("init 0.02", "init 0.1", *TRAININGS):
            for shape in [TRAINED] if weights in TRAININGS else CLOSED:
                for component in ("attn_query", "attn_key", "attn_value"):
                    yield shape, weights, component, 0, none, "span"
    if study == "few":
        for shape, weights in [(FEW[0], "init 0.02"), (FEW[1], "init 0.02")]:
            for component in ("attn_query", "attn_key", "attn_value"):
                yield shape, weights, component, 0, none, "span"
        for component in ("attn_query", "attn_key", "attn_value"):
            yield (768, 16, 12), "init 0.02", component, 0, none, "span"
    if study == "formats":
        for weights in ("init 0.02", "init 0.1", TRAININGS[0]):
            for defense in FORMATS:
                yield TRAINED if weights in TRAININGS else CLOSED[0], weights, "attn_query", 0, defense, "span"
    if study == "deep":
        for weights in ("init 0.02", *TRAININGS):
            for layer in (2, 4):
                for component in ("attn_query", "attn_value", "ffn_in"):
                    yield TRAINED if weights in TRAININGS else DEEP, weights, component, layer, none, "subspace"


def measure(
    asked: argparse.Namespace,
    study: str,
    shape: tuple[int, int, int],
    weights: str,
    component: str,
    layer: int,
    defense: dict,
    kind: str,
) -> None:
    """Picture by picture, and `inverting_gradients` on the first of them."""
    model = f"d {shape[0]}, patch {shape[1]}, {shape[2]} blocks, {weights}"
    pictures = asked.pictures if kind == "span" else min(10 if component == "attn_query" else 4, asked.pictures)
    pictures = min(4, pictures) if shape[0] == 768 else pictures
    plan = [(kind, i) for i in range(pictures)]
    if study in ("few", "deep") and component == "attn_query":
        some = min(asked.matched, pictures) if shape[0] != 768 else 1
        plan += [
            (f"inverting_gradients, {how}", i)
            for how in ("equal time", "generous")[: 1 if study == "deep" or shape[0] == 768 else 2]
            for i in range(some)
        ]
    common = {"study": study, "model": model, "component": component, "layer": layer, "defense": defense}
    lines = read(asked.save)
    done = {json.dumps([line[key] for key in KEYS]) for line in lines}
    plan = [(a, i) for a, i in plan if json.dumps([*common.values(), a, i]) not in done]
    if not plan:
        return
    victim = load(asked, shape, weights)
    source: dict[str, Any] = {"kind": "photos"}
    if shape[0] != 768:
        source = {"kind": "image_folder", "path": str(asked.cifar / "test_500x10.zip")}
    batches = load_batches(victim, limit=pictures, **source)
    chosen = select(victim, components=component, layers=layer, parameters="weight")
    for name, i in plan:
        batch = batches[i]
        seen = observe(victim, batch, chosen, defense)
        start = time.process_time()
        if name == kind:
            made = attack(seen, victim, kind)
        else:
            known = grant(victim, batch, labels=True)
            tried = lambda n: attack(seen, victim, "inverting_gradients", knowledge=known, steps=n, tv=1e-2)  # noqa: B023, E731
            tried(2)
            twice = time.process_time()
            tried(4)
            step = (time.process_time() - twice) / 4
            own = [x["cpu_s"] for x in read(asked.save) if [x[k] for k in KEYS] == [*common.values(), kind, i]]
            steps = max(2, round(own[0] / step)) if name.endswith("equal time") else asked.generous
            start = time.process_time()
            made = tried(steps)
        line = common | {"attack": name, "picture": i, "cpu_s": round(time.process_time() - start, 3)}
        values = score(made, batch.reference, ["psnr", "ssim"]) if made.images is not None else {}
        line |= {"status": made.status, "reason": made.reason, "confidence": max(made.confidence, default=0.0)}
        line |= values | {"details": dict(made.details)}
        with asked.save.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(model, component, layer, name, i, made.status, line.get("psnr"), line["cpu_s"], flush=True)


def load(asked: argparse.Namespace, shape: tuple[int, int, int], weights: str) -> Victim:
    """An untrained victim, or the one trained from it."""
    d, patch, blocks = shape
    config = {
        "hidden_size": d,
        "patch_size": patch,
        "num_hidden_layers": blocks,
        "num_attention_heads": 12 if d == 768 else 4,
        "intermediate_size": 4 * d,
        "image_size": 224 if d == 768 else 32,
        "initializer_range": 0.1 if weights == "init 0.1" else 0.02,
    }
    if weights not in TRAININGS:
        return load_model("vit", config=config, device="cpu")
    rate = weights.split()[1]
    folder = asked.weights / f"{d}_{patch}_{blocks}_{rate}"
    if not folder.exists():
        victim = load_model("vit", config=config, device="cpu")
        train(victim, asked.cifar / "train_500x10.zip", float(rate))
        victim.module.save_pretrained(folder)
    return load_model("vit", weights=str(folder), mean=[0.5] * 3, std=[0.5] * 3, device="cpu")


def train(victim: Victim, path: Path, rate: float, steps: int = 200) -> None:
    """A brief training: enough to move attention and norms away from where they began."""
    batches = load_batches(victim, "image_folder", path=str(path), batch_size=16, limit=3200, shuffle=True)
    optimizer = torch.optim.AdamW(victim.module.parameters(), lr=rate, weight_decay=0.05)
    victim.module.train()
    right = []
    for step in range(steps):
        batch = batches[step % len(batches)]
        logits = victim.module(**batch.inputs).logits
        loss = torch.nn.functional.cross_entropy(logits, batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right.append(float((logits.argmax(-1) == batch.labels).float().mean()))
        if step % 50 == 49:
            print(f"step {step + 1}: loss {float(loss):.3f}, accuracy {statistics.mean(right[-50:]):.3f}", flush=True)
    victim.module.eval()


def read(path: Path) -> list[dict]:
    """Lines so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(lines: list[dict]) -> str:
    """Markdown: a row a cell; least, median and largest PSNR of what was answered."""
    rows = [
        "| study | model | matrix | release | attack | answered | PSNR least / median / most | CPU s |",
        "|---" * 8 + "|",
    ]
    groups: dict[str, list[dict]] = {}
    for line in lines:
        groups.setdefault(json.dumps([line[key] for key in KEYS[:-1]]), []).append(line)
    for name, group in groups.items():
        study, model, component, layer, defense, kind = json.loads(name)
        values = [line["psnr"] for line in group if line.get("psnr") is not None]
        spread = f"{min(values):.1f} / {statistics.median(values):.1f} / {max(values):.1f}" if values else "-"
        release = " ".join(str(value) for value in defense.values())
        seconds = statistics.median(line["cpu_s"] for line in group)
        row = [
            study,
            model,
            f"{component} {layer}",
            release,
            kind,
            f"{len(values)}/{len(group)}",
            spread,
            f"{seconds:.2g}",
        ]
        rows.append("| " + " | ".join(row) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
