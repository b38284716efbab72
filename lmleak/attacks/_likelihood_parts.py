"""Parts of a release in which a sentence is easier to find than in the whole: its lowest layers, or its upper third."""

from __future__ import annotations

from collections.abc import Sequence

from lmleak.attacks._likelihood_score import Candidate, Scorer
from lmleak.records import Entry

UPPER = 0.7  #: share of the gradient's energy that the upper layers must hold for a first look to rest on them
CHEAP = 0.35  #: cost of a sentence where only the upper layers are looked at: MiniLM 3.3 of 9.5 ms
#: Standard deviations of the noise by which the gradient of a layer stands out for mixtures of words to be led by it.
#: MiniLM, layer 0, a relaxation of 480 evaluations: at 59 and more it ends with 9 or 10 of 10 words in its restarts'
#: sentences, at 25 it fits the noise better than the truth does and has hardly more than it began with.
LOUD = 40.0
DRAWN = 8  #: sentences that say so


def lower(scorer: Scorer, drawn: Sequence[Candidate]) -> tuple[Entry, ...]:
    """The matrices of the lowest layers, as few as rise above the noise; none where none do.

    The lower a layer, the more its gradient says of words and their places and the less of the sentence as a whole.
    MiniLM, all gradients, noise multiplier 0.001: the pooler holds 70 % of the energy, and a search by all of it ended
    in 5 of 11 words; by layer 0, 0.4 % of the energy, in 11.

    Args:
        drawn: sentences drawn without the gradient, which tell how large its parts are.
    """
    for last in sorted({e.layer for e in scorer.entries if e.layer is not None}):
        entries = tuple(e for e in scorer.entries if e.layer is not None and e.layer <= last)
        part = scorer.part(entries)
        _, squares = part.measures(drawn[:DRAWN])
        scorer.evaluations += part.evaluations
        if float(squares.median()) ** 0.5 > LOUD * scorer.noise:
            return entries
    return ()


def upper(scorer: Scorer) -> Scorer | None:
    """The same release as its upper third shows it, a third of the cost; None where that says too little.

    MiniLM's pooler and head hold 87 % of its gradient's energy, and need no backward pass. They rank words like the
    whole does: a true word second or third of 128 where it is second or third by all modules.
    """
    mechanism = scorer.mechanism
    if mechanism is None or mechanism.max_grad_norm is None or mechanism.scope == "per_layer" or scorer.batch > 1:
        return None
    signal = {e.name: beyond_noise(scorer, e) for e in scorer.entries}
    layers = [e.layer for e in scorer.entries if e.layer is not None]
    first = 2 * (max(layers, default=0) + 1) / 3
    place = {e.name: i for i, e in enumerate(scorer.entries)}
    low = [place[e.name] for e in scorer.entries if e.layer is not None and e.layer < first]
    kept = scorer.entries[max(low, default=-1) + 1 :]
    kept = tuple(e for e in kept if e.layer is not None or e.component in ("pooler", "head"))
    held = sum(signal[e.name] for e in kept)
    if not low or not held > UPPER * sum(signal.values()):
        return None
    above = tuple(e for e in kept if e.layer is None)
    if sum(signal[e.name] for e in above) > UPPER * sum(signal.values()):
        kept = above
    other = scorer.part(kept).profile()
    other.price = CHEAP
    return other


def beyond_noise(scorer: Scorer, entry: Entry) -> float:
    """Energy of an entry's gradient beyond what its noise has, once in a thousand."""
    noise = (entry.numel + 3.0 * (2.0 * entry.numel) ** 0.5) * scorer.noise**2
    return max(0.0, float(scorer.targets[entry.name].double().square().sum()) - noise)
