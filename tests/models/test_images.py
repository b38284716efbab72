"""Image families: names, closed form of block 0's input, normalisation, and loading without running code."""

from __future__ import annotations

import json
import pickle

import pytest
import torch

from lmleak import load_batches, load_model, select
from lmleak.errors import ModelError
from lmleak.gradients import modules_table
from lmleak.models import outline

VIT = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
SMALL = {"vit": VIT, "resnet": {"depth": 8, "width": 4, "image_size": 16}, "mlp": {"image_size": 16, "hidden": [20]}}


@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_components_and_layers_select_as_on_text(kind):
    victim = outline("vit", config=VIT | {"model_type": kind})
    for component in ("attn_query", "attn_key", "attn_value", "attn_output", "ffn_in", "ffn_out"):
        (weight, bias) = select(victim, components=[component], layers=[0]).entries
        assert weight.component == component
        assert weight.layer == 0
        assert bias.name.endswith("bias")
    names = [entry.name for entry in select(victim, components=["position_embedding"]).entries]
    assert names == [f"{kind}.embeddings.position_embeddings"]
    (patch, _) = select(victim, components=["patch_embedding"]).entries
    assert patch.shape == (32, 3, 4, 4)
    assert not [row for row in modules_table(victim) if row["component"] is None]


def test_residual_blocks_are_layers_and_every_part_has_a_component():
    victim = outline("resnet", config={"depth": 20})
    assert {e.layer for e in select(victim, components=["conv"], layers=["0-8"]).entries} == set(range(9))
    assert not [row for row in modules_table(victim) if row["component"] is None]
    with pytest.raises(ModelError, match="depth: 21"):
        outline("resnet", config={"depth": 21})


@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_patch_layer_is_what_the_first_query_reads(kind):
    victim = load_model("vit", config=VIT | {"model_type": kind}, dtype="float64", device="cpu")
    with torch.no_grad():
        for name, parameter in victim.module.named_parameters():
            if parameter.dim() == 1:
                shift = torch.linspace(-0.5, 0.5, len(parameter), dtype=parameter.dtype)
                parameter.copy_(1.2 + shift if name.endswith("weight") else shift)
    batch = load_batches(victim, "photos", limit=2, batch_size=2)[0]
    seen = []
    query = victim.module.get_submodule(select(victim, components=["attn_query"], layers=[0]).entries[0].module)
    hook = query.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        victim.module(**batch.inputs)
    hook.remove()
    layer = victim.family.patch_layer(victim.module)
    patches = layer.cut(batch.inputs["pixel_values"])
    known = layer.known().expand(2, -1, -1)
    torch.testing.assert_close(torch.cat([known, layer.rows(patches, dtype=torch.float64)], 1), seen[0])
    torch.testing.assert_close(layer.join(patches, 16, 16), batch.inputs["pixel_values"])


@pytest.mark.parametrize("kind", SMALL)
def test_random_weights_follow_the_seed_and_leave_the_generator(kind):
    before = torch.get_rng_state()
    a, b, c = (load_model(kind, config=SMALL[kind], seed=seed, device="cpu") for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    weights = [next(v.module.parameters()) for v in (a, b, c)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert a.weights == b.weights != c.weights
    assert not a.module.training


def test_normalisation_is_the_folder_s_own_or_asked_for(tmp_path):
    made = load_model("vit", config=VIT, device="cpu")
    made.module.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"preprocessor_config.json.*model.mean"):
        load_model("vit", weights=str(tmp_path), num_labels=10, device="cpu")
    said = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    victim = load_model("vit", weights=str(tmp_path), num_labels=10, device="cpu")
    assert victim.processor.mean == (0.1, 0.2, 0.3)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(victim.processor.plain(victim.processor.normalised(images)), images)
    assert torch.equal(next(victim.module.parameters()), next(made.module.parameters()))
    with pytest.raises(ModelError, match="2 values for 3 channels"):
        load_model("vit", config=VIT, mean=[0.5, 0.5], device="cpu")


def test_a_checkpoint_that_runs_code_is_refused(tmp_path):
    path = tmp_path / "bad.th"
    path.write_bytes(pickle.dumps({"state_dict": {"x": print}}))
    with pytest.raises(ModelError, match=r"bad.th.*without running code"):
        load_model("resnet", weights=str(path), device="cpu")
    torch.save({"state_dict": {"module.conv1.weight": torch.zeros(1)}}, path)
    with pytest.raises(ModelError, match="does not fit depth 20"):
        load_model("resnet", weights=str(path), device="cpu")


def test_trained_weights_know_cifar(shared):
    weights = shared / "models/resnet_cifar10/resnet20-12fca82f.th"
    victim = load_model("resnet", weights=str(weights), device="cpu")
    path = str(shared / "data/images/cifar10/test_500x10.zip")
    batch = load_batches(victim, "image_folder", path=path, limit=40, batch_size=40)[0]
    with torch.no_grad():
        right = victim.module(**batch.inputs).logits.argmax(1) == batch.labels
    assert right.float().mean() > 0.6  # 0.81 over all files
