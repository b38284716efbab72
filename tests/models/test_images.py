"""Image families: names, closed form of block 0's input, normalisation, and loading without running code."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

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
SMALL["convnet"] = {"image_size": 16, "channels_out": [4, 6], "strides": 2, "hidden": [20], "norm": "batch"}


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


def test_blocks_of_a_hugging_face_resnet_are_counted_through_its_stages():
    victim = outline("hf_resnet")
    assert {e.layer for e in select(victim, components=["conv"], layers=["0-15"]).entries} == set(range(16))
    first = select(victim, components=["conv"], layers=[3]).entries
    assert all(entry.module.startswith("resnet.encoder.stages.1.layers.0.") for entry in first)
    assert select(victim, components=["stage"]).numel == select(victim, components=["layer"]).numel
    assert not [row for row in modules_table(victim) if row["component"] is None]


def test_a_folder_of_hugging_face_s_resnet_and_deit_loads(tmp_path):
    said = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    small = {
        "hf_resnet": {"config": {"depths": [1, 1], "hidden_sizes": [8, 16], "embedding_size": 4}, "image_size": 32}
    }
    small["vit"] = {"config": VIT | {"model_type": "deit"}}
    for kind, fields in small.items():
        made = load_model(kind, seed=1, device="cpu", **fields)
        folder = tmp_path / kind
        made.module.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(said))
        fields = {} if kind == "vit" else {"image_size": 32}
        victim = load_model(kind, weights=str(folder), device="cpu", **fields)
        assert all(torch.equal(a, b) for a, b in zip(victim.module.parameters(), made.module.parameters(), strict=True))
        assert victim.processor.mean == (0.1, 0.2, 0.3)
        batch = load_batches(victim, "photos", limit=1)[0]
        assert victim.module(**batch.inputs).logits.shape == (1, 10)
        assert outline(kind, weights=str(folder)).family is victim.family


def test_convolutions_then_dense_layers_are_counted():
    victim = outline("convnet", config=SMALL["convnet"])
    assert [e.name for e in select(victim, components=["conv"], layers=[1]).entries] == [
        "layers.1.conv.weight",
        "layers.1.conv.bias",
    ]
    assert {e.layer for e in select(victim, components=["linear"]).entries} == {2}
    assert {e.layer for e in select(victim, components=["head"]).entries} == {None}
    assert not [row for row in modules_table(victim) if row["component"] is None]


def test_a_convnet_s_sizes_are_checked_before_anything_is_built():
    with pytest.raises(ModelError, match=r"model.config.strides: 2 values for 3 convolutions"):
        outline("convnet", config={"strides": [2, 2]})
    with pytest.raises(ModelError, match="convolution 1 has no place for its kernel in 2 x 2"):
        outline("convnet", config={"image_size": 4, "paddings": 0, "kernels": 3, "strides": 1})


def test_the_default_convnet_is_lenet_and_geiping_s_can_be_written():
    lenet = load_model("convnet", config={"spread": 0.5}, device="cpu")
    assert lenet.module.linear.in_features == 768
    assert all(0.45 < p.abs().max() <= 0.5 for p in lenet.module.parameters() if p.numel() > 100)
    wide = {"channels_out": [64, 128, 128, 256, 256, 256, 256, 256, 256], "pools": [1, 1, 1, 1, 1, 3, 1, 1, 3]}
    shape = wide | {"kernels": 3, "strides": 1, "paddings": 1, "norm": "batch", "activation": "relu"}
    assert outline("convnet", config=shape).module.linear.in_features == 9 * 256


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "sigmoid", "softplus"])
def test_a_convnet_is_its_layers_in_a_row(activation):
    shape = {"image_size": 9, "channels_out": [4, 5], "kernels": [3, 2], "strides": 1, "paddings": [1, 0]}
    victim = load_model("convnet", config=shape | {"hidden": [7], "activation": activation, "pools": [1, 2]})
    x = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    first, second, dense = victim.module.layers
    act = getattr(torch, activation, None) or getattr(torch.nn.functional, activation)
    y = act(torch.nn.functional.conv2d(x, first.conv.weight, first.conv.bias, padding=1))
    y = torch.nn.functional.max_pool2d(act(torch.nn.functional.conv2d(y, second.conv.weight, second.conv.bias)), 2)
    y = act(y.flatten(1) @ dense.dense.weight.T + dense.dense.bias)
    expected = y @ victim.module.linear.weight.T + victim.module.linear.bias
    torch.testing.assert_close(victim.module(pixel_values=x).logits, expected)


@pytest.mark.parametrize("kind", ["mlp", "convnet", "resnet"])
def test_checkpoints_come_back(kind, tmp_path):
    made = load_model(kind, config=SMALL[kind], seed=1, device="cpu")
    safe, plain = tmp_path / "a.safetensors", tmp_path / "b.pt"
    save_file(made.module.state_dict(), safe)
    torch.save({"state_dict": {f"module.{name}": t for name, t in made.module.state_dict().items()}}, plain)
    for path in (safe, plain):
        said = {"mean": [0.5] * 3, "std": [0.5] * 3}
        victim = load_model(kind, config=SMALL[kind], weights=str(path), device="cpu", **said)
        assert all(torch.equal(a, b) for a, b in zip(victim.module.parameters(), made.module.parameters(), strict=True))
        assert "sha256" in victim.weights
    if kind != "resnet":
        with pytest.raises(ModelError, match=r"a.safetensors' does not say how its pixels"):
            load_model(kind, config=SMALL[kind], weights=str(safe), device="cpu")


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
    with pytest.raises(
        ModelError,
        match=r"bad.th' does not fit.*97 names.*first conv1.weight \(1 in the file, 16 x 3 x 3 x 3 in the model\)",
    ):
        load_model("resnet", weights=str(path), device="cpu")


def test_trained_weights_know_cifar(shared):
    weights = shared / "models/resnet_cifar10/resnet20-12fca82f.th"
    victim = load_model("resnet", weights=str(weights), device="cpu")
    path = str(shared / "data/images/cifar10/test_500x10.zip")
    batch = load_batches(victim, "image_folder", path=path, limit=40, batch_size=40)[0]
    with torch.no_grad():
        right = victim.module(**batch.inputs).logits.argmax(1) == batch.labels
    assert right.float().mean() > 0.6  # 0.81 over all files
