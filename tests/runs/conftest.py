"""A sweep of milliseconds, and attacks that fail on demand, for tests of what surrounds them."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from pydantic import BaseModel, ConfigDict

from lmleak import registry
from lmleak.records import Reconstruction

TINY = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}


@pytest.fixture
def recipe():
    """Four cells of two batches each."""
    return {
        "name": "four",
        "model": {"kind": "bert", "weights": "random", "tokenizer": "bytes", "config": TINY, "device": "cpu"},
        "data": {"kind": "sample", "limit": 2, "max_length": 8},
        "select": {"components": ["attn_query"], "layers": [0]},
        "attack": {"kind": "puppet"},
        "metrics": ["token_accuracy", "exact_match"],
        "sweep": {"select.layers": [[0], [1]], "attack.strength": [1, 2]},
    }


@pytest.fixture
def puppet(monkeypatch):
    """An attack `puppet` whose `act(config, observation, generator)` a test replaces; it counts its calls."""

    class Config(BaseModel):
        model_config = ConfigDict(extra="forbid", frozen=True)
        strength: int = 1

    module = ModuleType("lmleak_puppet")
    module.Config, module.calls = Config, []
    module.act = lambda config, observation, generator: Reconstruction(((1, 2),), ("some text",))

    def attack(config, observation, knowledge, victim, generator, progress):
        module.calls.append((config.strength, observation.entries[0].layer))
        return module.act(config, observation, generator)

    module.attack = attack
    monkeypatch.setitem(sys.modules, "lmleak_puppet", module)
    load, kinds = registry.load, registry.kinds
    monkeypatch.setattr(
        registry, "load", lambda room, kind: module if (room, kind) == ("attacks", "puppet") else load(room, kind)
    )
    monkeypatch.setattr(registry, "kinds", lambda room: (*kinds(room), "puppet") if room == "attacks" else kinds(room))
    return module
