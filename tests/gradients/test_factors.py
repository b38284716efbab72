"""Every fast path over factors equals its slow twin: `torch.autograd.grad`, one sample at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.pytorch_utils import Conv1D

from lmleak.errors import LmleakError, SelectionError
from lmleak.gradients import factors
from lmleak.records import Entry

# Examples are drawn from a fixed seed and stay a few: each one checks six quantities against the oracle.
FEW = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
size = st.integers(1, 5)
dtypes = st.sampled_from([torch.float32, torch.float64])


def entries(model: nn.Module) -> tuple[Entry, ...]:
    return tuple(Entry(n, n, n.rpartition(".")[0], tuple(p.shape)) for n, p in model.named_parameters())


def randomised(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw)
    return model.to(dtype).eval()


def sample_losses(y: torch.Tensor) -> torch.Tensor:
    """A loss whose output gradient is different everywhere."""
    weight = torch.linspace(-1, 1, y[0].numel(), dtype=y.dtype).reshape(y[0].shape)
    return (y.tanh() * weight + 0.1 * y**2).flatten(1).sum(1)


def oracle(model: nn.Module, x: torch.Tensor, entry: Entry) -> torch.Tensor:
    """[n, *shape] by one forward and one backward a sample."""
    parameter = model.get_parameter(entry.parameter)
    rows = []
    for i in range(len(x)):
        loss = sample_losses(model(x[i : i + 1]))[0]
        (grad,) = torch.autograd.grad(loss, parameter)
        rows.append(
            grad if entry.part is None else grad.narrow(entry.part[0], entry.part[1], entry.shape[entry.part[0]])
        )
    return torch.stack(rows)


def close(found: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor | float = 0.0) -> None:
    """Equal to 1e-5 (float32) or 1e-10 (float64) of the tensor's size, or of `scale` where terms cancel."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    relative = 1e-5 if expected.dtype == torch.float32 else 1e-10
    size = max(float(expected.detach().abs().max()), float(torch.as_tensor(scale).max()), 1e-30)
    assert float((found - expected).detach().abs().max()) <= relative * size


def check(
    model: nn.Module, x: torch.Tensor, group: int = 1, chosen: tuple[Entry, ...] | None = None, floor: float = 0.0
) -> None:
    """Dense, summed, scaled and grouped gradients, norms and inner products of all parameters equal the oracle's."""
    chosen = entries(model) if chosen is None else chosen
    with factors.capture(model, chosen) as tape:
        losses = sample_losses(model(x))
    found = tape.factors(losses)
    for entry in chosen:
        uses, slow = found[entry.name], oracle(model, x, entry)
        n, flat = len(x), slow.flatten(1)
        length = flat.norm(dim=1).clamp_min(floor)
        target = torch.linspace(-1, 2, slow[0].numel(), dtype=slow.dtype).reshape(entry.shape)
        weight = torch.linspace(0.5, 1.5, n, dtype=slow.dtype)
        summed = max(floor, float(flat.abs().sum(0).max()))
        close(sum(use.each() for use in uses), slow, floor)
        close(sum(use.total() for use in uses), slow.sum(0), summed)
        close(factors.squared_norms(uses), flat.square().sum(1), floor**2)
        close(factors.inner(uses, target), flat @ target.flatten(), length * target.norm())
        close(sum(use.scaled(weight).total() for use in uses), torch.tensordot(weight, slow, 1), summed)
        if n % group == 0:
            joined = [use.grouped(group) for use in uses]
            together = slow.unflatten(0, (n // group, group)).sum(1)
            own = length.view(-1, group).sum(1)
            close(sum(use.each() for use in joined), together, summed)
            close(factors.squared_norms(joined), together.flatten(1).square().sum(1), own**2)
            close(factors.inner(joined, target), together.flatten(1) @ target.flatten(), own * target.norm())


def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


@FEW
@given(n=size, t=st.none() | size, rows=size, cols=size, bias=st.booleans(), dtype=dtypes, kind=st.booleans())
def test_linear_and_conv1d(n, t, rows, cols, bias, dtype, kind):
    layer = Conv1D(rows, cols) if kind else nn.Linear(cols, rows, bias=bias)
    shape = (n, cols) if t is None else (n, t, cols)
    check(randomised(nn.Sequential(layer), dtype), draw(*shape, dtype=dtype), group=max(1, n // 2))


@FEW
@given(n=size, b=size, t=size, dtype=dtypes)
def test_linear_on_more_than_one_inner_dimension(n, b, t, dtype):
    check(randomised(nn.Sequential(nn.Linear(3, 4)), dtype), draw(n, b, t, 3, dtype=dtype))


@FEW
@given(
    n=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2) | st.just("same") | st.just("valid"),
    dilation=st.integers(1, 2),
    side=st.integers(5, 8),
    dtype=dtypes,
)
def test_conv2d(n, channels, kernel, stride, padding, dilation, side, dtype):
    stride = 1 if padding == "same" else stride
    layer = nn.Conv2d(*channels, kernel, stride=stride, padding=padding, dilation=dilation)
    check(randomised(nn.Sequential(layer), dtype), draw(n, channels[0], side, side + 1, dtype=dtype), group=n)


@FEW
@given(
    ids=st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=1, max_size=4),
    padding=st.none() | st.integers(0, 5),
    dtype=dtypes,
)
def test_embedding_with_repeated_ids_and_padding(ids, padding, dtype):
    layer = randomised(nn.Sequential(nn.Embedding(6, 3, padding_idx=padding)), dtype)
    check(layer, torch.tensor(ids), group=max(1, len(ids) // 2))


@FEW
@given(
    n=size,
    t=size,
    d=st.integers(2, 6),
    eps=st.sampled_from([1e-12, 1e-5, 0.1]),
    kind=st.sampled_from(["layer", "layer without bias", "torch rms", "llama rms"]),
    dtype=dtypes,
)
def test_norms(n, t, d, eps, kind, dtype):
    layer = {
        "layer": lambda: nn.LayerNorm(d, eps=eps),
        "layer without bias": lambda: nn.LayerNorm(d, eps=eps, bias=False),
        "torch rms": lambda: nn.RMSNorm(d, eps=eps),
        "llama rms": lambda: LlamaRMSNorm(d, eps=eps),
    }[kind]()
    if kind == "llama rms":
        dtype = torch.float32  # it computes in float32 whatever it is given
    check(randomised(nn.Sequential(layer), dtype), draw(n, t, d, dtype=dtype), group=max(1, n // 2))


def test_a_torch_rms_norm_with_the_default_eps():
    # None means the dtype's own machine epsilon, not 1e-6: inputs this small tell the two apart.
    check(randomised(nn.Sequential(nn.RMSNorm(4)), torch.float32), 1e-3 * draw(2, 3, 4, dtype=torch.float32))


@FEW
@given(n=size, channels=size, side=st.integers(1, 4), dtype=dtypes)
def test_batch_norm_in_eval_mode(n, channels, side, dtype):
    layer = nn.BatchNorm2d(channels)
    layer.running_mean.uniform_(-1, 1, generator=torch.Generator().manual_seed(3))
    layer.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(4))
    check(randomised(nn.Sequential(layer), dtype), draw(n, channels, side, side, dtype=dtype))


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    return randomised(
        nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True),
            nn.Conv2d(3, 2, 2, stride=2), nn.ReLU(inplace=True), nn.Flatten(),
            nn.Linear(8, 5), nn.LayerNorm(5), nn.ReLU(inplace=True), nn.Linear(5, 3),
        ),
        dtype,
    )  # fmt: skip


def test_a_network_whose_successors_work_in_place():
    check(network(), draw(4, 2, 4, 4, dtype=torch.float64), group=2)


class Twice(nn.Module):
    """One module used twice, and a second that holds the same weight: three uses of one parameter."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(self.first(x).tanh()).tanh())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_uses_of_a_parameter_count(dtype):
    model = randomised(Twice(), dtype)
    x = draw(4, 3, 4, dtype=dtype)
    with factors.capture(model, entries(model)) as tape:
        losses = sample_losses(model(x))
    assert [len(uses) for uses in tape.factors(losses).values()] == [3, 2]
    check(model, x, group=2)


class TinyGPT2(nn.Module):
    """Ids -> logits, so that `check` can drive a language model whose output layer is its embedding."""

    def __init__(self):
        super().__init__()
        config = GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=8, vocab_size=11, attn_implementation="eager")
        self.model = GPT2LMHeadModel(config)

    def forward(self, ids):
        places = torch.arange(ids.shape[1]).expand(ids.shape)
        return self.model(input_ids=ids, position_ids=places, use_cache=False).logits


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    model = TinyGPT2().eval()
    # Initial weights of 0.02 hide a missing cross term below the tolerance.
    for parameter in model.parameters():
        parameter.data.mul_(8)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_parameter_of_gpt2_with_its_tied_table(gpt2, dtype):
    model = gpt2.to(dtype)
    ids = torch.tensor([[1, 2, 2, 5, 7], [3, 3, 3, 3, 10], [0, 4, 9, 1, 6]])
    table = "model.transformer.wte.weight"
    with factors.capture(model, entries(model)) as tape:
        losses = sample_losses(model(ids))
    uses = tape.factors(losses)[table]
    assert len(uses) == 2
    # The cross term is no rounding matter: without it the norm is wrong.
    alone = sum(use.dot(use) for use in uses)
    assert ((alone - factors.squared_norms(uses)).abs() / alone).max() > 1e-3
    if dtype == torch.float64:
        check(model, ids, group=3)
        return
    slow = oracle(model, ids, next(e for e in entries(model) if e.name == table))
    close(factors.squared_norms(uses), slow.flatten(1).square().sum(1))


@pytest.mark.parametrize("third", [0, 1, 2])
@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_a_slice_of_gpt2_is_the_slice_of_the_dense_gradient(gpt2, third, leaf):
    model = gpt2.to(torch.float64)
    name = f"model.transformer.h.0.attn.c_attn.{leaf}"
    dim = 1 if leaf == "weight" else 0
    shape = (8, 8) if leaf == "weight" else (8,)
    part = Entry(f"{name}[{third}]", name, name.rpartition(".")[0], shape, part=(dim, 8 * third, 8 * third + 8))
    ids = torch.tensor([[1, 2, 2, 5, 7], [3, 3, 3, 3, 10]])
    whole = next(entry for entry in entries(model) if entry.name == name)
    # The key's bias has no gradient at all (softmax is shift-invariant): rounding is measured against the whole bias.
    check(model, ids, group=2, chosen=(part,), floor=float(oracle(model, ids, whole).abs().max()))


def test_frozen_parameters_have_factors_too():
    model = network()
    x = draw(3, 2, 4, 4, dtype=torch.float64)
    slow = {entry.name: oracle(model, x, entry) for entry in entries(model)}
    model.requires_grad_(False)
    with factors.capture(model, entries(model)) as tape:
        losses = sample_losses(model(x))
    for name, uses in tape.factors(losses).items():
        close(sum(use.each() for use in uses), slow[name])
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())


def test_a_parameter_that_the_loss_does_not_reach_has_a_zero_gradient():
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)})
    with factors.capture(model, entries(model)) as tape:
        model["idle"](torch.ones(2, 3))
        losses = sample_losses(model["used"](torch.ones(2, 3)))
    assert factors.squared_norms(tape.factors(losses)["idle.weight"]).tolist() == [0, 0]


def test_a_gradient_of_few_tokens_is_few_outer_products():
    left, right = draw(1, 3, 64, dtype=torch.float32), 0.1 * draw(1, 3, 80, dtype=torch.float32)
    gradient = (left[0].T @ right[0]).view(64, 8, 10)
    thin = factors.low_rank(gradient, 3)
    close(thin.columns @ thin.rows, gradient.flatten(1))
    own = factors.Factor(draw(5, 2, 64, dtype=torch.float32), draw(5, 2, 80, dtype=torch.float32), (64, 8, 10))
    length = own.each().flatten(1).norm(dim=1) * gradient.norm()
    close(own.inner(thin), own.inner(gradient), length)
    words = factors.Factor(torch.tensor([[3, 3], [63, 0]]), draw(2, 2, 80, dtype=torch.float32), (64, 8, 10))
    close(words.inner(thin), words.inner(gradient), length)


@pytest.mark.parametrize("size", [1e-4, 1e-5])
def test_noise_has_no_few_outer_products(size):
    gradient = draw(64, 3, dtype=torch.float32) @ draw(3, 80, dtype=torch.float32)
    noisy = gradient + size * torch.randn(64, 80, generator=torch.Generator().manual_seed(9))
    assert factors.low_rank(gradient, 3) is not None
    assert factors.low_rank(noisy, 3) is None
    assert factors.low_rank(gradient, 30) is None  # and nothing is saved where tokens are as many as dimensions


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


class Raises(nn.Module):
    def forward(self, x):
        raise ValueError("no")


def test_only_its_own_hooks_are_removed_also_after_a_raise():
    model = nn.Sequential(nn.Linear(3, 3), Raises())
    mine = model[0].register_forward_hook(lambda *_: None)
    with factors.capture(model, entries(model)):
        assert hooks(model) == 2
    assert hooks(model) == 1
    with pytest.raises(ValueError, match="no"), factors.capture(model, entries(model)):
        model(torch.ones(1, 3))
    assert hooks(model) == 1
    mine.remove()


def test_the_graph_can_be_differentiated_through():
    # create_graph: the objective's gradient with respect to the input equals that through the dense gradients.
    model = randomised(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.float64)
    x = draw(3, 2, 3, dtype=torch.float64).requires_grad_()
    with factors.capture(model, entries(model)) as tape:
        losses = sample_losses(model(x))
    squares = sum(factors.squared_norms(uses).sum() for uses in tape.factors(losses, create_graph=True).values())
    (fast,) = torch.autograd.grad(squares, x)
    slow = torch.zeros_like(x)
    for i in range(len(x)):
        loss = sample_losses(model(x[i : i + 1]))[0]
        grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        slow[i] = torch.autograd.grad(sum(g.square().sum() for g in grads), x)[0][i]
    close(fast, slow)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(3).train(),
        nn.Embedding(4, 3, scale_grad_by_freq=True),
        nn.Embedding(4, 3, max_norm=1.0),
        nn.GroupNorm(1, 3),
        nn.LayerNorm((2, 3)),
        nn.RMSNorm((2, 3)),
        nn.BatchNorm2d(3, track_running_stats=False).eval(),
        OPTLearnedPositionalEmbedding(5, 3),
        BartScaledWordEmbedding(5, 3, 0, embed_scale=2.0),
        nn.MultiheadAttention(4, 2),
        nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_has_no_factored_gradient_is_named_before_the_model_runs(layer):
    model = nn.Sequential(layer)
    assert factors.unfactored(model, entries(model))
    with (
        pytest.raises(SelectionError, match="no factored gradient for a") as caught,
        factors.capture(model, entries(model)),
    ):
        pass
    assert "supported: Linear" in str(caught.value)


def test_a_module_that_takes_no_part_is_named():
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)})
    with factors.capture(model, entries(model)) as tape:
        losses = sample_losses(model["used"](torch.ones(2, 3)))
    with pytest.raises(SelectionError, match=r"idle\.weight: its module 'idle' takes no part"):
        tape.factors(losses)


def test_an_overwritten_input_is_an_error_where_autograd_would_be_silent():
    model = nn.Sequential(nn.Linear(3, 3)).requires_grad_(False)
    x = torch.ones(2, 3)
    with factors.capture(model, entries(model)) as tape:
        losses = sample_losses(model(x))
    x.mul_(2)
    with pytest.raises(LmleakError, match="overwritten"):
        tape.factors(losses)


class Broadcast(nn.Module):
    """Positions looked up once and added to every sample, as models do where position_ids are left to them."""

    def __init__(self):
        super().__init__()
        self.place = nn.Embedding(4, 3)

    def forward(self, x):
        return x + self.place(torch.arange(x.shape[1])[None])


def test_samples_that_share_a_module_output_are_an_error_with_a_way_out():
    model = Broadcast()
    x = torch.ones(2, 4, 3)
    with factors.capture(model, entries(model)) as tape:
        losses = F.mse_loss(model(x), torch.zeros_like(x), reduction="none").sum((1, 2))
    with pytest.raises(LmleakError, match="position_ids with the batch dimension") as caught:
        tape.factors(losses)
    assert "place.weight" in str(caught.value)
    with factors.capture(model, entries(model)) as tape:
        losses = sample_losses(model(x[:1]))
    assert tape.factors(losses)["place.weight"][0].each().shape == (1, 4, 3)
