"""An observation survives the disk unchanged, and what does not fit is named with its place."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import lmleak
from lmleak.data import load_batches
from lmleak.errors import LmleakError
from lmleak.gradients import load_observation, observe, save_observation, select


@pytest.fixture(scope="module")
def observation(tiny_gpt2):
    batch = load_batches(tiny_gpt2, limit=1, max_length=20)[0]
    selection = select(tiny_gpt2, components=["attn_query", "ffn_in"], layers=[0, 2])
    return observe(tiny_gpt2, batch, selection, {"kind": "dp_sgd", "noise_multiplier": 0.5})


@pytest.fixture
def folder(observation, tmp_path):
    return save_observation(observation, tmp_path / "deep" / "observed")


def test_it_comes_back_as_it_went(observation, folder, tiny_gpt2):
    for found in (load_observation(folder), load_observation(folder, tiny_gpt2), lmleak.load_observation(folder)):
        for field in dataclasses.fields(observation):
            if field.name != "gradients":
                assert getattr(found, field.name) == getattr(observation, field.name)
        assert list(found.gradients) == list(observation.gradients)
        for name, tensor in observation.gradients.items():
            assert torch.equal(found.gradients[name], tensor)
            assert found.gradients[name].dtype == tensor.dtype


def test_views_and_shared_memory_are_saved(observation, tmp_path):
    (name, tensor), *_ = observation.gradients.items()
    entry = next(e for e in observation.entries if e.name == name)
    view = torch.stack([tensor, tensor], 2)[..., 0]
    other = dataclasses.replace(entry, name="again")
    shared = dataclasses.replace(observation, gradients={name: view, "again": view}, entries=(entry, other))
    found = load_observation(save_observation(shared, tmp_path))
    assert torch.equal(found.gradients["again"], tensor)


def test_a_gradient_captured_elsewhere_needs_three_keys(tmp_path):
    save_file({"w": torch.ones(2, 3)}, str(tmp_path / "gradients.safetensors"))
    entry = {"name": "w", "parameter": "w", "module": "", "shape": [2, 3]}
    facts = {"entries": [entry], "batch_size": 1, "task": "causal-lm"}
    (tmp_path / "observation.json").write_text(json.dumps(facts))
    found = load_observation(tmp_path)
    assert (found.reduction, found.mode, found.privacy, found.defense["kind"]) == ("mean", "eval", None, "none")
    assert found.entries[0].shape == (2, 3)


def edit(folder, change):
    path = folder / "observation.json"
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: f.pop("task"), "'task' is missing"),
        (lambda f: f.update(batchsize=2), "unknown key 'batchsize'; did you mean 'batch_size'?"),
        (lambda f: f.update(batch_size="1"), "batch_size: '1' is not a int"),
        (lambda f: f.update(batch_size=True), "batch_size: True is not a int"),
        (lambda f: f.update(batch_size=0), "0 is not 1 or more"),
        (lambda f: f.update(task="casual-lm"), "did you mean 'causal-lm'?"),
        (lambda f: f.update(reduction="avg"), "'avg' is not one of mean, sum"),
        (lambda f: f.update(format=9), "format 9, this version reads 1; update lmleak"),
        (lambda f: f.update(entries=[]), "nothing is observed"),
        (lambda f: f["entries"][0].pop("module"), "entries[0]: needs the strings"),
        (lambda f: f["entries"][0].update(part=[1, 2]), "entries[0]: 'transformer.h.0.attn.c_attn.weight[attn_query]'"),
        (lambda f: f["entries"][0].update(shape="3x3"), "shape is a list of sizes"),
        (lambda f: f["entries"][0].update(slice=None), "unknown key 'slice'"),
        (lambda f: f["entries"][0].update(shape=[9, 9]), "says (9, 9); one of them is wrong"),
        (lambda f: f["entries"][0].update(name="transformer.h.0.attn.c_attn.weigth"), "; did you mean"),
        (lambda f: f["entries"].pop(), "is not among the entries"),
    ],
)  # fmt: skip
def test_wrong_facts_are_named(folder, change, says):
    edit(folder, change)
    with pytest.raises(LmleakError) as caught:
        load_observation(folder)
    assert says in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"parameter": "transformer.h.0.attn.c_atn.weight"}, "; did you mean 'transformer.h.0.attn.c_attn.weight'?"),
        ({"parameter": "transformer.h.0.mlp.c_fc.weight", "part": None}, "load the model it comes from"),
        ({"part": [1, 90, 122]}, "lies outside (32, 96)"),
        ({"part": [2, 0, 32]}, "lies outside (32, 96)"),
    ],
)
def test_what_does_not_fit_the_model_is_named(folder, tiny_gpt2, change, says):
    edit(folder, lambda facts: facts["entries"][0].update(change))
    load_observation(folder)
    with pytest.raises(LmleakError) as caught:
        load_observation(folder, tiny_gpt2)
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["observation.json", "gradients.safetensors"])
def test_missing_and_damaged_files(folder, name):
    (folder / name).write_bytes(b"\x80\x04\x95 not this")
    with pytest.raises(LmleakError, match=name):
        load_observation(folder)
    (folder / name).unlink()
    with pytest.raises(LmleakError, match="an observation is a folder with"):
        load_observation(folder)


def test_a_half_written_tensor_file(folder):
    path = folder / "gradients.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LmleakError, match="save the observation again"):
        load_observation(folder)


def test_integers_are_no_gradient(folder):
    path = folder / "gradients.safetensors"
    save_file({name: tensor.int() for name, tensor in load_file(path).items()}, path)
    with pytest.raises(LmleakError, match=r"torch\.int32, not floating-point"):
        load_observation(folder)


def test_a_folder_that_cannot_be_written(observation, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LmleakError, match="name another folder"):
        save_observation(observation, tmp_path / "file" / "observed")
