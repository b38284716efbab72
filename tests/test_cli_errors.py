"""Bad input: exit 2, the place, a suggestion, no traceback, and nothing has run."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from lmleak.cli import main

HEAD = """\
model: {kind: bert, weights: random, tokenizer: bytes, config: {num_hidden_layers: 3, hidden_size: 24}}
data: {kind: sample, limit: 1}
"""
SPAN = "attack: {kind: span}\n"
DP = "defense: {kind: dp_sgd, noise_multiplier: 0.1}\n"

# text of the recipe, overrides, what stderr has to contain
RECIPES = {
    "misspelt key": (HEAD + SPAN + "sead: 1\n", [], ["r.yaml:4:1: sead: ", "did you mean 'seed'?"]),
    "misspelt field": (HEAD + "attack: {kind: matching, stps: 3}\n", [], ["r.yaml:3:26: attack.stps", "'steps'"]),
    "unknown kind": (HEAD + "attack: spam\n", [], ["r.yaml:3:1: attack.kind: no kind 'spam'", "'span'"]),
    "kind missing": (HEAD + "attack: {steps: 3}\n", [], ["r.yaml:3:1: attack.kind: is missing", "matching"]),
    "block missing": (HEAD, [], ["r.yaml:1:1: attack: is missing"]),
    "wrong type": (HEAD + SPAN + "seed: one\n", [], ["r.yaml:4:1: seed: should be a whole number", '"one"']),
    "number in quotes": (HEAD + "attack: {kind: matching, steps: '3'}\n", [], ["r.yaml:3:26: attack.steps", '"3"']),
    "yes is a word": (HEAD + SPAN + "knowledge: {labels: yes}\n", [], ["r.yaml:4:13: knowledge.labels", '"yes"']),
    "wrong choice": (
        HEAD + "attack: {kind: matching, objective: cosin}\n",
        [],
        ["r.yaml:3:26: attack.objective", "did you mean 'cosine'?"],
    ),
    "out of bounds": (HEAD + "attack: {kind: matching, steps: 0}\n", [], ["r.yaml:3:26: attack.steps", "not 0"]),
    "duplicate key": (HEAD + SPAN + "seed: 1\nseed: 2\n", [], ["r.yaml:5:1: seed: duplicate", "r.yaml:4:1"]),
    "syntax": (HEAD + "attack: {kind: span\n", [], ["r.yaml:4:1: not valid YAML"]),
    "code": (HEAD + "attack: !!python/name:os.system\n", [], ["r.yaml:3:9: attack: tags such as"]),
    "not a mapping": ("- 1\n", [], ["r.yaml:1:1: should be a mapping of model, data"]),
    "empty file": ("", [], ["r.yaml: should be a mapping"]),
    "not a layer": (HEAD + SPAN + "select: {layers: [0, 5-3]}\n", [], ["r.yaml:4:22: select.layers.1", "'3-5'"]),
    "bad sweep value": (HEAD + SPAN + "sweep: {seed: [0, x]}\n", [], ["r.yaml:4:19: seed: should be a whole"]),
    "bad sweep axis": (HEAD + SPAN + "sweep: {sede: [0]}\n", [], ["r.yaml:4:9: sweep.sede", "'seed'?"]),
    "bad metric": (HEAD + SPAN + "metrics: [rouge, rogue]\n", [], ["r.yaml:4:18: metrics.1.kind", "'rouge'?"]),
    "bad guarantee": (HEAD + SPAN + DP.replace("0.1", "-1"), [], ["r.yaml:4:25: defense.noise_multiplier", "not -1"]),
    "override of nothing": (HEAD + SPAN, ["data.limt=5"], ["override 'data.limt=5': data.limt", "'limit'?"]),
    "override without value": (HEAD + SPAN, ["data.limit"], ["override 'data.limit': not of the form"]),
    "override twice": (HEAD + SPAN, ["seed=1", "seed=2"], ["override 'seed=2': seed: already given by"]),
    "override of a wrong type": (HEAD + SPAN, ["seed=x"], ["override 'seed=x': seed: should be a whole number"]),
    # Found against the architecture or the data.
    "component": (HEAD + SPAN + "select: {components: [attn_qery]}\n", [], ["r.yaml:4:23: select.comp", "attn_query"]),
    "pattern": (HEAD + SPAN + "select: {target_modules: [attention.self.qery]}\n", [], ["r.yaml:4:27: ", "query"]),
    "layer out of range": (HEAD + SPAN + "select: {layers: [0, 3]}\n", [], ["r.yaml:4:22: select.layers.1", "0 to 2"]),
    "swept layer out of range": (
        HEAD + SPAN + "sweep:\n  select.layers: [[0], [7]]\n",
        [],
        ["r.yaml:5:25: sweep.select.layers.1.0: layer 7 is out of range", "0 to 2"],
    ),
    "tied module": (
        "model: {kind: gpt2, weights: random, task: causal-lm, config: {n_layer: 1, n_embd: 8, n_head: 1}}\n"
        "data: sample\nattack: span\nselect: {target_modules: [lm_head]}\n",
        [],
        ["r.yaml:4:27: select.target_modules.0", "tied", "did you mean 'transformer.wte'"],
    ),
    "no network": (
        "model: {kind: bert, weights: nobody/no-such-model}\ndata: sample\nattack: span\n",
        [],
        ["r.yaml:1:21: model.weights", "nobody/no-such-model"],
    ),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LMLEAK_DEBUG", raising=False)
    return tmp_path


def refused(*words: str) -> str:
    """What stderr says, of a command that has to end with exit code 2 and without a traceback."""
    result = CliRunner().invoke(main, list(words))
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    return result.stderr


@pytest.mark.parametrize("case", RECIPES)
def test_a_malformed_recipe_is_refused_at_its_place(case: str, here: Path) -> None:
    text, overrides, parts = RECIPES[case]
    (here / "r.yaml").write_text(text)
    words = ["validate", "--modules", "r.yaml"] if all("=" in word for word in overrides) else ["run", "r.yaml"]
    said = refused(*words, *overrides)
    for part in parts:
        assert part in said


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["run", "r.yaml"], "r.yaml:4:22: select.layers.1: "),
        (["run", "quikstart"], "did you mean 'quickstart'?"),
        (["run", "rr.yaml"], "rr.yaml: no such file; did you mean 'r.yaml'?"),
        (["cat", "."], "is a folder"),
        (["rnu", "r.yaml"], "no command 'rnu'; did you mean 'run'?"),
        (["run", "r.yaml", "--dryrun"], "--dry-run"),
        (["ls", "atacks"], "did you mean 'attacks'?"),
        (["modules", "gtp2"], "did you mean 'gpt2'?"),
        (["modules", "bert", "attention.self.qury"], "query"),
        (["modules", "bert", "--layers", "99"], "0 to 11"),
        (["modules", "gpt2", "--observe"], "did you mean 'dp_gpt2'?"),
        (["modules", "r.yaml", "--observe", "a", "b"], "one PATTERN at most"),
        (["modules", "bert", "seed=1"], "overrides a recipe"),
        (["modules", "r.yaml", "--observe"], "r.yaml:4:22: select.layers.1: "),
        (["compare", "quikstart"], "no run 'quikstart'"),
        (["report", "no/such/run"], "no/such/run: no such run folder"),
        (["score", "."], "no run folder"),
        (["cp", "quickstart", "r.yaml"], "r.yaml: exists; --force"),
        (["cp", "quickstart", "no/such/folder/x.yaml"], "No such file"),
    ],
)
def test_a_wrong_argument_is_refused(words: list[str], part: str, here: Path) -> None:
    (here / "r.yaml").write_text(HEAD + SPAN + "select: {layers: [0, 3]}\n")
    assert part in refused(*words)
    assert {path.name for path in here.iterdir()} <= {"r.yaml"}


def test_all_faults_are_told_at_once_in_the_order_of_the_file(here: Path) -> None:
    (here / "r.yaml").write_text("sead: 1\n" + HEAD + "attack: {kind: matching, stps: 1, lr: x}\nseed: -1\n")
    said = refused("validate", "r.yaml", "data.limit=0")
    lines = [line.removeprefix("error: ") for line in said.splitlines()]
    assert [line.split(": ")[0] for line in lines] == [
        "override 'data.limit=0'",
        "r.yaml:1:1",
        "r.yaml:4:26",
        "r.yaml:4:35",
        "r.yaml:5:1",
    ]


def test_debug_shows_the_traceback(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMLEAK_DEBUG", "1")
    result = CliRunner().invoke(main, ["cat", "nothing.yaml"])
    assert result.exit_code == 2
    assert "nothing.yaml: no such file" in result.stderr
