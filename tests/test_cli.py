"""Every verb once, on what it is for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from lmleak.cli import main
from lmleak.config import load_recipe, packaged

TINY = """\
# What does a tiny model leak?
model: {kind: bert, weights: random, tokenizer: bytes, dtype: float64, config: {num_hidden_layers: 2, hidden_size: 128,
  num_attention_heads: 2, intermediate_size: 32, max_position_embeddings: 128}}
data: {kind: sample, limit: 2, max_tokens: 60}
attack: span
select: {components: [attn_value]}
sweep: {select.layers: [[0], [1]]}
"""


def said(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, list(words))
    assert result.exit_code == code, result.output
    return result.stdout


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


def test_ls_imports_neither_torch_nor_pydantic() -> None:
    code = (
        "import sys; from lmleak.cli import main; main(['ls', 'attacks'], standalone_mode=False);"
        "sys.exit(bool({'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "span" in done.stdout


def test_ls_lists_every_room_and_the_recipes() -> None:
    rooms = json.loads(said("ls", "--json"))
    assert set(rooms) == {"recipes", "models", "data", "defenses", "attacks", "measures", "metrics"}
    assert set(rooms["recipes"]) == set(packaged())
    assert all(line.endswith("?") for line in rooms["recipes"].values())
    assert "dp_sgd" in said("ls")


def test_cat_prints_a_recipe_that_is_the_same_recipe(here: Path) -> None:
    (here / "again.yaml").write_text(said("cat", "tiny.yaml", "data.limit=1", "name=again"))
    assert load_recipe("again.yaml") == load_recipe("tiny.yaml", ["data.limit=1", "name=again"])


def test_cp_copies_comments_too(here: Path) -> None:
    assert said("cp", "quickstart", ".").strip() == "quickstart.yaml"
    assert (here / "quickstart.yaml").read_text() == packaged()["quickstart"].read_text()
    said("cp", "quickstart", "quickstart.yaml", code=2)
    said("cp", "quickstart", "tiny.yaml", "--force")


def test_validate_counts_the_cells(here: Path) -> None:
    assert said("validate", "tiny.yaml", "--modules") == "tiny.yaml: ok, 2 cells\n"
    assert said("validate", "tiny.yaml", "sweep.seed=[0, 1]") == "tiny.yaml: ok, 4 cells\n"


def test_dry_run_prints_cells_and_runs_nothing(here: Path) -> None:
    lines = [json.loads(line) for line in said("run", "tiny.yaml", "--dry-run", "seed=1", "--json").splitlines()]
    assert [line["axes"] for line in lines] == [{"select.layers": [0]}, {"select.layers": [1]}]
    assert not (here / "runs").exists()


def test_modules_of_a_family_a_recipe_and_a_pattern(here: Path) -> None:
    rows = [json.loads(line) for line in said("modules", "gpt2", "--layers", "0", "--json").splitlines()]
    assert {"transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc"} <= {row["name"] for row in rows}
    assert {row["layer"] for row in rows} == {0}
    sliced = said("modules", "gpt2", "--layers", "0", "--components", "attn_query")
    assert "768 x 768" in sliced
    chosen = [json.loads(line) for line in said("modules", "tiny.yaml", "--json").splitlines()]
    assert [row["select"]["layers"] for row in chosen if row["name"].endswith("value.weight")] == [[0], [1]]
    assert "2 rows" in said("modules", "tiny.yaml", "*.query")


def test_run_resumes_and_its_run_is_found_by_name(here: Path) -> None:
    lines = [json.loads(line) for line in said("run", "tiny.yaml", "--json", "--quiet").splitlines()]
    assert [line["axes"] for line in lines] == [{"select.layers": [0]}, {"select.layers": [1]}]
    assert lines[0]["scores"]["exact_match"]["mean"] == 1.0
    assert [line["status"] for line in lines] == ["ok", "not_applicable"]
    (folder,) = (here / "runs").iterdir()
    assert (folder / "report.html").is_file()
    said("run", "tiny.yaml", "--quiet")
    assert [path.name for path in (here / "runs").iterdir()] == [folder.name]

    again = [json.loads(line) for line in said("compare", "tiny", "--json").splitlines()]
    assert [line["scores"] for line in again] == [line["scores"] for line in lines]
    assert said("compare", str(folder), "--csv").startswith("run,cell,status")
    assert "100" in said("score", "tiny")
    assert Path(said("report", "tiny").strip()).resolve() == (folder / "report.html").resolve()


def test_ctrl_c_is_130(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lmleak.runs.run", interrupted)
    result = CliRunner().invoke(main, ["run", "tiny.yaml"])
    assert result.exit_code == 130
    assert "resumes" in result.stderr


def test_env_names_versions() -> None:
    facts = json.loads(said("env", "--json"))
    assert {"lmleak", "torch", "python", "HF_HUB_OFFLINE"} <= set(facts)


def test_modules_observe_says_what_each_shows_or_why_not(here: Path) -> None:
    table = said("modules", "tiny.yaml", "--observe")
    first, second = (line.split("  ") for line in table.splitlines() if ".weight" in line)
    assert "span, subspace" in [cell.strip() for cell in first]
    assert "the last layer" in second[-1]
    rows = [
        json.loads(line) for line in said("modules", "tiny.yaml", "--observe", "--json", "data.limit=1").splitlines()
    ]
    weights = [row for row in rows if row["name"].endswith("weight")]
    assert [row["layer"] for row in weights] == [0, 1]
    assert weights[0]["rank"] == weights[0]["tokens"] == sum(weights[0]["batch"]["tokens"])
    assert weights[0]["spectrum"][0] == 1.0
    chosen = said("modules", "tiny.yaml", "*.query", "--observe", "--layers", "1", "--json")
    assert {json.loads(line)["layer"] for line in chosen.splitlines()} == {1}
