"""Discrete search for the likeliest sentence under a known Gaussian mechanism, DP-SGD's (after LAMP, 2202.08827).

DP-SGD releases the sum of clipped per-sample gradients plus Gaussian noise of known size. No attack names the sample
more often than the one that takes the sentence of highest posterior: <G~, g_c(x)> - |g_c(x)|^2 / 2 over the noise's
variance, plus the log of its prior. `g_c(x)` is the candidate's own clipped gradient. Without noise this is euclidean
gradient matching over sentences instead of embeddings (Balunovic et al. 2022, 2202.08827).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from lmleak import registry
from lmleak.attacks._likelihood_moves import Space
from lmleak.attacks._likelihood_parts import lower, upper
from lmleak.attacks._likelihood_prior import log_prior
from lmleak.attacks._likelihood_relax import relaxed
from lmleak.attacks._likelihood_score import Candidate, Scorer
from lmleak.attacks._likelihood_search import STARTS, LogPrior, Search
from lmleak.attacks._likelihood_verdict import Verdict, hopeless, judge
from lmleak.attacks._likelihood_words import Evidence
from lmleak.attacks._objective import frozen
from lmleak.attacks._prior import Task
from lmleak.attacks._rowspace import dropped_out
from lmleak.attacks._text import Frame, refuse, sentence, special_frame
from lmleak.attacks._vocabulary import frequency
from lmleak.defenses import gaussian
from lmleak.gradients.factors import unfactored
from lmleak.records import Entry, Knowledge, Observation, Reconstruction, Victim

Positive = Annotated[int, Field(gt=0)]

ROUNDS = 4  #: how often each of several sentences is sought, given the others
CLEAR = 2.0  #: a matrix whose energy is this many times its noise's is clean enough for the exact attacks
LOOK = 0.6  #: share of the budget spent on the lowest layers alone, or on the upper ones
HEARD = 48  #: drawn sentences that say how large output gradients are
KEPT = 6  #: best sentences of the first look that the whole release is asked about
#: An easy case, for the contract tests.
EXAMPLE = {
    "fields": {"budget": 600, "shortlist": 16},
    "select": {"components": ["all"]},
    "knowledge": {"labels": True, "lengths": True},
    "batch_size": 1,
}


class Config(BaseModel):
    """Effort, prior, and how rarely noise may be taken for a sentence."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: sentences sent through the model, for each sentence of the batch; a slope counts as three, and one of which only
    #: the upper layers are looked at as a third
    budget: Positive = 6000
    shortlist: Positive = 64  #: tokens tried at every position before a sentence counts as a local optimum
    longest: Annotated[int, Field(ge=3)] = 24  #: tokens, special ones included, where lengths are not granted
    exact: bool = True  #: start from what subspace (encoders) or prefix (decoders) reads where the gradient is clean
    prior: str | None = None  #: a text file (.txt), or a language model (hub id, folder, package:NAME/PATH)
    prior_task: Task = "causal-lm"
    prior_weight: Annotated[float, Field(ge=0)] = 1.0
    risk: Annotated[float, Field(gt=0, lt=1)] = 1e-3  #: at most so often noise alone is answered with a sentence


def attack(
    config: Config,
    observation: Observation,
    knowledge: Knowledge,
    victim: Victim,
    generator: torch.Generator,
    progress: Callable[[str], None],
) -> Reconstruction:
    """Ascends the likelihood; several sentences one after another, each given the others.

    It starts where mixtures of words lead, if the lowest layers rise above the noise, else from drawn sentences.

    `details` per sentence: `gap` (nats to the best rival scored), `gain` over the best of sentences drawn without the
    gradient and the `bound` that it has to exceed, `worth` (nats that each token adds over drawn ones), `fit` (standard
    deviations from what the truth would score).

    Raises:
        LmleakError: the prior cannot be read.
    """
    why = _refused(victim, observation)
    if why is not None:
        return refuse(*why)
    mechanism = gaussian(observation.defense)
    scorer = Scorer(victim, observation, mechanism)
    if unfactored(victim.module, scorer.scope):
        return refuse("not_applicable", "the model has layers without factored gradients")
    if not any(float(g.abs().max()) > 0 for g in scorer.targets.values()):
        return refuse("no_signal", "the observed gradient is zero")
    frame = special_frame(victim, knowledge)
    if knowledge.lengths and min(knowledge.lengths) <= frame.size:
        return refuse("no_signal", "a sentence of special tokens alone has nothing to find")
    prior, counts = log_prior(config.prior, victim, config.prior_task) if config.prior else (None, None)
    if prior is not None and scorer.noise == 0:
        return refuse("not_applicable", "a prior weighs against noise, and this release has none; leave it out")
    spaces = _spaces(config, observation, knowledge, victim, scorer, frame, counts)
    weighed = _weighed(prior, config.prior_weight)
    with frozen(victim.module):
        # A generator of its own: what it draws is not what a search starts from.
        draw = torch.Generator().manual_seed(generator.initial_seed())
        drawn = spaces[0].drawn(STARTS, draw)
        lost = None if prior else hopeless(scorer, spaces[0], drawn, config.risk)
        # Where the label is the sentence itself, a mixture of words has none; mixtures of several sentences: not tried.
        mixed = victim.task == "sequence-classification" and scorer.batch == 1
        loud = lower(scorer, drawn) if mixed and not lost else ()
    if lost is not None:
        return refuse("no_signal", lost, {"evaluations": round(scorer.evaluations), "noise": scorer.noise})
    starts = _exact(config, observation, knowledge, victim, generator, scorer, frame, spaces)
    with frozen(victim.module):
        told = _told(config, victim, scorer, spaces, draw)
        spaces = _weighed_by(told, scorer, spaces)
        found, verdicts, spent = _sought(
            config, victim, scorer, loud, spaces, told, starts, weighed, generator, progress
        )
    details = {
        "labels": [one.label for one in found],
        "lengths": [len(one.tokens) for one in found],
        "evaluations": spent,
        "noise": scorer.noise,
        "sentences": [v.details() for v in verdicts],
    }
    if not any(v.signal for v in verdicts):
        return refuse("no_signal", verdicts[0].reason(), details)
    return sentence(victim, [one.tokens for one in found], [v.confidence for v in verdicts], details)


def _refused(victim: Victim, observation: Observation) -> tuple[Literal["not_applicable"], str] | None:
    if victim.task not in ("sequence-classification", "causal-lm"):
        return "not_applicable", f"the loss of {victim.task} depends on which tokens were masked, and nobody says"
    if not any(len(e.shape) > 1 for e in observation.entries):
        return "not_applicable", "needs a weight matrix: biases and norms show sums over tokens alone"
    if dropped_out(victim, observation):
        return "not_applicable", "dropout is on in the client: its gradient is random beyond the stated noise"
    attention = getattr(victim.module.config, "_attn_implementation", "eager")
    if attention != "eager":
        why = f"attn_implementation '{attention}' has no double backward; set model.attn_implementation: eager"
        return "not_applicable", why
    return None


def _sought(
    config: Config,
    victim: Victim,
    scorer: Scorer,
    loud: tuple[Entry, ...],
    spaces: list[Space],
    told: Evidence | None,
    starts: list[Candidate | None],
    prior: LogPrior | None,
    generator: torch.Generator,
    progress: Callable[[str], None],
) -> tuple[list[Candidate], list[Verdict], int]:
    """The sentences, what may be said of each, and the evaluations spent."""
    b, found, spent = len(spaces), list(starts), scorer.evaluations
    budget = config.budget - min(spent / b, 0.5 * config.budget)  # what was asked before any sentence
    verdicts: list[Verdict | None] = [None] * b
    rounds = ROUNDS if b > 1 else 1
    show = lambda one: progress(victim.processor.decode(list(one.tokens), skip_special_tokens=True))  # noqa: E731
    for turn in range(rounds):
        # A sentence read exactly is not sought again before the others have something to say of the rest.
        for i in sorted(range(b), key=lambda i: starts[i] is not None):
            space = spaces[i]
            # What the other sentences explain is not to be explained again.
            rest = dict(scorer.targets)
            for j, other in enumerate(found):
                if j != i and other is not None:
                    rest = {name: rest[name] - part for name, part in scorer.total(other).items()}
            aimed = scorer.aimed(rest, scorer.noise)
            search = Search(aimed, space, config.shortlist, generator, prior, told, led=bool(loud))
            limit = budget / rounds
            begun = [one for one in found[i : i + 1] if one is not None]
            if not begun and len(space.lengths) == 1:  # a part of the modules does not tell lengths apart
                begun = _first_look(aimed, loud, space, told, config, LOOK * limit, prior, generator, show)
            found[i] = search.run(limit, show, begun)
            if turn + 1 == rounds:
                verdicts[i] = judge(aimed, search, space, config.risk, generator)
            spent += aimed.evaluations
    return [one for one in found if one is not None], [v for v in verdicts if v is not None], round(spent)


def _first_look(
    scorer: Scorer,
    loud: tuple[Entry, ...],
    space: Space,
    told: Evidence | None,
    config: Config,
    limit: float,
    prior: LogPrior | None,
    generator: torch.Generator,
    show: Callable[[Candidate], None],
) -> list[Candidate]:
    """Sentences to start from, found in a part of the release."""
    part = scorer.part(loud) if loud else upper(scorer)
    if part is None:
        return []
    begun = relaxed(part, space, limit, generator) if loud else []
    if len(part.entries) < len(scorer.entries):
        evidence = None if part.profiled else told
        first = Search(part, space, config.shortlist, generator, prior, evidence, led=bool(loud))
        first.run(limit, show, begun)
        begun = sorted(first.local or first.known, key=first.known.__getitem__, reverse=True)[:KEPT]
    scorer.evaluations += part.evaluations
    return begun


def _spaces(
    config: Config,
    observation: Observation,
    knowledge: Knowledge,
    victim: Victim,
    scorer: Scorer,
    frame: Frame,
    counts: torch.Tensor | None,
) -> list[Space]:
    """What each sentence of the batch may be."""
    special = set(victim.processor.all_special_ids)
    size = min(len(scorer.table), len(victim.processor))
    texts = victim.processor.convert_ids_to_tokens(list(range(size)))
    words = torch.tensor([i for i in range(size) if i not in special and not str(texts[i]).startswith("[unused")])
    weights = (frequency(victim) if counts is None else counts)[words]
    classes = tuple(range(victim.module.config.num_labels)) if victim.task == "sequence-classification" else (0,)
    longest = min(config.longest, getattr(victim.module.config, "max_position_embeddings", config.longest) - 2)
    any_length = tuple(range(frame.size + 2, max(longest, frame.size + 2) + 1))
    if knowledge.lengths and victim.task == "causal-lm":
        scorer.loss_tokens = sum(knowledge.lengths) - len(knowledge.lengths)
    out = []
    for i in range(observation.batch_size):
        lengths = (knowledge.lengths[i],) if knowledge.lengths else any_length
        labels = (knowledge.labels[i],) if knowledge.labels else classes
        out.append(Space(words, weights, frame, lengths, labels))
    return out


def _told(
    config: Config, victim: Victim, scorer: Scorer, spaces: list[Space], generator: torch.Generator
) -> Evidence | None:
    """What the gradient itself says of words at each position; None where that is nothing."""
    if not scorer.noise:
        return None
    whole = replace(spaces[0], lengths=(max(max(space.lengths) for space in spaces),))
    drawn = whole.drawn(HEARD, generator)
    length, frame = whole.lengths[0], whole.frame
    fixed = (*range(len(frame.first)), *range(length - len(frame.last), length))
    # Where the upper layers hold most of the signal, they say more. MiniLM, one sentence, all gradients, noise
    # multiplier 0.01: 3 of 7 words with layer 0's evidence and its price, 5 without; at 0.001 4 and 3 of 9.
    return Evidence(victim, scorer, drawn, fixed, len(spaces[0].lengths) > 1 or upper(scorer) is None)


def _weighed_by(told: Evidence | None, scorer: Scorer, spaces: list[Space]) -> list[Space]:
    """The spaces with what is known before any sentence is guessed."""
    nats = told.first(scorer) if told is not None else None
    return spaces if nats is None else [one.told(nats) for one in spaces]


def _exact(
    config: Config,
    observation: Observation,
    knowledge: Knowledge,
    victim: Victim,
    generator: torch.Generator,
    scorer: Scorer,
    frame: Frame,
    spaces: list[Space],
) -> list[Candidate | None]:
    """Sentences that an exact attack reads, as starts, where the gradient is clean enough for one."""
    starts: list[Candidate | None] = [None] * observation.batch_size
    matrices = [e for e in scorer.entries if len(e.shape) > 1]
    energy = max((float(scorer.targets[e.name].square().mean()) for e in matrices), default=0.0)
    if not config.exact or energy < CLEAR * scorer.noise**2:
        return starts
    kind = "prefix" if getattr(victim.family, "CAUSAL", False) else "subspace"
    module = registry.load("attacks", kind)
    fields = {"budget": config.budget} if kind == "subspace" else {"max_candidates": 30 * config.budget}
    answer = module.attack(module.Config(**fields), observation, knowledge, victim, generator, lambda text: None)
    longest = max(max(space.lengths) for space in spaces)
    for i, tokens in enumerate(answer.tokens[: len(starts)] if answer.status == "ok" else ()):
        whole = (*frame.first, *tokens, *frame.last)
        if not tokens or (len(whole) not in spaces[i].lengths and (knowledge.lengths or len(whole) < longest)):
            continue
        starts[i] = Candidate(whole, spaces[i].labels[0])
    return starts


def _weighed(prior: LogPrior | None, weight: float) -> LogPrior | None:
    if prior is None or not math.isfinite(weight) or weight == 0:
        return None
    return lambda rows: [weight * value for value in prior(rows)]
