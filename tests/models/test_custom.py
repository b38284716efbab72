"""Modules of other packages, by name: which callables are called, names as they were, components by type or as said."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file

from lmleak import load_batches, load_model, observe, select
from lmleak.errors import ModelError
from lmleak.gradients import modules_table
from lmleak.models import outline

NETS = """
from __future__ import annotations
import torch
from torch import nn

called = []

class Two(nn.Module):
    def __init__(self, width=4, classes=10):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2)
        self.stage0 = nn.Sequential(nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width)))
        self.stage1 = nn.Sequential(*[nn.Conv2d(width, width, 1) for _ in range(2)])
        self.between = nn.Linear(width, width)
        self.top = nn.Linear(width, classes)

    def forward(self, x):
        return self.top(self.between(self.stage1(self.stage0(self.stem(x))).mean((2, 3))).tanh())

def make(width: int = 4) -> nn.Module:
    return Two(width)

def unsaid(width=4):
    called.append(width)
    return Two(width)

def text() -> str:
    called.append("text")
    return "x"

def broken() -> Two:
    raise RuntimeError("no such thing")
"""
SIZE = {"image_size": 8, "device": "cpu"}
BLOCKS = r"stage(\d)\.(\d)"


@pytest.fixture
def nets(tmp_path, monkeypatch):
    (tmp_path / "some_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    import sys

    sys.modules.pop("some_nets", None)


@pytest.mark.parametrize("build", ["some_nets:Two", "some_nets:make"])
def test_names_are_the_module_s_own_and_its_answer_too(nets, build):
    from some_nets import Two

    victim = load_model("custom", build=build, config={"width": 6}, **SIZE)
    plain = Two(6)
    assert list(victim.module.state_dict()) == list(plain.state_dict())
    assert isinstance(victim.module, Two)
    plain.load_state_dict(victim.module.state_dict())
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(victim.module(pixel_values=x).logits, plain.eval()(x))
    torch.testing.assert_close(copy.deepcopy(victim.module)(pixel_values=x).logits, plain(x))
    batch = load_batches(victim, "photos", limit=2, batch_size=2)[0]
    seen = observe(victim, batch, select(victim, components=["conv"], layers=[0]))
    assert [e.name for e in seen.entries] == ["stage1.0.weight", "stage1.0.bias"]


def test_components_by_type_or_as_the_recipe_says(nets):
    victim = outline("custom", build="some_nets:Two")
    assert not [row for row in modules_table(victim) if row["component"] is None]
    assert [e.module for e in select(victim, components=["head"], parameters="bias").entries] == ["top"]
    assert [e.module for e in select(victim, components=["linear"], parameters="bias").entries] == ["between"]
    victim = outline("custom", build="some_nets:Two", blocks=BLOCKS, components={"conv": ["0"], "stage": [r"stage\d"]})
    assert [(e.module, e.layer) for e in select(victim, layers="0-2", parameters="bias").entries] == [
        ("stage0.0.0", 0),
        ("stage0.0.1", 0),
        ("stage1.0", 1),
        ("stage1.1", 2),
    ]
    assert {e.module for e in select(victim, components=["conv"]).entries} == {"stage0.0.0"}


def test_only_what_is_known_to_return_a_module_is_called(nets):
    import some_nets

    for name in ("unsaid", "text", "called"):
        with pytest.raises(
            ModelError, match=f"some_nets:{name}' is neither a torch.nn.Module class nor a function ann"
        ):
            load_model("custom", build=f"some_nets:{name}", **SIZE)
    with pytest.raises(ModelError, match="'os:system' is neither"):
        load_model("custom", build="os:system", config={"command": "true"}, **SIZE)
    assert some_nets.called == []


def test_what_does_not_fit_is_said(nets, tmp_path):
    for fields, words in [
        ({"build": "no_such_nets:Two"}, "No module named 'no_such_nets'"),
        ({"build": "some_nets:Tow"}, "has no attribute 'Tow'"),
        ({"build": "some_nets:Two", "config": {"wide": 3}}, r"model.config.*unexpected keyword argument 'wide'"),
        ({"build": "some_nets:broken"}, "no such thing"),
        ({"build": "some_nets:Two", "num_labels": 3}, r"model.num_labels.*\(2, 10\) for 2 pictures, not \(2, 3\)"),
        ({"build": "some_nets:Two", "channels": 1}, r"fails on \(2, 1, 8, 8\) pixels"),
        ({"build": "some_nets:Two", "blocks": r"stage\d"}, "needs a group for the index"),
        ({"build": "some_nets:Two", "blocks": r"stag(\d)"}, r"matches no module; the first are: stem"),
        ({"build": "some_nets:Two", "blocks": r"(stage)\d"}, "not all numbers"),
        ({"build": "some_nets.Two"}, "model.build"),
    ]:
        with pytest.raises(ModelError, match=words):
            load_model("custom", **(SIZE | fields))
    made = load_model("custom", build="some_nets:Two", seed=3, **SIZE)
    save_file(made.module.state_dict(), tmp_path / "model.safetensors")
    fields = {"build": "some_nets:Two", "weights": str(tmp_path), "mean": [0.5] * 3, "std": [0.5] * 3} | SIZE
    again = load_model("custom", **fields)
    assert all(torch.equal(a, b) for a, b in zip(again.module.parameters(), made.module.parameters(), strict=True))
    with pytest.raises(ModelError, match=r"stem.weight \(4 x 3 x 3 x 3 in the file, 5 x 3 x 3 x 3 in the model\)"):
        load_model("custom", **fields, config={"width": 5})
