"""What a model's names say: modules, parameters, ties, blocks, components. Never reads values, so meta devices work."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lmleak.errors import SelectionError

if TYPE_CHECKING:
    import torch

#: Components that mean the same on every family: whole blocks, and everything.
CONTAINERS = ("layer", "encoder", "all")
#: Every component name there is, for suggestions; a family has those of them that its architecture has.
COMPONENTS = (
    "embedding", "attn_query", "attn_key", "attn_value", "attn_qkv", "attn_output", "ffn_in", "ffn_out",
    "norm", "layer", "encoder", "pooler", "head", "all", "patch_embedding", "position_embedding",
    "conv", "linear", "stage",
)  # fmt: skip


@dataclass(frozen=True)
class Slot:
    """A parameter where one module holds it. A tied parameter has several slots and one owner."""

    name: str
    module: str
    shape: tuple[int, ...]
    owner: str  #: the name under which `named_parameters` lists the tensor
    trainable: bool
    out_dim: int  #: dimension of the outputs: 0, but 1 for the transposed weight of Conv1D

    @property
    def tied(self) -> bool:
        return self.owner != self.name

    @property
    def is_bias(self) -> bool:
        return self.name.rpartition(".")[2].endswith("bias")


@dataclass(frozen=True)
class Pick:
    """A slot, or with `part` the slice of it that `component` owns."""

    slot: Slot
    component: str | None = None
    part: tuple[int, int, int] | None = None

    @property
    def key(self) -> str:
        return self.slot.name if self.part is None else f"{self.slot.name}[{self.component}]"

    @property
    def shape(self) -> tuple[int, ...]:
        if self.part is None:
            return self.slot.shape
        dim, start, stop = self.part
        return (*self.slot.shape[:dim], stop - start, *self.slot.shape[dim + 1 :])


class Tree:
    """The dotted names of one model, seen through its family's `BLOCK` and `COMPONENTS`."""

    def __init__(self, module: torch.nn.Module, family: ModuleType | Any):
        self.family = getattr(family, "__name__", type(family).__name__).rpartition(".")[2]
        self.block = getattr(family, "BLOCK", None)
        self.components: dict[str, tuple[str, ...]] = dict(getattr(family, "COMPONENTS", None) or {})
        # A module that is used in two places keeps both names, so that the second can be told to be tied.
        self.modules = dict(module.named_modules(remove_duplicate=False))
        self.slots: dict[str, list[Slot]] = {name: [] for name in self.modules}
        owners: dict[int, str] = {}
        # A model with nothing trainable was frozen by its holder, not by fine-tuning: then all of it counts.
        any_trainable = any(p.requires_grad for p in module.parameters())
        for name, parameter in module.named_parameters(remove_duplicate=False):
            holder = name.rpartition(".")[0]
            slot = Slot(
                name,
                holder,
                tuple(parameter.shape),
                owners.setdefault(id(parameter), name),
                parameter.requires_grad or not any_trainable,
                int(parameter.ndim == 2 and type(self.modules[holder]).__name__ == "Conv1D"),
            )
            self.slots[holder].append(slot)
        self.total = sum(p.numel() for p in module.parameters())

    @cached_property
    def order(self) -> dict[str, int]:
        """Parameter name -> its place in the model, so that entries come out in the model's order."""
        names = (slot.name for slots in self.slots.values() for slot in slots)
        return {name: i for i, name in enumerate(names)}

    @cached_property
    def blocks(self) -> dict[str, int]:
        """Block module -> index. With several groups (stage and block) they are counted through, from 0."""
        if not self.block:
            return {}
        hits = ((name, re.fullmatch(self.block, plain(name))) for name in self.modules)
        places = {name: tuple(map(int, match.groups())) for name, match in hits if match}
        if all(len(place) == 1 for place in places.values()):
            return {name: place[0] for name, place in places.items()}
        order = sorted(set(places.values()))
        return {name: order.index(place) for name, place in places.items()}

    @cached_property
    def depth(self) -> int:
        """Number of blocks."""
        return max(self.blocks.values(), default=-1) + 1

    def layer(self, module: str) -> int | None:
        """Index of the block that `module` is or lies in; None outside the blocks."""
        return next((self.blocks[name] for name in lineage(module) if name in self.blocks), None)

    def below(self, module: str) -> Iterator[str]:
        """`module` and all its descendants."""
        return (name for name in self.modules if not module or name == module or name.startswith(module + "."))

    def own(self, module: str) -> list[Slot]:
        """What a match of `module` selects: its own parameters; those inside a PEFT wrapper count as its own."""
        if f"{module}.base_layer" in self.modules:
            return [slot for name in self.below(module) for slot in self.slots[name]]
        return self.slots[module]

    def component(self, component: str) -> list[Pick]:
        """What a component name means in this model, before layers and filters.

        Raises:
            SelectionError: a fused weight cannot be cut as the family says.
        """
        if component == "all":
            return [Pick(slot) for slots in self.slots.values() for slot in slots]
        if component in CONTAINERS and component not in self.components:
            return [Pick(slot) for block in self.blocks for name in self.below(block) for slot in self.slots[name]]
        picks: dict[str, Pick] = {}
        for pattern in self.components.get(component, ()):
            where, _, cut = pattern.partition("#")
            where, _, bare = where.partition("@")
            for module in self.modules:
                if self._is(module, where) and bare:
                    named = (slot for slot in self.slots[module] if slot.name == f"{module}.{bare}")
                    picks.update((slot.name, Pick(slot, component)) for slot in named)
                elif self._is(module, where):
                    for slot in (slot for name in self.below(module) for slot in self.slots[name]):
                        pick = self._slice(slot, module, component, cut) if cut else Pick(slot)
                        if pick:
                            picks.setdefault(pick.key, pick)
        return list(picks.values())

    def component_of(self, module: str) -> str | None:
        """The narrowest component that owns the whole of `module`: attn_query before attn_qkv, never a container."""
        candidates = [name for name in self.components if name not in (*CONTAINERS, "stage")]
        # The union of three projections says less than the projection itself.
        candidates.sort(key=lambda name: name == "attn_qkv")
        for name in lineage(module):
            for component in candidates:
                if any(
                    not {"#", "@"} & set(pattern) and self._is(name, pattern) for pattern in self.components[component]
                ):
                    return component
        return None

    def _is(self, module: str, where: str) -> bool:
        block = next((name for name in lineage(module) if name in self.blocks), None)
        # Inside a block the whole relative name must agree: `output.dense` is not `attention.output.dense`.
        if block is not None and module[len(block) + 1 :] == where:
            return True
        return re.fullmatch(where, plain(module)) is not None

    def _slice(self, slot: Slot, module: str, component: str, cut: str) -> Pick | None:
        index, _, count = cut.partition("/")
        size = slot.shape[slot.out_dim]
        if slot.name.startswith(f"{module}.lora_A."):
            return None  # A is shared by all parts of a fused layer; only B has the outputs' dimension
        if size % int(count):
            raise SelectionError(f"component '{component}': {slot.name} {slot.shape} has no {count} equal parts")
        width = size // int(count)
        return Pick(slot, component, (slot.out_dim, int(index) * width, (int(index) + 1) * width))


def plain(name: str) -> str:
    """The name without the prefixes that PEFT and DistributedDataParallel put before every module."""
    return name.removeprefix("module.").removeprefix("base_model.model.")


def lineage(module: str) -> Iterator[str]:
    """`module`, its parent, ... down to but without the root."""
    while module:
        yield module
        module = module.rpartition(".")[0]
