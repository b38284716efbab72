"""One pattern of the selection dialect to the parameters it names, and what was meant where it names none."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from lmleak.errors import SelectionError, did_you_mean
from lmleak.gradients._tree import COMPONENTS, Pick, Tree

KEYWORDS = ("all", "all-linear")


def component(tree: Tree, name: str) -> list[Pick]:
    picks = tree.component(name)
    if picks:
        return picks
    known = sorted({*tree.components, "layer", "encoder", "all"})
    if name not in known and name not in COMPONENTS:
        hint = did_you_mean(name, known)
        modules = "" if hint or not any(map(matcher(tree, name, True), tree.modules)) else (
            f"; as a module name write target_modules: ['{name}']"
        )  # fmt: skip
        raise SelectionError(f"components: unknown component '{name}'{hint}{modules} (there are: {', '.join(known)})")
    here = [component for component in known if tree.component(component)]
    raise SelectionError(f"components: this {tree.family} model has no '{name}' (it has: {', '.join(here)})")


def pattern(tree: Tree, word: str, entry: bool) -> list[Pick]:
    """Parameters selected by one list entry or by the whole string."""
    if word == "all":
        return tree.component("all")
    if word == "all-linear":
        linear = [name for name, module in tree.modules.items() if _is_linear(module)]
        if not linear:
            raise SelectionError("target_modules: 'all-linear' matches nothing: the model has no linear layer")
        return [Pick(slot) for name in linear for slot in tree.slots[name]]
    matched = [name for name in tree.modules if name and matcher(tree, word, entry)(name)]
    if not matched:
        raise SelectionError(f"target_modules: '{word}' matches no module{nearest(tree, word, entry)}")
    picks = {slot.name: Pick(slot) for name in matched for slot in tree.own(name)}
    if not picks:
        inner = [name for name in tree.below(matched[0]) if tree.slots[name]]
        way_out = (
            f"; write '{matched[0]}.*' (a glob, in a list) for what it contains, or name one of: "
            f"{', '.join(name[len(matched[0]) + 1 :] for name in inner[:6])}" if inner else ""
        )  # fmt: skip
        kind = type(tree.modules[matched[0]]).__name__
        raise SelectionError(f"target_modules: '{word}': {matched[0]} ({kind}) has no parameters of its own{way_out}")
    return list(picks.values())


def loose(tree: Tree, word: str) -> list[Pick]:
    if word in KEYWORDS or any(map(matcher(tree, word, True), tree.modules)):
        return pattern(tree, word, True)
    return pattern(tree, word, False)


def matcher(tree: Tree, word: str, entry: bool) -> Callable[[str], bool]:
    # No regular expression starts with `*`, so such a string can only be meant as a glob.
    if (entry and ("*" in word or "?" in word)) or word.startswith("*"):
        return lambda name: fnmatchcase(name, word)
    if entry:
        return lambda name: name == word or name.endswith("." + word)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "possible nested set": a remark for programmers, not for recipes
            regex = re.compile(word)
    except re.error as error:
        raise SelectionError(f"target_modules: '{word}' is not a regular expression: {error}") from None
    return lambda name: regex.fullmatch(name) is not None


def nearest(tree: Tree, word: str, entry: bool) -> str:
    """What was probably meant by a pattern that matches nothing."""
    if word in COMPONENTS:
        return f"; it is a component: write components: ['{word}']"
    names = [name for name in tree.modules if name]
    parameters = {slot.name for slots in tree.slots.values() for slot in slots}
    if any(name == word or name.endswith("." + word) for name in parameters):
        module, _, leaf = word.rpartition(".")
        narrower = f" and parameters: {leaf}" if leaf in ("weight", "bias") else ""
        return f"; it is a parameter: select its module '{module}'{narrower}"
    if not entry and any(name.endswith("." + word) for name in names):
        return f"; a string is a regular expression for the whole dotted name: write ['{word}'] for a suffix"
    if not entry and not word.startswith("*") and any(re.search(word, name) for name in names):
        return f"; a string is a regular expression for the whole dotted name: did you mean '.*{word}.*'?"
    if entry and any(fnmatchcase(name, "*." + word) for name in names):
        return f"; a glob covers the whole dotted name: did you mean '*.{word}'?"
    if entry and any(c in word for c in "|()[]\\^$+"):
        return "; it looks like a regular expression: write it as a string, not in a list"
    bare = re.sub(r"^[.*\\]+", "", word)
    parts = bare.count(".") + 1
    suffixes = dict.fromkeys(".".join(name.split(".")[-k:]) for name in names for k in {parts, 1} if name)
    close = difflib.get_close_matches(bare, list(suffixes), n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(repr(name) for name in close)}?"
    return "; `lmleak modules` lists the names"


def _is_linear(module: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
