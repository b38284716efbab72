"""prefix under noise: its likelihood against plain decompositions, its answers, its silence on strange gradients."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from lmleak.attacks import attack
from lmleak.attacks._evidence import SURE, Evidence, edge, noise_level, rounding
from lmleak.data import load_batches
from lmleak.gradients import observe, select
from lmleak.models import load_model

LINEAR = ["attn_qkv", "attn_output", "ffn_in", "ffn_out"]


def _gradient(out=48, d=32, rows=4, std=1e-3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, d, generator=draw, dtype=torch.float64)
    clean = torch.randn(rows, out, generator=draw, dtype=torch.float64).T @ x
    return clean + std * torch.randn(out, d, generator=draw, dtype=torch.float64), x


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (200, 60)])
def test_the_noise_level_and_the_rank_follow_from_the_spectrum(shape):
    gradient, _ = _gradient(*shape, rows=4, std=0.01)
    variance, rank = noise_level(torch.linalg.svdvals(gradient).square(), *shape)
    assert rank == 4
    assert variance**0.5 == pytest.approx(0.01, rel=0.1)


def test_pure_noise_rarely_rises_above_its_edge():
    draw = torch.Generator().manual_seed(0)
    above = [
        float(torch.linalg.matrix_norm(torch.randn(60, 40, generator=draw), 2)) ** 2 > edge(60, 40) for _ in range(200)
    ]
    assert sum(above) <= 2


@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
def test_the_cost_of_a_row_is_what_a_decomposition_says_it_costs(shape):
    """The slow twin forces x into the rows: energy along x plus the best r - 1 directions of the rest, against r."""
    gradient, x = _gradient(*shape, std=1e-3)
    evidence = Evidence(gradient)
    rows = evidence.start()
    draw = torch.Generator().manual_seed(1)
    # Near rows: far ones reach the weakest direction, where both say the same for another reason.
    candidates = x + 2e-4 * torch.randn(x.shape, generator=draw, dtype=torch.float64)
    slow = []
    for one in candidates:
        unit = one / one.norm()
        rest = torch.linalg.svdvals(gradient - torch.outer(gradient @ unit, unit)).square()[:3].sum()
        whole = torch.linalg.svdvals(gradient).square()[:4].sum()
        slow.append(float(whole - (gradient @ unit).square().sum() - rest) / evidence.noise)
    fast = evidence.cost(rows, candidates) + shape[1] - 4
    assert fast.tolist() == pytest.approx(slow, rel=0.1)


def test_settled_rows_are_gone_and_screening_sorts_as_the_cost_does():
    gradient, x = _gradient(rows=6)
    evidence = Evidence(gradient)
    rows = evidence.settle(evidence.settle(evidence.start(), x[0]), x[3])
    assert len(rows.basis) == 4
    assert float((rows.basis @ torch.stack([x[0], x[3]]).T).abs().max()) < 1e-2
    wrong = torch.randn(40, x.shape[1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    both = torch.cat([x[[1]], wrong])
    assert int(evidence.screen(rows, both.float()).argmin()) == int(evidence.cost(rows, both).argmin()) == 0
    assert float(evidence.cost(rows, both)[0]) < evidence.tolerance < float(evidence.cost(rows, both)[1:].min())


def test_screening_in_float32_finds_the_last_row_under_little_noise():
    """Inputs of a model are alike: what one has of its own is small beside them, and the noise smaller still."""
    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    shared = 20 * normal(1, 256)
    x, wrong = shared + normal(12, 256), shared + normal(500, 256)
    evidence = Evidence(normal(12, 300).T @ x / 10 + 1e-5 * normal(300, 256))
    rows = evidence.start()
    for one in x[:-1]:
        rows = evidence.settle(rows, one)
    both = torch.cat([x[-1:], wrong])
    costs = evidence.screen(rows, both.float())
    assert len(rows.basis) == 1
    assert int(evidence.cost(rows, both).argmin()) == int(costs.argmin()) == 0
    assert float(costs[0]) < 0.5 * float(costs[1:].min())


def _batch(victim, tmp_path, text):
    path = tmp_path / "texts.tsv"
    path.write_text(f"text\tlabel\n{text}\t1\n")
    return load_batches(victim, "local", path=str(path), text_column="text", label_column="label")[0]


@pytest.fixture(scope="module")
def wide():
    """Widths that leave the noise room: 20 tokens of 96 dimensions."""
    config = {"n_embd": 96, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.1}
    return {
        task: load_model("gpt2", weights="random", tokenizer="bytes", task=task, config=config, device="cpu")
        for task in ("sequence-classification", "causal-lm")
    }


@pytest.mark.parametrize("task", ["sequence-classification", "causal-lm"])
@pytest.mark.parametrize("layers", [[0], [1], [0, 1]])
def test_noise_on_one_or_more_layers(wide, tmp_path, task, layers):
    batch = _batch(wide[task], tmp_path, "Rain on Oslo.")
    selection = select(wide[task], components=LINEAR, layers=layers, parameters="weight")
    observation = observe(wide[task], batch, selection, defense={"kind": "gaussian_noise", "std": 1e-3})
    result = attack(observation, wide[task], "prefix")
    assert (result.status, result.tokens) == ("ok", batch.reference.tokens)
    assert result.confidence[0] > 0.5


def test_noise_that_hides_everything_is_no_signal(wide, tmp_path):
    victim = wide["sequence-classification"]
    selection = select(victim, components=LINEAR, layers=[0], parameters="weight")
    batch = _batch(victim, tmp_path, "Rain on Oslo.")
    observation = observe(victim, batch, selection, defense={"kind": "gaussian_noise", "std": 1e3})
    result = attack(observation, victim, "prefix")
    assert (result.status, result.tokens) == ("no_signal", ())


@pytest.mark.parametrize("release", ["noise", torch.bfloat16, torch.float16])
def test_another_models_noised_gradient_gives_no_confident_sentence(wide, tmp_path, release):
    victim = wide["sequence-classification"]
    stranger = copy.copy(victim)
    object.__setattr__(stranger, "module", copy.deepcopy(victim.module))
    with torch.no_grad():
        for i, parameter in enumerate(stranger.module.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.1)
    batch = _batch(victim, tmp_path, "Rain on Oslo.")
    selection = select(
        stranger, components=LINEAR if release == "noise" else ["ffn_in"], layers=[1], parameters="weight"
    )
    observation = observe(
        stranger, batch, selection, defense={"kind": "gaussian_noise", "std": 1e-3} if release == "noise" else None
    )
    if release != "noise":
        rounded = {name: g.to(release).to(g.dtype) for name, g in observation.gradients.items()}
        observation = dataclasses.replace(observation, gradients=rounded)
    result = attack(observation, victim, "prefix", max_candidates=4000)
    assert result.status == "no_signal" or max(result.confidence) < 0.1


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("task", ["sequence-classification", "causal-lm"])
def test_rounded_gradients_give_the_sentence_and_its_end(wide, tmp_path, kind, task):
    victim = wide[task]
    batch = _batch(victim, tmp_path, "Rain on Oslo.")
    selection = select(victim, components=["ffn_in"], layers=[1], parameters="weight")
    seen = observe(victim, batch, selection)
    rounded = {name: g.to(kind).to(g.dtype) for name, g in seen.gradients.items()}
    result = attack(dataclasses.replace(seen, gradients=rounded), victim, "prefix")
    assert (result.status, result.tokens) == ("ok", batch.reference.tokens)
    assert result.confidence[0] > 0.5


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_what_true_rows_leave_of_a_rounded_gradient_is_what_rounding_leaves(kind):
    """The slow twin knows the clean gradient, and so the rounding itself."""
    clean, x = _gradient(out=96, d=64, std=0.0)
    rounded = clean.to(kind)
    told = rounding(rounded)
    frame = torch.linalg.qr(x.T).Q.T
    noise = rounded.double() - clean
    assert float(told.columns.sum()) == pytest.approx(float(noise.square().sum()), rel=0.1)
    assert abs(told.above(rounded.double(), frame)) < SURE * told.spread
    assert told.above(rounded.double(), frame[:-1]) > SURE * told.spread
    assert rounding(clean) is None
    # More noise than the format makes is no rounding.
    assert rounding((clean + 0.05 * clean.std() * torch.randn(clean.shape, dtype=clean.dtype)).to(kind)) is None
