"""What the cells of one or more runs are about: every cell gets its place (layer, component, defense, attack, rest)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmleak.report import _words

#: the metric a study is read by: the first of these that any cell was scored with
HEADLINE_METRICS = ("exact_match", "rougeL", "rouge1", "token_accuracy", "ssim", "psnr", "label_accuracy", "rouge2")
DIMENSIONS = ("component", "layer", "defense", "attack", "other")


@dataclass(frozen=True)
class Run:
    """One run folder as read from the store."""

    name: str
    folder: Path
    recipe: Mapping[str, Any]  #: resolved recipe, sweep included
    recipe_text: str
    facts: Mapping[str, Any]  #: run.json
    lines: tuple[Mapping[str, Any], ...]  #: one aggregated line a cell
    batches: Mapping[str, Mapping[int, Mapping[str, Any]]] = field(
        default_factory=dict
    )  #: cell -> batch -> result line
    examples: Mapping[str, Mapping[int, Mapping[str, Any]]] = field(default_factory=dict)  #: cell -> batch -> texts


@dataclass(frozen=True)
class Place:
    """A cell, with its settings settled and named."""

    run: Run
    line: Mapping[str, Any]
    setting: Mapping[str, Any]  #: the recipe at this cell's axes
    component: str
    layer: str
    defense: str
    attack: str
    other: str  #: every other axis but the seed and the control
    control: str = ""  #: which control this cell is; empty for the attack itself

    @property
    def cell(self) -> str:
        return str(self.line["cell"])

    @property
    def status(self) -> str:
        return str(self.line["status"])

    @property
    def defended(self) -> bool:
        return _block(self.setting, "defense").get("kind", "none") != "none"

    @property
    def seed(self) -> str:
        return str(self.setting.get("seed", ""))

    @property
    def batch_size(self) -> int:
        return int(_block(self.setting, "data").get("batch_size") or 1)

    @property
    def share(self) -> float | None:
        return (self.line.get("select") or {}).get("share")

    def score(self, metric: str) -> Mapping[str, Any] | None:
        """`{mean, low, high, n}` over all batches of a cell that has an answer, else None.

        Batches without an answer count by the best guess or as nothing recovered, so that an attack which answers only
        where it is easy gains nothing by it.
        """
        return best(self.line, metric) if self.status == "ok" else None

    def guess(self, metric: str) -> Mapping[str, Any] | None:
        """The same of a cell whose every search ended without an answer: what its best guesses score."""
        return best(self.line, metric) if self.status == "budget_exhausted" else None

    @property
    def answered(self) -> tuple[int, int]:
        """Batches with an answer, and batches attacked."""
        counts = {k: v for k, v in (self.line.get("batches") or {}).items() if k not in ("missing", "failed")}
        return counts.get("ok", 0), sum(counts.values())

    @property
    def seconds(self) -> float | None:
        """The attack's CPU seconds a batch."""
        return (self.line.get("seconds") or {}).get("attack_cpu")

    def mean(self, metric: str) -> float:
        """The score's mean, of a cell that has one."""
        score = self.score(metric)
        if score is None:
            raise KeyError(f"{self.cell} has no {metric}")
        return float(score["mean"])


def best(line: Mapping[str, Any], metric: str) -> Mapping[str, Any] | None:
    """A cell line's score over all batches, or over its answers where a run is too old to say; None without either."""
    found = (line.get("scores_all") or line.get("scores") or {}).get(metric)
    return found if found and found.get("mean") is not None else None


def places(runs: Sequence[Run]) -> list[Place]:
    """Every cell of every run, in the order of the runs and of their sweeps."""
    settled = [(run, line, settle(run.recipe, line.get("axes") or {})) for run in runs for line in run.lines]
    for _, line, setting in settled:
        # Noise calculated from an epsilon stands in the guarantee alone.
        defense, noise = _block(setting, "defense"), (line.get("privacy") or {}).get("noise_multiplier")
        if defense.get("noise_multiplier", noise) is None and noise is not None:
            setting["defense"] = {**defense, "noise_multiplier": noise}
    defenses = _words.labels(_block(setting, "defense") or {"kind": "none"} for _, _, setting in settled)
    attacks = _words.labels(_block(setting, "attack") for _, _, setting in settled)
    several = len(runs) > 1
    found = []
    for run, line, setting in settled:
        select = _block(setting, "select")
        axes = line.get("axes") or {}
        names = [k for k in axes if k.split(".")[0] not in _NAMED]
        names += [k for k in axes if k.startswith("select.") and k not in _PLACED]
        rest = [f"{_short(k, axes)} {_words.number(axes[k])}" for k in names]
        found.append(
            Place(
                run=run,
                line=line,
                setting=setting,
                component=_words.selection(select),
                layer=_words.layers(select.get("layers")),
                defense=defenses[_words.key(_block(setting, "defense") or {"kind": "none"})],
                attack=attacks[_words.key(_block(setting, "attack"))],
                other=", ".join(([run.name] if several else []) + rest),
                control="" if axes.get("control") in (None, "none") else str(axes["control"]),
            )
        )
    return found


def _short(axis: str, axes: Iterable[str]) -> str:
    """`data.batch_size` -> `batch size`, unless another axis ends alike."""
    last = axis.rsplit(".", 1)[-1]
    return last.replace("_", " ") if sum(k.rsplit(".", 1)[-1] == last for k in axes) == 1 else axis


_NAMED = frozenset({"select", "defense", "attack", "seed", "control"})
_PLACED = frozenset({"select.layers", "select.components", "select.target_modules", "select"})


def settle(recipe: Mapping[str, Any], axes: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with each swept value in its place: `select.layers` into the block, `defense` for all of it."""
    setting = {k: dict(v) if isinstance(v, Mapping) else v for k, v in recipe.items() if k != "sweep"}
    for dotted, value in axes.items():
        *parents, last = dotted.split(".")
        target = setting
        for name in parents:
            inner = target.get(name)
            target[name] = dict(inner) if isinstance(inner, Mapping) else {}
            target = target[name]
        if value is None and parents and parents[0] != "select":
            target.pop(last, None)  # the kind of this cell has no such field
        else:
            target[last] = value
    return setting


def _block(setting: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    block = setting.get(name)
    return block if isinstance(block, Mapping) else {}


def measured(line: Mapping[str, Any], kind: str, name: str) -> Mapping[str, Any] | None:
    """One value `{mean, low, high, n}` of one measure of all that a cell observes, or None."""
    return ((line.get("measures") or {}).get(kind) or {"all": {}})["all"].get(name)


def metrics(cells: Iterable[Place]) -> list[str]:
    """Metrics that any cell has, the one the study is read by first."""
    present = {name for place in cells for name in (place.line.get("scores") or {}) if place.score(name)}
    return [m for m in HEADLINE_METRICS if m in present] + sorted(present - set(HEADLINE_METRICS))


def varying(cells: Sequence[Place]) -> list[str]:
    """The dimensions in which cells differ."""
    return [name for name in DIMENSIONS if len({getattr(place, name) for place in cells}) > 1]


def ordered(cells: Sequence[Place], dimension: str) -> list[str]:
    """Distinct values of a dimension: layers by number, components as data flows, everything else as first met."""
    values = list(dict.fromkeys(getattr(place, dimension) for place in cells))
    if dimension == "layer":
        return sorted(values, key=_layer_order)
    if dimension == "component":
        known = list(_words.COMPONENTS)
        return sorted(values, key=lambda v: known.index(v) if v in known else len(known))
    return values


def _layer_order(label: str) -> tuple[int, float, str]:
    head = label.split(",")[0].split("–")[0].strip()
    try:
        first = float(head)
    except ValueError:
        return (2, 0.0, label)
    return (1 if first < 0 else 0, first, label)


def describe(place: Place, dimensions: Iterable[str]) -> str:
    """`attn_query · layer 0 · no defense`: the place in the given dimensions."""
    names = {"layer": "layer " if place.layer[:1].isdigit() and "," not in place.layer else "layers "}
    return " · ".join(names.get(d, "") + getattr(place, d) for d in dimensions if getattr(place, d)) or place.cell
