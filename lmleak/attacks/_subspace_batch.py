"""The subspace attack on a batch: which sentences lie together in the observed spaces.

Layer 0's query, key and value, if all or at least the value is observed, show where every word stands and with which
others (`_batch_pairs`), and a deeper module confirms whole sentences (`_batch_guided`). Without the value the words are
still known, without all three nothing is, and sentences are searched one at a time (`_batch_search`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from lmleak.attacks._applicability import ATTENTION
from lmleak.attacks._batch_energy import Deflated, batch_site, batch_space
from lmleak.attacks._batch_fill import Fill
from lmleak.attacks._batch_found import Found
from lmleak.attacks._batch_guided import Guided
from lmleak.attacks._batch_pairs import Basis
from lmleak.attacks._batch_places import Places, admitted
from lmleak.attacks._batch_search import BatchSearch
from lmleak.attacks._energy import Site
from lmleak.attacks._rowspace import RowSpace, describe, known_input, matrix
from lmleak.attacks._subspace_relax import Schedule
from lmleak.attacks._subspace_sentence import RIDGE
from lmleak.attacks._text import Frame, refuse, sentence, special_frame
from lmleak.attacks._vocabulary import vocabulary
from lmleak.records import Entry, Knowledge, Observation, Reconstruction, Victim

if TYPE_CHECKING:
    from lmleak.attacks.subspace import Config

STEPS = 30  #: of a relaxation at least
# Inputs of ffn_out are four times as wide as others: no other sentence's come near. Keys show differences only.
ORDER = ("ffn_out", "attn_value", "attn_query", "ffn_in", "attn_output", "attn_key")
# Share of a gradient outside the words and positions admitted: MiniLM 2e-7, float32's rounding.
MISFIT = 1e-4


def batch(
    config: Config,
    observation: Observation,
    knowledge: Knowledge,
    victim: Victim,
    entries: tuple[Entry, ...],
    generator: torch.Generator,
    progress: Callable[[str], None],
) -> Reconstruction:
    """Several sentences, from `entries` in any layers but the last."""
    layers = victim.module.config.num_hidden_layers
    layer, frame = known_input(victim), special_frame(victim, knowledge)
    readers = [e for e in entries if e.layer == 0 and e.component in ATTENTION]
    if layer is None or layer.position is None or not frame.first:
        readers = []
    deeper = [e for e in entries if e not in readers and e.layer is not None and e.layer < layers - 1]
    if not deeper:
        why = "layer 0's query, key and value show words and positions; which belong together, a module behind them"
        return refuse("not_applicable", f"several sentences need a module that is not in the last layer: {why}")
    sites = _sites(victim, observation, deeper)
    space = batch_space([matrix(victim.module, e, observation.gradients[e.name]) for e in readers]) if readers else None
    if not sites or (space is not None and not space.rank):
        gap = space.gap if space is not None else 1.0
        why = "no spectrum falls to rounding: noise, or as many tokens as dimensions"
        return refuse("no_signal", why, {"gap": gap})
    places = None
    if space is not None:
        places = admitted(victim, readers, space, frame, generator)
        if not places.lengths:
            why = "layer 0's row space admits no word: the gradient is of another model"
            return refuse("no_signal", why, describe(space))
    return _Batch(config, observation, victim, sites, places, space, readers, frame, generator, progress).run()


def _sites(victim: Victim, observation: Observation, entries: list[Entry]) -> list[Site]:
    """The clearest module: of the shallowest layer, by `ORDER`. One is enough, others of its input add nothing."""
    rank = {component: i for i, component in enumerate(ORDER)}
    for e in sorted(entries, key=lambda e: (e.layer, rank.get(e.component or "", len(rank)))):
        one = batch_site(victim, observation, e)
        if one.space.rank:
            return [one]
    return []


class _Batch:
    """One attack on one batch."""

    def __init__(
        self,
        config: Config,
        observation: Observation,
        victim: Victim,
        sites: list[Site],
        places: Places | None,
        space: RowSpace | None,
        readers: list[Entry],
        frame: Frame,
        generator: torch.Generator,
        progress: Callable[[str], None],
    ):
        self.config, self.observation, self.victim = config, observation, victim
        self.places, self.space, self.readers, self.frame = places, space, readers, frame
        self.generator, self.sites = generator, sites
        self.energy = Deflated(victim, sites)
        self.schedule = Schedule(
            max(STEPS, config.steps), config.restarts, config.rate, config.ridge, 0.1 * config.ridge
        )
        self.budget = config.budget * observation.batch_size
        show = lambda t: progress(victim.processor.decode(list(t), skip_special_tokens=True))  # noqa: E731
        self.found = Found(self.energy, observation.batch_size, RIDGE, show)

    def run(self) -> Reconstruction:
        size = self.observation.batch_size
        search = self._search()
        if isinstance(search, Guided):
            search.run()
        else:
            with self.energy.attached():
                search.run()
        found, guesses = self.found.sentences, search.doubtful()
        details: dict[str, Any] = {
            "rank": self.sites[0].space.rank,
            "gap": round(self.sites[0].space.gap, 3),
            "module": self.sites[0].entry.module,
            "by": "guided" if isinstance(search, Guided) else "open" if self.places is None else "blind",
        }
        details |= {"found": len(found), "left": self.energy.left, "evaluations": self.energy.evaluations}
        if self.space is not None and self.places is not None:
            details |= {"rank_layer_0": self.space.rank, "words": len(self.places.words)}
        confidence = [1.0 - 0.5 * verdict for verdict in found.values()]
        if len(found) == size or not self.energy.left:
            return sentence(self.victim, list(found), confidence, details)
        why = f"found {len(found)} of {size} sentences; {self.energy.left} inputs are left unexplained"
        answers = [*found, *guesses]
        confidence += [0.1] * len(guesses)
        return sentence(self.victim, answers, confidence, details, status="budget_exhausted", reason=why)

    def _search(self) -> Guided | BatchSearch:
        if self.places is not None and any(e.component == "attn_value" for e in self.readers):
            special = torch.tensor([*self.frame.first, *self.frame.last], device=self.places.words.device).unique()
            count = len(self.frame.first) + len(self.places.allowed)
            basis = Basis(self.victim, self.readers, torch.cat([special, self.places.words]), count)
            if basis.misfit(self.observation.gradients) < MISFIT:
                fill = Fill(self.found, self.frame, self.schedule, self.generator)
                return Guided(self.victim, self.observation, basis, fill, self.budget)
        words = self.places.words if self.places else vocabulary(self.victim).to(self.energy.table.device)
        return BatchSearch(
            self.found, self.frame, words, self.places, self.config.shortlist, self.budget, self.generator
        )
