"""Per-sample losses add up to what transformers calls the loss, for every task."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

from lmleak.gradients.losses import sample_losses


@pytest.fixture
def logits():
    return torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def labels():
    return torch.tensor([[1, 2, 3, 4, 5], [6, 0, 1, -100, -100], [2, -100, 4, -100, -100]])


def test_classification(logits):
    labels = torch.tensor([0, 3, 6])
    own = sample_losses(logits[:, 0], labels, "sequence-classification", "sum")
    torch.testing.assert_close(own, torch.stack([F.cross_entropy(logits[i, 0], labels[i]) for i in range(3)]))
    mean = sample_losses(logits[:, 0], labels, "sequence-classification", "mean")
    torch.testing.assert_close(mean.sum(), F.cross_entropy(logits[:, 0], labels))


@pytest.mark.parametrize(("task", "theirs"), [("causal-lm", ForCausalLMLoss), ("masked-lm", ForMaskedLMLoss)])
def test_language_models(logits, labels, task, theirs):
    # transformers computes its losses in float32.
    mean = sample_losses(logits, labels, task, "mean")
    torch.testing.assert_close(mean.sum().float(), theirs(logits, labels, 7).float())
    own = sample_losses(logits, labels, task, "sum")
    for i in range(3):
        torch.testing.assert_close(own[i].float(), theirs(logits[i : i + 1], labels[i : i + 1], 7).float())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_sample_without_any_loss_adds_zero_and_no_nan(logits, reduction):
    labels = torch.full((3, 5), -100)
    losses = sample_losses(logits.requires_grad_(), labels, "masked-lm", reduction)
    assert losses.tolist() == [0, 0, 0]
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    assert not grad.any()
