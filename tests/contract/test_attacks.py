"""What every attack promises; a new file in lmleak/attacks is picked up by itself.

A file states `EXAMPLE`: a case so easy that it must beat chance. `fields` of its Config, `select` as in a recipe,
`knowledge` that it is granted, `batch_size`, and optionally `model`, the `load_model` fields of another victim, and
`answer: labels` or `answer: images` where it returns those and no text; `model` is then an image model's, complete.
"""

from __future__ import annotations

import ast
import inspect
import json
import math
import random
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import lmleak
from lmleak import attack, grant, load_batches, load_model, observe, registry, select
from lmleak.records import Batch, Knowledge, Observation, Reconstruction, Reference, Victim

KINDS = registry.kinds("attacks")
# Weights at five times the usual initial scale: attention that attends, as in a trained model; 259 tokens, 14 places.
MODEL = {
    "kind": "bert",
    "weights": "random",
    "tokenizer": "bytes",
    "config": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
    },
    "device": "cpu",
}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def example(kind: str) -> dict:
    return registry.load("attacks", kind).EXAMPLE


def victim_for(kind: str, mode: str = "eval") -> Victim:
    """A victim of its own for every test: some of them leave marks on it on purpose."""
    own = example(kind).get("model", {})
    return load_model(**(own | {"device": "cpu"} if pictures(kind) else MODEL | own), mode=mode)


def pictures(kind: str) -> bool:
    return example(kind).get("answer") == "images"


def easy(kind: str, victim: Victim) -> tuple[Observation, Knowledge, Batch]:
    asked = example(kind)
    source = {"kind": "photos"} if pictures(kind) else {"kind": "sample", "max_length": 14}
    batch = load_batches(victim, **source, limit=asked["batch_size"], batch_size=asked["batch_size"])[0]
    return observe(victim, batch, select(victim, **asked["select"])), grant(victim, batch, **asked["knowledge"]), batch


def run(kind: str, victim: Victim, seen: Observation, known: Knowledge, seed: int = 0, **more) -> Reconstruction:
    return attack(seen, victim, kind, knowledge=known, seed=seed, **example(kind)["fields"], **more)


@cache
def answer(kind: str) -> tuple[Reconstruction, Batch]:
    victim = victim_for(kind)
    seen, known, batch = easy(kind, victim)
    return run(kind, victim, seen, known), batch


def overlap(found, truth) -> float:
    """Shared tokens over all sentences, as F1; order does not count, so that bags of words have their chance too."""
    shared = sum((Counter(a) & Counter(b)).total() for a, b in zip(found, truth, strict=True))
    return 2 * shared / max(1, sum(map(len, found)) + sum(map(len, truth)))


def chance(truth, vocabulary: int) -> float:
    """The best of 200 random guesses of the right lengths."""
    draw = random.Random(0)
    return max(overlap([[draw.randrange(vocabulary) for _ in row] for row in truth], truth) for _ in range(200))


def closeness(images: torch.Tensor, truth: torch.Tensor) -> float:
    """PSNR in dB of one picture, or of several in their order."""
    return -10 * math.log10(max(float((images.double() - truth.double()).square().mean()), 1e-15))


def gamble(truth: torch.Tensor) -> float:
    """The best of grey, of every channel's true mean, and of 200 pictures of noise."""
    draw = torch.Generator().manual_seed(0)
    guesses = [torch.full_like(truth, 0.5), truth.mean((2, 3), keepdim=True).expand_as(truth)]
    guesses += [torch.rand(truth.shape, generator=draw) for _ in range(200)]
    return max(closeness(guess, truth) for guess in guesses)


def right(kind: str, result: Reconstruction, batch: Batch) -> bool:
    if example(kind).get("answer") == "labels":
        return sorted(result.labels) == sorted(batch.reference.labels)
    if pictures(kind):
        return closeness(result.images, batch.reference.images) > gamble(batch.reference.images)
    truth = batch.reference.tokens
    return overlap(result.tokens, truth) > chance(truth, len(victim_for(kind).processor))


def refused(result: Reconstruction) -> bool:
    said = result.texts or result.labels
    return result.status in ("not_applicable", "no_signal") and bool(result.reason) and not said


def noise(seen: Observation, seed: int = 0) -> Observation:
    draw = torch.Generator().manual_seed(seed)
    return replace(seen, gradients={k: torch.randn(g.shape, generator=draw) for k, g in seen.gradients.items()})


@pytest.mark.parametrize("kind", KINDS)
def test_states_itself(kind):
    module = registry.load("attacks", kind)
    config = module.Config.model_config
    assert config["extra"] == "forbid"
    assert config["frozen"]
    assert set(example(kind)) - {"model", "answer"} == {"fields", "select", "knowledge", "batch_size"}
    source = registry.summary("attacks", kind)
    assert any(part[:4].isdigit() and "." in part for part in source.replace(")", " ").split()), "cites no arXiv id"


@pytest.mark.parametrize("kind", KINDS)
def test_beats_chance_on_its_easy_case(kind):
    result, batch = answer(kind)
    assert result.status == "ok", result.reason
    assert len(result.tokens) == len(result.texts)
    said = result.images if pictures(kind) else result.labels or result.texts
    assert len(said) == len(batch.labels)
    assert right(kind, result, batch)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_plain_data_without_special_tokens(kind):
    result, _ = answer(kind)
    if pictures(kind):
        assert result.images.dtype == torch.float32
        assert 0 <= result.images.min() <= result.images.max() <= 1
    else:
        special = set(victim_for(kind).processor.all_special_ids)
        assert all(type(token) is int and token not in special for row in result.tokens for token in row)
    assert len(result.confidence) == len(result.images if pictures(kind) else result.texts)
    assert all(type(value) is float and 0 <= value <= 1 for value in result.confidence)
    json.dumps(dict(result.details), allow_nan=False)


@pytest.mark.parametrize("kind", KINDS)
def test_is_deterministic_and_leaves_the_model_the_observation_and_every_generator_as_they_were(kind):
    victim = victim_for(kind)
    seen, known, _ = easy(kind, victim)
    module = victim.module
    # Marks that a careless clean-up would wipe: a hook, a frozen parameter, a gradient, one block in training mode.
    called = []
    module.register_forward_hook(lambda *_: called.append(1))
    first, second, *_ = module.parameters()
    first.requires_grad_(False)
    second.grad = torch.ones_like(second)
    next(m for m in module.modules() if isinstance(m, torch.nn.Linear)).train()

    def state() -> tuple:
        return (
            [(m.training, *(list(getattr(m, name)) for name in HOOKS)) for m in module.modules()],
            [(p.requires_grad, None if p.grad is None else p.grad.sum().item()) for p in module.parameters()],
            torch.random.get_rng_state().tolist(),
            str(np.random.get_state()),
            random.getstate(),
            (torch.is_grad_enabled(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()),
        )

    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    gradients = {name: tensor.clone() for name, tensor in seen.gradients.items()}
    facts = replace(seen, gradients={})
    before = state()
    said: list[str] = []
    result = run(kind, victim, seen, known, progress=said.append)
    assert state() == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())
    assert list(gradients) == list(seen.gradients)
    assert all(torch.equal(tensor, gradients[name]) for name, tensor in seen.gradients.items())
    assert replace(seen, gradients={}) == facts
    assert all(isinstance(line, str) for line in said)
    # The other run of the same seed was on another copy of the model, without the marks.
    again = answer(kind)[0]
    assert torch.equal(result.images, again.images) if pictures(kind) else result == again
    assert replace(result, images=None) == replace(again, images=None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granted", [False, True], ids=["nothing granted", "as in the example"])
def test_refuses_what_holds_nothing(kind, granted):
    victim = victim_for(kind)
    seen, known, batch = easy(kind, victim)
    known = known if granted else Knowledge()
    zero = replace(seen, gradients={name: torch.zeros_like(tensor) for name, tensor in seen.gradients.items()})
    assert refused(run(kind, victim, zero, known))
    assert refused(run(kind, victim, replace(seen, gradients={}, entries=()), known))
    if not granted:
        # One norm's bias: no row space, no embedding, no rank.
        # A picture's model may have no norm; and where the labels cannot be read nothing can be sought.
        where = {"layers": [0]} if pictures(kind) else {"components": ["norm"], "layers": [-1]}
        bias = observe(victim, batch, select(victim, **where, parameters="bias"))
        assert refused(run(kind, victim, bias, known))


@pytest.mark.parametrize("kind", KINDS)
def test_does_not_take_noise_for_a_sentence(kind):
    victim = victim_for(kind)
    seen, known, _ = easy(kind, victim)
    for seed in range(3):
        assert refused(run(kind, victim, noise(seen, seed), Knowledge()))
    # What is granted may leave nothing to tell noise by; then the attack must not be sure of its answer.
    result = run(kind, victim, noise(seen), known)
    assert refused(result) or max(result.confidence) < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_refuses_a_client_with_dropout_or_reads_it_all_the_same(kind):
    victim = victim_for(kind, mode="train")
    seen, known, batch = easy(kind, victim)
    assert seen.mode == "train"
    result = run(kind, victim, seen, known)
    assert refused(result) or right(kind, result, batch)


@pytest.mark.parametrize("kind", KINDS)
def test_takes_no_batch(kind):
    expected = ["config", "observation", "knowledge", "victim", "generator"]
    parameters = inspect.signature(registry.load("attacks", kind).attack).parameters
    assert list(parameters)[:5] == expected
    assert set(parameters) - set(expected) <= {"progress"}


def test_no_file_of_the_room_knows_the_private_records():
    names = {Batch.__name__, Reference.__name__}
    for path in (Path(lmleak.__file__).parent / "attacks").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("lmleak.data"), path.name
                assert not names & {alias.name for alias in node.names}, path.name
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("lmleak.data") for alias in node.names), path.name
