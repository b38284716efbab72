"""What factored gradients save in gradient matching, against the usual loop: BERT-base shape, 12 tokens, one thread.

Both sides see the same candidates, the same observed gradient and the same cosine objective:

* the loop: for every candidate, `autograd.grad` of its loss with `create_graph=True`, the objective on dense gradients,
  and (in a step) the gradient of the objective with respect to the embeddings;
* the factored side: `lmleak.attacks._objective.Objective`, all candidates in one forward and one (double) backward, or
  in three plain ones (`derivative: finite_difference`, as fused attention needs).

They run in one process, in turn, the order changing every round; times are CPU seconds, medians over the rounds. Peak
memory (Linux) is that of a fresh process for each side, above model and observation.

    python benchmarks/matching.py --save benchmarks/results/matching.txt        (about 12 CPU minutes)
    python benchmarks/matching.py --rounds 1 --select attn_query                (about 1)
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lmleak import registry
from lmleak.attacks._objective import Layout, Objective, frozen
from lmleak.gradients import observe, select
from lmleak.records import Batch, Observation, Reference, Victim

TOKENS = 12
RESTARTS, CANDIDATES = 8, 32
SELECTIONS = {
    "encoder": ("all 72 encoder linears", {"target_modules": r".*encoder\.layer\..*(query|key|value|dense)"}),
    "noisy": ("the same under noise", {"target_modules": r".*encoder\.layer\..*(query|key|value|dense)"}),
    "layer": ("the 6 linears of layer 0", {"target_modules": r".*encoder\.layer\.0\..*(query|key|value|dense)"}),
    "attn_query": ("query of layer 0", {"components": ["attn_query"], "layers": 0}),
}
TARGETS = {("encoder", "step"): 6.0, ("attn_query", "step"): 2.0, ("encoder", "score"): 5.0}


def build() -> Victim:
    """BERT-base with random weights, eager attention (fused attention has no double backward)."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    module = BertForSequenceClassification._from_config(BertConfig(), attn_implementation="eager")
    return Victim(module.eval(), None, registry.load("models", "bert"), "bert", "sequence-classification", "random")


def client(victim: Victim, name: str) -> Observation:
    """The gradient of one sentence of 12 tokens at the selected weights."""
    ids = torch.randint(1000, 30000, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(TOKENS)[None],
    }
    batch = Batch(inputs, torch.tensor([1]), Reference(labels=(1,)))
    # A clean gradient of 12 tokens has rank 12, which the factored side makes use of; a noised one has full rank.
    defense = {"kind": "gaussian_noise", "std": 1e-3} if name == "noisy" else None
    return observe(victim, batch, select(victim, parameters="weight", **SELECTIONS[name][1]), defense)


def draw(victim: Victim, count: int) -> tuple[Tensor, Tensor]:
    """Candidates as random embeddings of the size of real ones, [k, 1, s, d], and their labels [k, 1]."""
    table = victim.module.get_input_embeddings().weight
    shape = (count, 1, TOKENS, table.shape[1])
    embeds = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * table.detach().std()
    return embeds, torch.ones(count, 1, dtype=torch.long)


def accurate(gradient: Tensor) -> Tensor:
    """Norm by pairwise summation. `norm()` is the faster one but on a CPU in float32 is off by 1e-4 at 2.4 M values."""
    return gradient.square().sum().sqrt()


def loop(
    victim: Victim,
    observation: Observation,
    embeds: Tensor,
    labels: Tensor,
    *,
    step: bool,
    graph: bool = True,
    norm: Callable[[Tensor], Tensor] = Tensor.norm,
) -> tuple[Tensor, Tensor | None]:
    """The usual way, one candidate at a time: values [k] and, in a step, their gradients [k, 1, s, d]."""
    parameters = [victim.module.get_parameter(entry.parameter) for entry in observation.entries]
    targets = list(observation.gradients.values())
    values, moves = [], []
    for row, label in zip(embeds, labels, strict=True):
        x = row.detach().clone().requires_grad_(step)
        loss = victim.module(inputs_embeds=x, labels=label).loss
        grads = torch.autograd.grad(loss, parameters, create_graph=graph)
        value = sum(1 - (g * t).sum() / (norm(g) * norm(t)) for g, t in zip(grads, targets, strict=True))
        value = value / len(targets)
        values.append(value.detach())
        if step:
            moves.append(torch.autograd.grad(value, x)[0])
    return torch.stack(values), torch.stack(moves) if step else None


def factored(
    victim: Victim, objective: Objective, embeds: Tensor, labels: Tensor, *, step: bool
) -> tuple[Tensor, Tensor | None]:
    """lmleak's way, all candidates at once."""
    with frozen(victim.module):
        if not step:
            return objective.scored(embeds, labels), None
        x = embeds.detach().clone().requires_grad_()
        values = objective(x, labels, create_graph=True)
        (moves,) = torch.autograd.grad(values.sum(), x)
    return values.detach(), moves


def plain(victim: Victim, objective: Objective, embeds: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """lmleak's step without a double backward."""
    with frozen(victim.module):
        return objective.slope(embeds, labels, "finite_difference")


def sides(victim: Victim, name: str, task: str) -> dict[str, Callable[[], tuple[Tensor, Tensor | None]]]:
    """What is timed, by name."""
    observation = client(victim, name)
    objective = Objective(victim, observation, Layout((TOKENS,)), "cosine")
    embeds, labels = draw(victim, RESTARTS if task == "step" else CANDIDATES)
    step = task == "step"
    both = {
        "loop": lambda: loop(victim, observation, embeds, labels, step=step),
        "factored": lambda: factored(victim, objective, embeds, labels, step=step),
    }
    if step:
        # Three plain gradients instead of a double backward, as fused attention needs.
        both["finite difference"] = lambda: plain(victim, objective, embeds, labels)
    both["truth"] = lambda: loop(victim, observation, embeds, labels, step=step, norm=accurate)
    if not step:
        # A loop that is written with care needs no graph to score; the published attacks build one.
        both["loop without graph"] = lambda: loop(victim, observation, embeds, labels, step=False, graph=False)
    return both


def compare(victim: Victim, name: str, task: str, rounds: int) -> dict:
    """CPU seconds of every side (median over rounds) and the largest difference between their answers."""
    both = sides(victim, name, task)
    truth = both.pop("truth")()
    answer = both["factored"]()
    seconds: dict[str, list[float]] = {side: [] for side in both}
    for turn in range(rounds):
        for side in sorted(both, reverse=turn % 2 == 1):
            begun = time.process_time()
            both[side]()
            seconds[side].append(time.process_time() - begun)
    (values, moves), (slow_values, slow_moves) = answer, truth
    return {
        "seconds": {side: statistics.median(times) for side, times in seconds.items()},
        # Of sides timed next to each other: what else runs on the machine slows both.
        "ratio": {
            side: statistics.median(slow / fast for slow, fast in zip(times, seconds["factored"], strict=True))
            for side, times in seconds.items()
        },
        "value difference": float((values - slow_values).abs().max()),
        # Relative to each candidate's own gradient: what an optimiser's step would differ by.
        "gradient difference": None
        if moves is None
        else float(((moves - slow_moves).flatten(1).norm(dim=1) / slow_moves.flatten(1).norm(dim=1)).max()),
    }


@cache
def peak(name: str, task: str, side: str) -> float:
    """MiB that one side needs above model and observation, in a process of its own."""
    command = [sys.executable, __file__, "--memory", json.dumps([name, task, side])]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure_memory(name: str, task: str, side: str) -> None:
    run = sides(build(), name, task)[side]
    # Pages that building the model left free would hide as many of this side's.
    ctypes.CDLL(None).malloc_trim(0)
    # Not getrusage: its maximum is handed down from the parent process and cannot be reset.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run()
    print((resident("VmHWM") - before) / 1024)


def resident(field: str) -> int:
    """KiB, from Linux's account of this process: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--select", nargs="+", choices=SELECTIONS, default=list(SELECTIONS))
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory:
        return measure_memory(*json.loads(args.memory))
    lines = [
        "$ python " + " ".join(["benchmarks/matching.py", *sys.argv[1:]]),
        f"torch {torch.__version__}, {platform.machine()}, one thread, BERT-base shape, {TOKENS} tokens, float32; "
        f"CPU seconds, medians of {args.rounds} rounds",
        "",
        f"{'observed':24}{'task':14}{'loop':>9}{'factored':>10}{'ratio':>7}{'target':>8}{'difference':>12}"
        + ("" if args.no_memory else f"{'loop MiB':>10}{'fact. MiB':>11}"),
    ]
    print(*lines, sep="\n", flush=True)
    victim = build()
    for name in args.select:
        for task, count in (("step", RESTARTS), ("score", CANDIDATES)):
            found = compare(victim, name, task, args.rounds)
            fast = found["seconds"].pop("factored")
            for side, slow in found["seconds"].items():
                target = TARGETS.get((name, task)) if side == "loop" else None
                difference = found["gradient difference" if task == "step" else "value difference"]
                line = (
                    f"{SELECTIONS[name][0]:24}{f'{task} K={count}':14}{slow / count:9.4f}{fast / count:10.4f}"
                    f"{found['ratio'][side]:6.1f}x{f'{target:.0f}x' if target else '':>8}{difference:12.1e}"
                )
                if not args.no_memory:
                    line += f"{peak(name, task, side):10.0f}{peak(name, task, 'factored'):11.0f}"
                lines.append(line + (f"  ({side})" if side != "loop" else ""))
                print(lines[-1], flush=True)
    lines += [
        "",
        "Seconds are for one restart or candidate; the ratio is the median of the rounds' own. Difference: of a step's",
        "gradient, relative, the worst restart; of a score, absolute. MiB: peak above model (418) and observation.",
    ]
    print(*lines[-3:], sep="\n")
    if args.save:
        args.save.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
