"""The labels of a batch, read off the gradient of the classifier's last layer.

Row c of that gradient is the sum over samples of `(p_ic - y_ic) h_i` (h: what the layer reads; the bias reads a 1), so
a label pulls its own row down. What the samples' own probabilities p add is not known, and that is the whole problem.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lmleak.attacks._labels_solve import memory, solve
from lmleak.attacks._objective import frozen
from lmleak.attacks._rowspace import matrix
from lmleak.attacks._text import refuse
from lmleak.gradients.losses import forward
from lmleak.records import Knowledge, Observation, Reconstruction, Victim

Strategy = Literal["best", "minimum", "bias", "expected", "solve"]

#: Most of the gradient's energy that may lie in the sum of its rows, which is zero without noise and 1 in noise alone.
NOISE = 0.5
ROUNDING = 1e-4  #: of a sum over a batch, in samples
TOKENS = 16  #: of a random text
#: Rest of a solution, over the gradient, above which it is none: noise, or samples that rounding has joined.
REST = 0.05
#: A probability from which on a model is no longer one that says nearly the same of every sample.
SURE = 0.95
MOST = 2**27  #: values that a search may hold at once, 1 GB


@dataclass(frozen=True)
class Head:
    """The last layer's gradient, summed over the batch."""

    weight: Tensor | None  #: [classes, d] float64
    bias: Tensor | None  #: [classes] float64
    module: Any  #: the layer
    batch: int
    rounding: float = 2.4e-7  #: of the observed values, over their size

    @property
    def counted(self) -> Tensor:
        """[classes] float64: each class's probabilities over the batch less its count, or that times a common factor.

        Without the bias's gradient, the weight's row sums; their factor is the mean of an input's sum.
        """
        if self.bias is not None:
            return self.bias
        assert self.weight is not None
        return self.weight.sum(1)


def recover_labels(
    observation: Observation, victim: Victim, strategy: Strategy = "best", knowledge: Knowledge | None = None
) -> tuple[int, ...] | Reconstruction:
    """The batch's labels, in ascending order: which sample has which cannot be told from sums.

    Args:
        observation: of the classifier's last linear layer, its weight, its bias or both, among whatever else.
        victim: the public model, an image or a sequence classifier.
        strategy: `minimum`: the classes with the lowest values of the weight's gradient (Yin et al., 2021,
            arXiv 2104.07586), which never repeats a label and needs inputs that are not negative; `bias`: counts from
            the bias's gradient, where a class that is pulled down is there, and each further sample takes the mean pull
            away (Wainakh et al., 2022, arXiv 2105.09369); `expected`: counts from the bias's gradient and the
            probabilities at the mean input of each class, which the weight's gradient shows (on random inputs where
            that is not observed); `solve`: the labels with which inputs exist that make the
            gradient, see `_labels_solve`, of fewer samples than classes; `best`: `expected` for an untrained model,
            `solve` for one that is sure of itself, where that finds an answer.
        knowledge: granted labels are returned as they are.

    Returns:
        One class a sample, or a refusal with its reason.
    """
    if knowledge is not None and knowledge.labels is not None:
        return knowledge.labels
    head = read_head(observation, victim)
    if isinstance(head, Reconstruction):
        return head
    rules: dict[str, Callable[[], Tensor | str]] = {
        "minimum": lambda: _minimum(head),
        "bias": lambda: _bias(head),
        "expected": lambda: _expected(head, victim),
        "solve": lambda: _solved(head, victim),
        "best": lambda: _best(head, victim),
    }
    found = rules[strategy]()
    return refuse("not_applicable", found) if isinstance(found, str) else tuple(sorted(found.tolist()))


def read_head(observation: Observation, victim: Victim) -> Head | Reconstruction:
    """The last linear layer's observed gradient, or a refusal."""
    if victim.task not in ("image-classification", "sequence-classification"):
        return refuse("not_applicable", f"labels are a classifier's; this model's task is {victim.task}")
    name = last_layer(victim)
    if name is None:
        return refuse("not_applicable", "the model ends in no linear layer with an output for each class")
    module, size = victim.module.get_submodule(name), observation.batch_size
    scale = size if observation.reduction == "mean" else 1
    parts: dict[bool, Tensor] = {}
    rounding = 0.0
    for entry in observation.entries:
        if entry.module == name and entry.part is None:
            rounding = max(rounding, 2 * torch.finfo(observation.gradients[entry.name].dtype).eps)
            gradient = observation.gradients[entry.name].double() * scale
            parts[gradient.dim() == 1] = gradient if gradient.dim() == 1 else matrix(victim.module, entry, gradient)
    if not parts:
        return refuse("not_applicable", f"labels need the gradient of the last layer, '{name}', which is not observed")
    if not any(bool(part.any()) for part in parts.values()):
        return refuse("no_signal", f"the observed gradient of the last layer, '{name}', is zero")
    # Probabilities and labels sum to the same, so that rows cancel.
    rows = torch.cat([part.reshape(len(part), -1) for part in parts.values()], 1)
    share = float(rows.sum(0).square().sum() / rows.square().sum())
    if share > NOISE:
        return refuse("no_signal", f"the rows of '{name}' do not cancel (share of their sum {share:.2g}): noise")
    return Head(parts.get(False), parts.get(True), module, size, rounding)


def last_layer(victim: Victim) -> str | None:
    """The linear layer that gives a classifier's logits."""
    image = victim.task == "image-classification"
    classes = victim.processor.classes if image else victim.module.config.num_labels
    linear = ((name, part) for name, part in victim.module.named_modules() if isinstance(part, nn.Linear))
    fitting = [name for name, part in linear if part.out_features == classes]
    return fitting[-1] if fitting else None


def _minimum(head: Head) -> Tensor | str:
    if head.weight is None:
        return "this strategy reads the last layer's weight, and only its bias is observed"
    lowest = head.weight.min(1).values
    if head.batch > len(lowest):
        return f"this strategy finds each class once, and {head.batch} samples share {len(lowest)} classes"
    return lowest.topk(head.batch, largest=False).indices


def _bias(head: Head) -> Tensor:
    left = head.counted.clone()
    there = (left < 0).nonzero().flatten()
    there = there[left[there].argsort()][: head.batch]
    pull = left[there].sum() / head.batch
    left[there] -= pull
    labels = there.tolist()
    while len(labels) < head.batch:
        labels.append(int(left.argmin()))
        left[labels[-1]] -= pull
    return torch.tensor(labels)


def _expected(head: Head, victim: Victim) -> Tensor:
    """The counts nearest to what the gradient leaves of the probabilities that the model is expected to give."""
    # Of two classes each pulls the one row both ways: what is left is no mean.
    if head.bias is not None and head.weight is not None and len(head.bias) > 2:
        return _by_means(head, head.weight, head.bias)[0]
    inputs, probabilities = guess(victim)
    share = probabilities.mean(0).to(head.counted) * head.batch
    if head.bias is not None:
        return nearest(share - head.bias, -head.bias, head.batch)
    # How large an input's sum is depends on the data: the size at which counts are nearest to whole numbers.
    sizes = inputs.sum(1).abs().mean() * torch.logspace(-1, 1, 400, dtype=torch.float64, device=inputs.device)
    tried = [(share - head.counted / size, -head.counted / size) for size in sizes]
    found = [nearest(wanted, least, head.batch) for wanted, least in tried]
    counts = [torch.bincount(labels, minlength=len(share)) for labels in found]
    misses = [float((wanted - own).square().sum()) for (wanted, _), own in zip(tried, counts, strict=True)]
    return found[misses.index(min(misses))]


def _by_means(head: Head, weight: Tensor, bias: Tensor, rounds: int = 5) -> tuple[Tensor, float]:
    """Counts, and the largest probability met, from the inputs' mean, then from one mean for each class.

    The first right singular vector is the mean where inputs are alike. Given counts, a class's row less what other
    classes' probabilities add to it is minus the sum of its own inputs. Untrained ResNet-20, 200 CIFAR-10 batches of 8:
    all labels right in 199; 86 by probabilities on random pictures.
    """
    own_weight, own_bias = (parameter.detach().double() for parameter in (head.module.weight, head.module.bias))
    right = torch.linalg.svd(torch.cat([weight, bias[:, None]], 1), full_matrices=False).Vh[0]
    mean = (right / torch.where(right[-1].abs() < 1e-12, 1e-12, right[-1]))[:-1]
    means = mean.expand(len(bias), -1)
    counts = torch.ones_like(bias) * head.batch / len(bias)
    best, least, top = torch.zeros(0), float("inf"), 0.0
    for _ in range(rounds):
        chance = (means @ own_weight.T + own_bias).softmax(1)
        share = (chance * counts[:, None]).sum(0)
        labels = nearest(share - bias, -bias, head.batch)
        counts = torch.bincount(labels, minlength=len(bias)).double()
        miss = float((share - bias - counts).square().sum())
        if miss < least:
            best, least, top = labels, miss, float(chance[counts > 0].max())
        sums = (chance * counts[:, None]).T @ means - weight
        means = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], mean)
    return best, top


def _solved(head: Head, victim: Victim) -> Tensor | str:
    if head.weight is None or head.bias is None:
        return "this strategy reads the last layer's weight and bias, which are not both observed"
    if head.batch >= len(head.bias):
        return f"this strategy needs fewer samples than classes, and {head.batch} share {len(head.bias)}"
    if memory(head.batch, len(head.bias)) > MOST:
        return f"this strategy would take too much memory for {head.batch} samples of {len(head.bias)} classes"
    weight, bias = (parameter.detach().double() for parameter in (head.module.weight, head.module.bias))
    gradient, hints = torch.cat([head.weight, head.bias[:, None]], 1), [_bias(head), _expected(head, victim)]
    found, rest = solve(gradient, weight, bias, head.batch, head.rounding, hints)
    if rest > REST:
        return f"no inputs make this gradient (they leave {rest:.2g} of it): noise, or a batch that was not found"
    if len(found) == head.batch:
        return found
    # Samples whose slopes drown in the others' rounding: theirs are whatever the model says most often.
    counts = torch.bincount(found, minlength=len(head.bias)).double()
    return nearest(counts + (head.batch - len(found)) * guess(victim)[1].mean(0).to(counts), counts, head.batch)


def _best(head: Head, victim: Victim) -> Tensor:
    if head.batch == 1 or head.weight is None or head.bias is None or len(head.bias) == 2:
        return _expected(head, victim)
    labels, top = _by_means(head, head.weight, head.bias)
    if top < SURE:
        return labels
    found = _solved(head, victim)
    return labels if isinstance(found, str) else found


def nearest(wanted: Tensor, least: Tensor, total: int) -> Tensor:
    """Labels whose counts [classes] add up to `total`, are near `wanted` and, where that can be, above `least`."""
    counts = (least - ROUNDING).ceil().clamp_min(0)
    if counts.sum() > total:
        counts = torch.zeros_like(counts)
    while counts.sum() < total:
        counts[int((wanted - counts).argmax())] += 1
    return torch.arange(len(counts), device=counts.device).repeat_interleave(counts.long())


def guess(victim: Victim, count: int = 32) -> tuple[Tensor, Tensor]:
    """What the last layer reads [count, d] and gives [count, classes] for random pictures or tokens, in float64."""
    draw = torch.Generator().manual_seed(0)  # the same question for everyone who asks
    weight = next(victim.module.parameters())
    form, inputs = victim.processor, {}
    if victim.task == "image-classification":
        # Blots of a few sizes: of plain noise a network sees little but its mean.
        pixels = torch.zeros(count, form.channels, form.height, form.width)
        for side in (1, 2, 4, 8):
            rough = torch.rand(count, form.channels, side, side, generator=draw)
            pixels += torch.nn.functional.interpolate(rough, pixels.shape[2:], mode="bilinear") / 4
        inputs["pixel_values"] = form.normalised(pixels.to(weight))
    else:
        ids = torch.randint(len(form), (count, TOKENS), generator=draw).to(weight.device)
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    last = victim.module.get_submodule(last_layer(victim) or "")
    read: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda _, args: read.append(args[0].detach()))
    try:
        with torch.no_grad(), frozen(victim.module):
            logits = forward(victim.module, inputs)
    finally:
        handle.remove()
    return read[0].reshape(count, -1, read[0].shape[-1])[:, -1].double(), logits.double().softmax(1)
