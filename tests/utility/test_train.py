"""Private fine-tuning: what Opacus clips is what the oracle clips, noise is as stated, epochs are resumed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lmleak import load_batches, load_model, select
from lmleak.errors import LmleakError, ModelError
from lmleak.gradients.observe import ClientGradients
from lmleak.utility import Ghost, Plan, fine_tune, mcc, trainable
from lmleak.utility._frozen import remember
from lmleak.utility._score import together
from lmleak.utility._train import _losses

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture(scope="module")
def gpt2():
    config = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return load_model("gpt2", weights="random", task="sequence-classification", tokenizer="bytes", config=config)


@pytest.fixture(scope="module")
def bert():
    return load_model("bert", weights="random", tokenizer="bytes", config={**TINY, "max_position_embeddings": 64})


def records(victim, count: int, **fields):
    return load_batches(victim, "sample", limit=count, **{"max_length": 12, **fields})


def oracle(victim, batch, bound: float):
    """Sum of clipped per-sample gradients, one backward a sample; nothing of Opacus and none of the factors."""
    total, norms = {}, []
    for i in range(len(batch.labels)):
        inputs = {name: tensor[i : i + 1] for name, tensor in batch.inputs.items()}
        loss = victim.module(**inputs, labels=batch.labels[i : i + 1]).loss
        parameters = dict(victim.module.named_parameters())
        grads = dict(
            zip(parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True), strict=True)
        )
        grads = {name: grad for name, grad in grads.items() if grad is not None}
        norms.append(math.sqrt(sum(float(grad.square().sum()) for grad in grads.values())))
        for name, grad in grads.items():
            total[name] = total.get(name, 0) + grad * min(1.0, bound / (norms[-1] + 1e-6))
    return total, norms


@pytest.mark.parametrize("model", ["minilm", "bert", "gpt2"])
def test_clipped_gradients_equal_the_oracle(model, request):
    victim = request.getfixturevalue(model)
    batch = together(records(victim, 3, max_length=8), victim)
    expected, norms = oracle(victim, batch, 0.0)
    bound = sorted(norms)[1] * 1.1  # some samples are clipped and some are not
    expected, _ = oracle(victim, batch, bound)
    copied = trainable(victim, {})
    found = Ghost(copied.module, bound).backward(_losses(copied, batch))
    torch.testing.assert_close(found, torch.tensor(norms), rtol=1e-4, atol=1e-6)
    for name, parameter in copied.module.named_parameters():
        if name not in expected:
            assert parameter.grad is None or not parameter.grad.any()
            continue
        want = expected[name]
        want = want.T if parameter.shape != want.shape or _turned(victim, name) else want
        torch.testing.assert_close(parameter.grad, want, rtol=1e-3, atol=1e-6 * bound)


def _turned(victim, name: str) -> bool:
    """Whether the weight is a Conv1D's, and so transposed in the copy."""
    owner = victim.module.get_submodule(name.rpartition(".")[0])
    return type(owner).__name__ == "Conv1D" and name.endswith("weight")


def test_what_opacus_clips_is_what_the_attacked_release_clips(bert):
    batch = together(records(bert, 3), bert)
    entries = select(bert).entries
    released = ClientGradients(bert, batch, entries).clipped_sum(0.5, "model")
    copied = trainable(bert, {})
    Ghost(copied.module, 0.5).backward(_losses(copied, batch))
    for entry in entries:
        torch.testing.assert_close(
            copied.module.get_parameter(entry.parameter).grad, released[entry.name], rtol=1e-3, atol=1e-7
        )


def test_gpt2_as_linear_layers_is_the_same_function(gpt2):
    batch = together(records(gpt2, 2), gpt2)
    copied = trainable(gpt2, {"layers": [1]})
    assert not any(type(m).__name__ == "Conv1D" for m in copied.module.modules())
    assert any(type(m).__name__ == "Conv1D" for m in gpt2.module.modules())
    with torch.no_grad():
        torch.testing.assert_close(copied.module(**batch.inputs).logits, gpt2.module(**batch.inputs).logits)
    assert {n for n, p in copied.module.named_parameters() if p.requires_grad} == {
        e.parameter for e in select(gpt2, layers=[1]).entries
    }


def test_tied_and_skipped_parameters_are_refused(tiny_gpt2, bert):
    with pytest.raises(ModelError, match="is tied"):
        Ghost(trainable(tiny_gpt2, {}).module, 1.0)
    copied = trainable(bert, {})
    copied.module.extra = torch.nn.Linear(2, 2)  # takes no part in the forward pass
    ghost = Ghost(copied.module, 1.0)
    with pytest.raises(ModelError, match=r"extra\.weight has no per-sample gradient"):
        ghost.backward(_losses(copied, together(records(bert, 2), bert)))


@pytest.mark.parametrize(
    ("chosen", "frozen"), [({"components": ["pooler", "head"]}, 2), ({"layers": [1]}, 1), ({"layers": [0]}, 0)]
)
def test_frozen_blocks_are_run_once_and_change_nothing(bert, chosen, frozen):
    known = [*records(bert, 3), *records(bert, 3, max_length=7)]
    batch = together(known, bert)
    whole, cut = trainable(bert, chosen), trainable(bert, chosen)
    states = {}
    assert remember(cut, known, states) == bool(frozen)
    assert len(cut.module.bert.encoder.layer) == 2 - frozen
    for one in (whole, cut):
        _losses(one, batch).sum().backward()
    pairs = zip(*([p for p in v.module.parameters() if p.requires_grad] for v in (whole, cut)), strict=True)
    assert all(torch.allclose(a.grad, b.grad, atol=1e-6) for a, b in pairs)
    if frozen:  # a second run of the same weights computes nothing anew
        kept = dict(states)
        assert remember(trainable(bert, chosen), known, states)
        assert all(states[key] is kept[key] for key in states)


PLAN = Plan(epochs=2, batch_size=8, lr=2e-3, parameters={}, micro_batch=4)
PRIVATE = {"kind": "dp_sgd", "max_grad_norm": 1.0, "noise_multiplier": 1.0}


def test_a_private_step_has_the_stated_noise(bert, tmp_path, monkeypatch):
    from opacus.optimizers import DPOptimizerFastGradientClipping as Optimizer

    seen = []

    def pre_step(self, closure=None):
        clean = [p.grad.clone() for p in self.params]
        out = real(self, closure)
        seen.extend(((p.grad * 8 - c).flatten() / 0.6) for p, c in zip(self.params, clean, strict=True))
        return out

    real = Optimizer.pre_step
    monkeypatch.setattr(Optimizer, "pre_step", pre_step)
    plan = Plan(epochs=1, batch_size=8, lr=1e-3, parameters={"components": ["head", "pooler"]}, micro_batch=4)
    defense = {"kind": "dp_sgd", "max_grad_norm": 0.3, "noise_multiplier": 2.0}
    train = records(bert, 64)
    fine_tune(bert, train, train[:8], defense, plan, 0, tmp_path / "kept.pt")
    noise = torch.cat(seen)
    assert len(noise) > 2000
    assert abs(noise.mean()) < 4.5 / math.sqrt(len(noise))
    assert abs(noise.var() - 1) < 4.5 * math.sqrt(2 / len(noise))


@pytest.mark.parametrize(
    "defense", [{"kind": "none"}, PRIVATE, {"kind": "quantize", "to": "sign"}], ids=lambda d: d["kind"]
)
def test_a_kill_costs_one_epoch_and_changes_nothing(bert, tmp_path, defense):
    train = records(bert, 24)
    before = {name: tensor.clone() for name, tensor in bert.module.state_dict().items()}
    whole = fine_tune(bert, train, train, defense, PLAN, 5, tmp_path / "a.pt")

    def killed(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fine_tune(bert, train, train, defense, PLAN, 5, tmp_path / "b.pt", killed)
    said: list[str] = []
    again = fine_tune(bert, train, train, defense, PLAN, 5, tmp_path / "b.pt", said.append)
    assert len(said) == 1
    assert again["curve"] == whole["curve"]
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(tensor, before[name]) for name, tensor in bert.module.state_dict().items())
    assert all(not m._forward_hooks and not m._backward_hooks for m in bert.module.modules())


def test_it_learns_without_noise_and_not_under_much(bert, tmp_path):
    # A rule that a small model finds: whether the sentence starts in the first half of the alphabet's bytes.
    every = records(bert, 100, max_length=5)
    middle = sorted(int(r.inputs["input_ids"][0, 1]) for r in every)[50]
    every = [replace(r, labels=(r.inputs["input_ids"][0, 1:2] < middle).long()) for r in every]
    majority = max(sum(int(r.labels) == k for r in every) for k in (0, 1)) / len(every)
    plan = Plan(epochs=6, batch_size=20, lr=1e-2, parameters={}, micro_batch=20)
    clear = fine_tune(bert, every, every, {"kind": "none"}, plan, 0, tmp_path / "a.pt")
    hidden = fine_tune(bert, every, every, {**PRIVATE, "noise_multiplier": 100.0}, plan, 0, tmp_path / "b.pt")
    assert clear["accuracy"] > majority + 0.2
    assert hidden["accuracy"] < clear["accuracy"] - 0.2
    assert clear["mcc"] > 0.4


def test_mcc_is_that_of_the_books():
    # Four cells: 6 true positive, 1 false negative, 2 false positive, 3 true negative (scikit-learn: 0.4780914437).
    truth = [1] * 7 + [0] * 5
    guess = [1] * 6 + [0] + [1] * 2 + [0] * 3
    assert mcc(truth, guess) == pytest.approx((6 * 3 - 2 * 1) / math.sqrt(8 * 7 * 5 * 4))
    assert mcc(truth, truth) == pytest.approx(1)
    assert mcc(truth, [1] * 12) == 0
    assert mcc([0, 1, 2], [1, 2, 0]) == pytest.approx(-0.5)


def test_what_cannot_be_trained_is_refused(tiny_gpt2, gpt2, tmp_path):
    train = records(tiny_gpt2, 8)
    with pytest.raises(LmleakError, match="labelled sentences"):
        fine_tune(tiny_gpt2, train, train, {"kind": "none"}, PLAN, 0, tmp_path / "a.pt")
    with pytest.raises(LmleakError, match="part of a fused weight"):
        trainable(gpt2, {"components": ["attn_query"]})
