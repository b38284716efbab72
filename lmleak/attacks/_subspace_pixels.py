"""`subspace` on images: the picture whose inputs at any block of a vision transformer fill the space of its gradient.

One forward pass to the module and one plain backward pass a step: no label, no double backward. Three things make it
work, *measured* on an untrained 6-layer ViT (d = 192, patches of 4 x 4), a CIFAR-10 picture, one query of block 2:

    rows in the space, Adam on pixels, 1,000 steps                        24 dB
    the same in the coordinates in which photos have equal spread,
    by L-BFGS (coarse shapes come first by themselves)                    25 dB in 6 CPU s, then a wrong minimum
    and the space filled by the rows, each direction alike                44 dB in 4 CPU s

A start may end in a wrong minimum (2 of 10 pictures, 18 and 27 dB): starts take turns, and 10 of 10 have 39 dB and
more (median 41; 15 CPU s on average). With the noise made of one size the true picture leaves 3e-6 outside the space
instead of 3e-5, and what float32's rounding hides is known: after a training that made inputs nearly alike a fifth of
the space is clear, where four fifths seemed so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmleak.attacks._energy import Reached
from lmleak.attacks._rowspace import matrix
from lmleak.attacks._span_prior import Photo, even, proportional
from lmleak.attacks._text import refuse
from lmleak.gradients._tree import Tree
from lmleak.records import Entry, Observation, Reconstruction, Victim

#: Ridge on the rows, and weight of the prior, one descent after another: strong directions first.
STAGES = ((1e-3, 1e-3), (1e-4, 1e-3), (1e-5, 1e-4))
#: The same from farther away: leads elsewhere, so that starts take turns (a picture at 18 dB came to 43).
SLOWLY = ((1e-2, 1e-3), (1e-3, 1e-3), (1e-3, 1e-4), (1e-4, 1e-4), (1e-5, 1e-4))
DONE = 0.01  #: of the inputs outside, summed: another start finds nothing better. Wrong minima have 0.05 and more
MEMORY = 30  #: of L-BFGS
START = 1e-2  #: spread of the first picture around grey, where photos have 1
ENOUGH = 0.3  #: equations a pixel; what is missing has to come from the prior
SURE = 0.5  #: least confidence of an answer where it can be told


@dataclass(frozen=True)
class View:
    """One observed matrix: where it is, and the space that its inputs fill."""

    owner: nn.Module
    basis: Tensor  #: [r, d]
    clear: Tensor  #: [r] how much of each direction is above the noise, 0..1
    columns: Tensor  #: [d] inputs are divided by them first, which makes the noise of one size
    centred: bool  #: a key's space holds differences of inputs only

    @property
    def equations(self) -> float:
        """How many the inputs obey: what lies outside the space of each direction that is above the noise."""
        return float(self.clear.sum()) * (self.basis.shape[1] - len(self.basis))

    def __call__(self, x: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        """Share of the rows x [n, d] outside the space, summed; and share of the space that they leave open."""
        x = x - x.mean(0) if self.centred else x
        x = nn.functional.normalize(x / self.columns, dim=-1)
        p = x @ self.basis.T
        outside = (x - p @ self.basis).square().sum()
        # In float64: at the last ridge the rows' products are conditioned like its inverse.
        gram = (x @ x.T).double() + ridge * torch.eye(len(x), dtype=torch.float64, device=x.device)
        covered = (torch.linalg.solve(gram, p.double()) * p.double()).sum(0)
        # Where noise hides directions, rows may leave what is seen of the space.
        return outside * self.clear.mean() ** 2, (self.clear * (1 - covered)).sum().to(x)


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

    def __call__(self, z: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        """Outside and open shares, summed over the views."""
        self.evaluations += 1
        self._seen.clear()
        with suppress(Reached):
            self.victim.module(pixel_values=self.victim.processor.normalised(self.picture(z)).to(self.dtype))
        parts = [view(self._seen[view.owner][0].to(view.basis), ridge) for view in self.views]
        return torch.stack([a for a, _ in parts]).sum(), torch.stack([b for _, b in parts]).sum()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks and evaluation mode for the duration; the model is left as it was found."""
        module = self.victim.module
        owners = {view.owner for view in self.views}
        modes = {m: m.training for m in module.modules()}
        wanted = [p for p in module.parameters() if p.requires_grad]

        def reach(owner: nn.Module, args: tuple) -> None:
            self._seen[owner] = args[0]
            if len(self._seen) == len(owners):
                raise Reached

        handles = [owner.register_forward_pre_hook(reach) for owner in owners]
        try:
            module.eval()
            for p in wanted:
                p.requires_grad_(False)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for p in wanted:
                p.requires_grad_(True)
            for m, training in modes.items():
                m.training = training
            self._seen.clear()

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


def attack_pixels(
    observation: Observation,
    victim: Victim,
    components: Sequence[str],
    budget: int,
    restarts: int,
    generator: torch.Generator,
    progress: Callable[[str], None],
) -> Reconstruction:
    """Seeks the one picture behind weight gradients of a vision transformer's blocks."""
    found = _entries(observation, victim, components)
    if isinstance(found, Reconstruction):
        return found
    layer = victim.family.patch_layer(victim.module)
    inputs = len(layer.offset) + len(layer.first)
    views = [view(victim, observation, e, inputs) for e in found]
    if not views or not any(len(one.basis) for one in views):
        return refuse("no_signal", "every observed gradient is zero")
    views = [one for one in views if len(one.basis)]
    tight = [one for one in views if one.basis.shape[1] > len(one.basis)]
    if not tight:
        why = f"{inputs} inputs fill the width {views[0].basis.shape[1]}: nothing lies outside their space"
        return refuse("not_applicable", why)
    told, pixels = sum(one.equations for one in tight), layer.projection.shape[1] * len(layer.offset)
    if told < ENOUGH * pixels:
        seen = max(float(one.clear.sum()) for one in tight)
        why = f"{seen:.1f} of {inputs} directions are above the noise: {told:.0f} equations for {pixels} pixels"
        return refuse("no_signal", why)
    descent = Descent(victim, tight)
    free = layer.projection.shape[1] / max(one.basis.shape[1] - len(one.basis) for one in tight)
    best: tuple[float, Tensor] | None = None
    details: dict[str, Any] = {"rank": max(len(one.basis) for one in tight)}
    with descent.attached():
        with torch.no_grad():
            grey = float(descent(torch.zeros(descent.shape).to(descent.spread), 1.0)[0])
        for turn in range(restarts):
            z = START * torch.randn(descent.shape, generator=generator).to(descent.spread)
            for ridge, prior in SLOWLY if turn % 2 else STAGES:
                left = budget // 3 - descent.evaluations  # a backward pass costs as much as two forward ones
                if left > 0:
                    z = descent.down_to(z, ridge, prior, left)
            with torch.no_grad():
                outside, open_ = (float(part) for part in descent(z, STAGES[-1][0]))
            progress(f"start {turn + 1}: {outside:.3g} of the inputs outside, {open_:.3g} of the space open")
            if best is None or outside + open_ < best[0]:
                best = outside + open_, z
                explained = 1 - outside / max(grey, 1e-30)
                filled = 1 - open_ / max(1e-30, sum(float(one.clear.sum()) for one in tight))
                details |= {"outside": outside, "open": open_, "explained": explained}
            if outside < DONE or 3 * descent.evaluations >= budget:
                break
        assert best is not None
        picture = descent.picture(best[1]).clamp(0, 1).float()
    details["evaluations"] = descent.evaluations
    sure = filled * max(0.0, (details["explained"] - free) / (1 - free)) if free < 1 else 0.0
    if free < 1 and sure < SURE:
        why = f"the best picture explains {details['explained']:.2g} of the space, pixels explain {free:.2g} of noise's"
        return refuse("no_signal", why, details)
    return Reconstruction(images=picture, confidence=(sure,), details=details)


def reads_pixels(victim: Victim, observation: Observation, entry: Entry, components: Sequence[str]) -> bool:
    """Whether one module may be enough: any matrix of a block but the last, of one picture."""
    return entry.component in components and not isinstance(_entries(observation, victim, components), Reconstruction)


def _entries(observation: Observation, victim: Victim, components: Sequence[str]) -> list[Entry] | Reconstruction:
    if not hasattr(victim.family, "patch_layer"):
        return refuse("not_applicable", f"'{victim.kind}' is no vision transformer: its inputs' number is not known")
    if observation.batch_size > 1:
        return refuse("not_applicable", f"{observation.batch_size} pictures: their inputs share one space")
    modules = victim.module.modules()
    if observation.mode == "train" and any(isinstance(m, nn.Dropout) and m.p > 0 for m in modules):
        return refuse("not_applicable", "dropout is on in the client: the row space is that of dropped-out inputs")
    entries = [e for e in observation.entries if len(e.shape) > 1 and e.component in components]
    if not entries:
        return refuse("not_applicable", f"needs the weight gradient of one of {', '.join(components)}")
    last = Tree(victim.module, victim.family).depth - 1
    whole = [e for e in entries if e.layer != last]
    if not whole:
        return refuse("not_applicable", "the last block: behind its attention only [CLS] carries loss")
    return whole


def view(victim: Victim, observation: Observation, entry: Entry, inputs: int) -> View:
    """The space of one matrix at the rank that the number of patches says, and what noise leaves of each direction."""
    gradient = matrix(victim.module, entry, observation.gradients[entry.name]).double()
    like = _like(victim)
    centred = entry.component == "attn_key"
    scaled, columns = even(gradient) if proportional(observation) else (gradient, torch.ones_like(gradient[0]))
    _, values, right = torch.linalg.svd(scaled, full_matrices=False)
    rank = min(inputs - centred, len(values)) if values[0] > 0 else 0
    rows, d = gradient.shape
    noise = values[rank:].square().sum() / max(1, (rows - rank) * (d - rank))
    edge = noise * (rows**0.5 + d**0.5) ** 2
    clear = (1 - edge / values[:rank].square().clamp_min(1e-300)).clamp_min(0)
    owner = victim.module.get_submodule(entry.module)
    return View(owner, right[:rank].to(like), clear.to(like.device), columns.to(like), centred)


def _like(victim: Victim) -> Tensor:
    """Where the model is, in its own format or at least float32: a descent needs as much."""
    weight = next(victim.module.parameters())
    return weight.new_empty(0, dtype=torch.promote_types(weight.dtype, torch.float32))
