"""Pictures and how far each is from filling the space of an observed gradient: what `subspace` descends on for images.

With the noise made of one size the true picture leaves 3e-6 outside the space instead of 3e-5, and what float32's
rounding hides is known: after a training that made inputs nearly alike a fifth of the space is clear, where four fifths
seemed so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmleak.attacks._energy import Reached, reaching
from lmleak.attacks._rowspace import matrix
from lmleak.attacks._span_prior import Photo, even, proportional
from lmleak.records import Entry, Observation, Victim

RIDGE = 1e-5  #: on the products of the rows, where all directions weigh alike
PRIOR = 1e-4  #: weight of the prior beside it
MEMORY = 30  #: of L-BFGS


@dataclass(frozen=True)
class View:
    """One observed matrix: where it is, and the space that its inputs fill; in float64."""

    owner: nn.Module
    basis: Tensor  #: [r, d]
    strength: Tensor  #: [r] energy of each direction over the most that noise alone has
    columns: Tensor  #: [d] inputs are divided by them first, which makes the noise of one size
    centred: bool  #: a key's space holds differences of inputs only
    scale: float  #: nats that a direction at strength 1 is worth where all of it is left open

    @property
    def clear(self) -> Tensor:
        """How much of each direction is above the noise, [r] in 0..1."""
        return (1 - 1 / self.strength.clamp_min(1e-300)).clamp_min(0)

    @property
    def equations(self) -> float:
        """How many the inputs obey: what lies outside the space of each direction that is above the noise."""
        return float(self.clear.sum()) * (self.basis.shape[1] - len(self.basis))

    @property
    def trust(self) -> float:
        """Weight of what lies outside: where noise hides directions, rows may leave what is seen of the space."""
        return float(self.clear.mean()) ** 2

    def weights(self, cap: float) -> Tensor:
        """Of each direction left open, [r]: its likelihood's, up to a cap; of one size at a cap of 1."""
        return self.clear * self.strength.clamp_max(cap)

    def ridge(self, cap: float) -> float:
        """On the rows: low enough not to be seen beside the largest weight."""
        return RIDGE / cap

    def expected(self, cap: float) -> float:
        """Nats at the true picture: half of one a free number of each direction, less where the cap weighs it less."""
        free = self.basis.shape[1] - len(self.basis)
        return 0.5 * free * float((self.weights(cap) / self.strength.clamp_min(1e-300)).sum())

    def centre(self, x: Tensor) -> Tensor:
        """What lies in the space: rows [..., n, d] or their differences."""
        return x - x.mean(-2, keepdim=True) if self.centred else x

    def unit(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Unit rows in the space's coordinates, and what they were divided by [n, 1]."""
        x = self.centre(x).double() / self.columns
        size = x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return x / size, size

    def astray(self, x: Tensor) -> Tensor:
        """Share of each of the rows x [n, d] outside the space, [n]."""
        return self._split(self.unit(x)[0])[1]

    def _split(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        """What unit rows have along each direction [n, r], and of each what lies outside the space [n]."""
        p = unit @ self.basis.T
        return p, (unit - p @ self.basis).square().sum(-1)

    def __call__(self, x: Tensor, ridge: float, cap: float = 1.0) -> tuple[Tensor, Tensor]:
        """Share of the rows x [n, d] outside the space, summed; and share of the space that they leave open."""
        x, _ = self.unit(x)
        p, outside = self._split(x)
        covered = (torch.linalg.solve(x @ x.T + ridge * torch.eye(len(x)).to(x), p) * p).sum(0)
        return outside.sum() * self.trust, (self.weights(cap) * (1 - covered)).sum()


class Descent:
    """Pictures of a victim and how far each is from filling the views' spaces; counts passes in `evaluations`."""

    def __init__(self, victim: Victim, views: Sequence[View]):
        form, like = victim.processor, _like(victim)
        self.victim, self.views = victim, tuple(views)
        self.photo = Photo(form.channels, form.height, form.width)
        self.shape = (1, form.channels, form.height, form.width)
        self.spread, self.down, self.across, self.mix = (
            part.to(like) for part in (self.photo.inverse.rsqrt(), self.photo.down, self.photo.across, self.photo.mix)
        )
        self.dtype = next(victim.module.parameters()).dtype
        self.evaluations = 0
        self._seen: dict[nn.Module, Tensor] = {}

    def picture(self, z: Tensor) -> Tensor:
        """[1, c, y, x] in [0, 1] (not clamped) from coordinates in which photos have spread 1."""
        y = self.down.T @ (z * self.spread) @ self.across
        return 0.5 + torch.einsum("ji,kjyx->kiyx", self.mix, y)

    def coordinates(self, picture: Tensor) -> Tensor:
        """The inverse of `picture`."""
        centred = torch.einsum("ij,kjyx->kiyx", self.mix, picture.to(self.spread) - 0.5)
        return (self.down @ centred @ self.across.T) / self.spread

    def rows(self, z: Tensor) -> list[Tensor]:
        """Inputs of every view's matrix, [n, d] each."""
        self.evaluations += 1
        self._seen.clear()
        with suppress(Reached):
            self.victim.module(pixel_values=self.victim.processor.normalised(self.picture(z)).to(self.dtype))
        return [self._seen[view.owner][0].to(z.dtype) for view in self.views]

    def __call__(self, z: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        """Outside and open shares, summed over the views."""
        parts = [view(x, ridge) for view, x in zip(self.views, self.rows(z), strict=True)]
        return torch.stack([a for a, _ in parts]).sum(), torch.stack([b for _, b in parts]).sum()

    @torch.no_grad()
    def nats(self, z: Tensor, cap: float) -> float:
        """Minus the log-posterior, up to a constant, where no direction weighs more than `cap`."""
        total = 0.5 * float(z.double().square().sum())
        for view, x in zip(self.views, self.rows(z), strict=True):
            total += view.scale * sum(float(part) for part in view(x, view.ridge(cap), cap))
        return total

    def expected(self, cap: float) -> float:
        """The same at the true picture."""
        return 0.5 * self.spread.numel() + sum(view.expected(cap) for view in self.views)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks and evaluation mode for the duration; the model is left as it was found."""
        with reaching(self.victim.module, [view.owner for view in self.views], self._seen):
            yield

    def down_to(self, z: Tensor, ridge: float, prior: float, budget: int) -> Tensor:
        """L-BFGS until it stands, or `budget` evaluations more."""
        z = z.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [z],
            max_iter=budget,
            max_eval=budget,
            history_size=MEMORY,
            tolerance_grad=0,
            tolerance_change=1e-9,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            with torch.enable_grad():
                outside, open_ = self(z, ridge)
                value = outside + open_ + prior * z.square().sum()
            (z.grad,) = torch.autograd.grad(value, z)
            return value.detach()

        optimizer.step(closure)  # type: ignore[arg-type, no-untyped-call]
        return z.detach()


def view(victim: Victim, observation: Observation, entry: Entry, inputs: int) -> View:
    """The space of one matrix at the rank that the number of patches says, and what noise leaves of each direction."""
    gradient = matrix(victim.module, entry, observation.gradients[entry.name]).double()
    centred = entry.component == "attn_key"
    scaled, columns = even(gradient) if proportional(observation) else (gradient, torch.ones_like(gradient[0]))
    _, values, right = torch.linalg.svd(scaled, full_matrices=False)
    rank = min(inputs - centred, len(values)) if values[0] > 0 else 0
    rows, d = gradient.shape
    noise = values[rank:].square().sum() / max(1, (rows - rank) * (d - rank))
    most = (rows**0.5 + d**0.5) ** 2
    strength = values[:rank].square() / (noise * most).clamp_min(1e-300)
    owner = victim.module.get_submodule(entry.module)
    device = next(victim.module.parameters()).device
    space = right[:rank].to(device), strength.to(device), columns.to(device)
    return View(owner, *space, centred, 0.5 * most)


def _like(victim: Victim) -> Tensor:
    """Where the model is, in its own format or at least float32: a descent needs as much."""
    weight = next(victim.module.parameters())
    return weight.new_empty(0, dtype=torch.promote_types(weight.dtype, torch.float32))
