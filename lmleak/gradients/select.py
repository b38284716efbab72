"""Which modules' gradients leave the machine: PEFT's dialect, resolved to names, with an error where PEFT is silent.

* `target_modules`: a list of exact names or dotted suffixes, where an entry with `*` or `?` is a glob over the whole
  dotted name; or one string, a regular expression that must match the whole dotted name; or `all-linear`; or `all`.
  A match selects the module's own parameters (not its children's; for those write a glob).
* `exclude_modules`: the same spelling; a match takes out the module and everything in it.
* `layers`: `0`, `-1`, `3-5`, `"0,3-5"` or a list of those, for every form.
* `components`: family-independent names. On a fused weight (GPT-2's `c_attn`) they are slices of it.
* `parameters`: `all`, `weight` (everything but biases) or `bias`.

Everything named must have an effect; what has none is a SelectionError. Frozen parameters have no gradient and are left
out of a match; a parameter tied to another is observed once, under the name of the module that owns it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from lmleak.errors import SelectionError
from lmleak.gradients import _layers, _patterns
from lmleak.gradients._tree import Pick, Tree
from lmleak.records import Entry, Selection

if TYPE_CHECKING:
    import torch

    from lmleak.records import Victim


def select(
    victim: Victim | tuple[torch.nn.Module, ModuleType],
    *,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] = (),
    layers: int | str | Sequence[int | str] | None = None,
    components: str | Sequence[str] | None = None,
    parameters: Literal["all", "weight", "bias"] = "all",
) -> Selection:
    """Resolves patterns to parameter names. Reads names and shapes only, so a model on the meta device will do.

    Without `target_modules` and `components`, the whole model is selected, or with `layers` those whole blocks.

    Args:
        victim: the model, or a pair of torch module and family file.
        target_modules: which modules, by name (see the module's docstring).
        exclude_modules: which of them not; takes out whole subtrees.
        layers: keep only what lies in these blocks.
        components: which parts, by family-independent name; instead of `target_modules`, not beside it.
        parameters: weights, biases or both.

    Returns:
        Entries in the model's order, each once; a slice is left out where the whole parameter is selected too.

    Raises:
        SelectionError: a pattern, component, layer or exclusion has no effect, or names something that has no gradient
            of its own (a tied or frozen parameter, a module without parameters).
    """
    if target_modules is not None and components is not None:
        raise SelectionError("select: give either target_modules or components, not both")
    if parameters not in ("all", "weight", "bias"):
        raise SelectionError(f"select.parameters: {parameters!r} is not all, weight or bias")
    tree = _tree(victim)
    wanted = None if layers is None else _wanted(tree, layers)
    if target_modules is None:
        words = _words(components, "components", ["all"] if wanted is None else ["layer"])
        groups = {f"components: '{word}'": _patterns.component(tree, word) for word in words}
        strict = False
    else:
        words = [target_modules] if isinstance(target_modules, str) else _words(target_modules, "target_modules", [])
        entry = not isinstance(target_modules, str)
        groups = {f"target_modules: '{word}'": _patterns.pattern(tree, word, entry) for word in words}
        strict = not set(words) & set(_patterns.KEYWORDS)

    chosen: dict[str, Pick] = {}
    tied: dict[str, list[Pick]] = {}
    for label, picks in groups.items():
        picks = _narrow(tree, label, picks, wanted, parameters)
        chosen.update((pick.key, pick) for pick in picks if not pick.slot.tied)
        borrowed = [pick for pick in picks if pick.slot.tied]
        if borrowed and (strict or len(borrowed) == len(picks)):
            tied[label] = borrowed
    for label, picks in tied.items():
        for slot in (pick.slot for pick in picks if pick.slot.owner not in chosen):
            raise SelectionError(
                f"{label}: {slot.name} is tied: it is the same parameter as {slot.owner} and has one gradient with it; "
                f"did you mean '{slot.owner.rpartition('.')[0]}'{_meaning(tree, slot.owner)}?"
            )
    for layer in wanted or ():
        if not any(tree.layer(pick.slot.module) == layer for pick in chosen.values()):
            raise SelectionError(f"layers: nothing that is selected lies in layer {layer}")
    _exclude(tree, chosen, exclude_modules)
    kept = [pick for pick in chosen.values() if pick.part is None or pick.slot.name not in chosen]
    kept.sort(key=lambda pick: (tree.order[pick.slot.name], pick.part or ()))
    return Selection(tuple(_entry(tree, pick) for pick in kept), tree.total)


def modules_table(
    victim: Victim | tuple[torch.nn.Module, ModuleType],
    pattern: str | Sequence[str] | None = None,
    layers: int | str | Sequence[int | str] | None = None,
    components: str | Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """The modules that hold parameters, as `lmleak modules` prints them: a row for each, or for its slice.

    Args:
        victim: the model, or a pair of torch module and family file.
        pattern: as a list entry of `target_modules`; a string that matches nothing so is tried as a regular expression.
        layers: as in `select`.
        components: as in `select`.

    Returns:
        Rows of `name, type, shape` (of the largest parameter), `parameters` (count; tied ones where they are owned),
        `share` (of the model, 0..1), `component`, `layer`, `tied_to` (parameter name or None), `frozen`.

    Raises:
        SelectionError: the pattern, a layer or a component matches nothing.
    """
    tree = _tree(victim)
    wanted = None if layers is None else _wanted(tree, layers)
    if pattern is not None and components is not None:
        raise SelectionError("modules: give either a pattern or components, not both")
    if pattern is not None:
        words = [pattern] if isinstance(pattern, str) else list(pattern)
        groups = {f"pattern '{word}'": _patterns.loose(tree, word) for word in words}
    else:
        names = _words(components, "components", ["all"] if wanted is None else ["layer"])
        groups = {f"components: '{name}'": _patterns.component(tree, name) for name in names}
    rows: dict[tuple[str, str | None], list[Pick]] = {}
    for label, picks in groups.items():
        for pick in _narrow(tree, label, picks, wanted, "all", frozen=True):
            row = rows.setdefault((pick.slot.module, pick.component if pick.part else None), [])
            if pick not in row:
                row.append(pick)
    table = []
    for (module, part), picks in sorted(rows.items(), key=lambda row: tree.order[row[1][0].slot.name]):
        count = sum(math.prod(pick.shape) for pick in picks if not pick.slot.tied)
        table.append(
            {
                "name": f"{module}[{part}]" if part else module,
                "type": type(tree.modules[module]).__name__,
                "shape": max((pick.shape for pick in picks), key=math.prod),
                "parameters": count,
                "share": count / tree.total,
                "component": part or tree.component_of(module),
                "layer": tree.layer(module),
                "tied_to": next((pick.slot.owner for pick in picks if pick.slot.tied), None),
                "frozen": not any(pick.slot.trainable for pick in picks),
            }
        )
    return table


def _tree(victim: Any) -> Tree:
    module, family = victim if isinstance(victim, tuple) else (victim.module, victim.family)
    return Tree(module, family)


def _words(words: str | Sequence[str] | None, key: str, default: list[str]) -> list[str]:
    if words is None:
        return default
    words = [words] if isinstance(words, str) else list(words)
    if not words or not all(isinstance(word, str) and word for word in words):
        raise SelectionError(f"{key}: {words!r} is not a list of names; leave the key out to select everything")
    return words


def _wanted(tree: Tree, layers: Any) -> tuple[int, ...]:
    if not tree.blocks:
        raise SelectionError(f"layers: family '{tree.family}' finds no blocks in this model; use target_modules")
    return _layers.resolve(layers, tree.depth)


def _narrow(
    tree: Tree, label: str, picks: list[Pick], wanted: tuple[int, ...] | None, parameters: str, frozen: bool = False
) -> list[Pick]:
    """Applies layers and filters; says which of them left nothing."""
    if wanted is not None:
        inside = [pick for pick in picks if tree.layer(pick.slot.module) in wanted]
        if not inside:
            has = sorted({layer for pick in picks if (layer := tree.layer(pick.slot.module)) is not None})
            where = f"only in layers {', '.join(map(str, has))}" if has else "outside the layers"
            raise SelectionError(f"{label} matches nothing in layers {', '.join(map(str, wanted))}: it lies {where}")
        picks = inside
    if parameters != "all":
        of_kind = [pick for pick in picks if pick.slot.is_bias == (parameters == "bias")]
        if not of_kind:
            raise SelectionError(f"{label}: none of it is a {parameters} ({picks[0].slot.name}, ...)")
        picks = of_kind
    if not frozen:
        live = [pick for pick in picks if pick.slot.trainable]
        if not live:
            raise SelectionError(f"{label}: {picks[0].slot.name} is frozen (requires_grad is off): it has no gradient")
        picks = live
    return picks


def _exclude(tree: Tree, chosen: dict[str, Pick], exclude: str | Sequence[str]) -> None:
    entry = not isinstance(exclude, str)
    words = [exclude] if isinstance(exclude, str) else exclude
    for word in words:
        roots = [name for name in tree.modules if name and _patterns.matcher(tree, word, entry)(name)]
        if not roots:
            raise SelectionError(f"exclude_modules: '{word}' matches no module{_patterns.nearest(tree, word, entry)}")
        out = {name for root in roots for name in tree.below(root)}
        gone = [key for key, pick in chosen.items() if pick.slot.module in out]
        if not gone:
            slots = [slot for name in out for slot in tree.slots[name]]
            owner = next((f" ({slot.name} is tied to {slot.owner})" for slot in slots if slot.tied), "")
            raise SelectionError(f"exclude_modules: '{word}' takes nothing out: {roots[0]} is not selected{owner}")
        for key in gone:
            del chosen[key]
    if not chosen:
        raise SelectionError("exclude_modules: nothing is left of the selection")


def _meaning(tree: Tree, parameter: str) -> str:
    component = tree.component_of(parameter.rpartition(".")[0])
    return f" (component '{component}')" if component else ""


def _entry(tree: Tree, pick: Pick) -> Entry:
    slot = pick.slot
    component = pick.component or tree.component_of(slot.module)
    return Entry(pick.key, slot.name, slot.module, pick.shape, tree.layer(slot.module), component, pick.part)
