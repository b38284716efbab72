"""Recipes: defaults, overrides, sweeps, ids."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmleak.config import cells, load_recipe, packaged
from lmleak.config.overrides import apply
from lmleak.config.source import Source, dump
from lmleak.errors import RecipeError, SelectionError

BASE = {"model": {"kind": "bert", "weights": "random"}, "data": "sample", "attack": "span"}
DP = {"kind": "dp_sgd", "noise_multiplier": 0.5}


def axes(recipe: dict, *overrides: str) -> list[dict]:
    return [dict(cell.axes) for cell in cells(load_recipe(recipe, overrides))]


def problems(recipe: dict, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides)
    return caught.value.problems


def test_defaults_are_filled_and_short_forms_written_out() -> None:
    recipe = load_recipe(BASE)
    assert recipe.attack == {"kind": "span"}
    assert recipe.defense == {"kind": "none"}
    assert [metric["kind"] for metric in recipe.metrics] == ["rouge", "token_accuracy", "exact_match"]
    assert recipe.knowledge == {"labels": False, "lengths": False, "special_tokens": True, "bn_statistics": False}
    assert recipe.data["batch_size"] == 1
    assert recipe.seed == 0


def test_name_is_the_file_stem(tmp_path: Path) -> None:
    path = tmp_path / "my study.yaml"
    path.write_text(dump(BASE))
    assert load_recipe(path).name == "my-study"


@pytest.mark.parametrize(
    ("layers", "resolved"),
    [
        (3, [3]),
        ("3-5", [3, 4, 5]),
        ("3-5,7", [3, 4, 5, 7]),
        ([1, 0], [0, 1]),
        ([0, "0-1"], [0, 1]),
        (-1, [-1]),
        ("-3--1", [-3, -2, -1]),
        ("2--1", ["2--1"]),
    ],
)
def test_layers(layers: object, resolved: list) -> None:
    assert load_recipe(BASE | {"select": {"layers": layers}}).select["layers"] == resolved


@pytest.mark.parametrize("layers", ["x", "5-3", True, 1.5, "", "1-", [], "0-99999"])
def test_what_is_no_layer_is_refused(layers: object) -> None:
    assert problems(BASE | {"select": {"layers": layers}})[0].startswith("recipe: select.layers")


def test_the_resolved_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = load_recipe(BASE | {"defense": DP, "sweep": {"seed": [0, 1], "select": [{"layers": "0-1"}]}})
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    again = load_recipe(path)
    assert again == recipe
    assert again.id == recipe.id
    assert [cell.id for cell in cells(again)] == [cell.id for cell in cells(recipe)]


def test_a_sweep_is_a_product_in_the_order_given() -> None:
    found = axes(BASE | {"sweep": {"seed": [1, 0], "select.layers": [[0], [-1]]}})
    assert [(one["seed"], one["select.layers"]) for one in found] == [(1, [0]), (1, [-1]), (0, [0]), (0, [-1])]


def test_a_list_of_sweeps_is_their_union_with_the_same_axes_for_every_cell() -> None:
    found = axes(BASE | {"sweep": [{"seed": [0, 1]}, {"seed": [1]}, {"defense": [DP]}]})
    assert found == [
        {"seed": 0, "defense": {"kind": "none"}},
        {"seed": 1, "defense": {"kind": "none"}},
        {"seed": 0, "defense": DP},
    ]


def test_a_swept_kind_keeps_nothing_of_the_other_kinds_fields() -> None:
    found = cells(load_recipe(BASE | {"defense": DP, "sweep": {"defense.kind": ["dp_sgd", "none"]}}))
    assert [cell.recipe.defense["kind"] for cell in found] == ["dp_sgd", "none"]
    assert found[1].recipe.defense == {"kind": "none"}


def test_an_id_is_what_can_change_the_result() -> None:
    def ids(**changes: object) -> list[str]:
        return [cell.id for cell in cells(load_recipe(BASE | changes))]

    assert ids() == ids(name="other") == ids(defense={"kind": "none"}, knowledge={"labels": False})
    assert len({ids()[0], ids(seed=1)[0], ids(select={"layers": 0})[0], ids(knowledge={"labels": True})[0]}) == 4
    assert ids(sweep={"seed": [0, 1]})[0] == ids()[0]
    assert ids(defense=DP | {"max_grad_norm": 1}) == ids(defense=DP | {"max_grad_norm": 1.0})


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"seed": 1}, "recipe: sweep.seed: should be a list of values, not 1"),
        ({"seed": []}, "recipe: sweep.seed: has no values"),
        ({"seed": [0, 1, 0]}, "recipe: sweep.seed.2: 0 is given twice"),
        ({"sed": [1]}, "recipe: sweep.sed: no field of this name can be swept; did you mean 'seed'?"),
        ({"name": ["a"]}, "recipe: sweep.name: no field of this name can be swept"),
        ({"select": {"layers": [0]}}, "recipe: sweep.select: should be a list of values"),
        ({"select.layer": [[0]]}, "recipe: select.layer: unknown key of this block; did you mean 'layers'?"),
        ({"seed": list(range(400)), "select.layers": list(range(400))}, "recipe: sweep: 160,000 cells"),
        ("seed", "recipe: sweep: should map fields to lists"),
    ],
)
def test_faults_of_a_sweep(sweep: object, message: str) -> None:
    assert problems(BASE | {"sweep": sweep})[0].startswith(message)


def test_one_fault_of_many_cells_is_told_once() -> None:
    assert len(problems(BASE | {"sweep": {"seed": list(range(9)), "defense": [{"kind": "non"}]}})) == 1


def test_overrides_in_any_order() -> None:
    words = ["defense.noise_multiplier=2", "defense.kind=dp_sgd", "data.limit=5", "name=a=b"]
    assert "name" in problems(BASE, *words)[0]
    recipe = load_recipe(BASE | {"defense": {"kind": "gaussian_noise", "std": 1.0}}, words[:3])
    assert (recipe.defense["kind"], recipe.defense["noise_multiplier"], recipe.data["limit"]) == ("dp_sgd", 2.0, 5)


def test_an_override_pins_a_swept_field() -> None:
    swept = BASE | {"sweep": {"seed": [0, 1], "select.layers": [[0], [1]]}}
    assert axes(swept, "seed=7") == [{"select.layers": [0]}, {"select.layers": [1]}]
    assert axes(swept, "select={layers: 2}") == [{"seed": 0}, {"seed": 1}]
    assert axes(swept, "sweep.seed=[3]", "select.layers=0") == [{"seed": 3}]
    assert axes(BASE | {"sweep": [{"seed": [0]}, {"seed": [1]}]}, "sweep.1.seed=[5]") == [{"seed": 0}, {"seed": 5}]


def test_an_override_that_no_cell_would_feel_is_an_error() -> None:
    swept = {"defense": ["none", DP]}
    assert "the sweep sets the whole of 'defense'" in problems(BASE | {"sweep": swept}, "defense.delta=0.1")[0]
    free = {"sweep": [{"defense": ["none"]}, {"seed": [1]}], "defense": DP}
    assert [cell.recipe.defense.get("delta") for cell in cells(load_recipe(BASE | free, ["defense.delta=0.1"]))] == [
        None,
        0.1,
    ]


@given(st.text("abcdefgh", min_size=1, max_size=5), st.text(max_size=20))
def test_an_override_is_in_the_recipe_or_an_error_that_quotes_it(key: str, value: str) -> None:
    word = f"data.{key}={value}"
    try:
        applied = apply(Source("r", {"data": {"kind": "sample"}}), [word])
    except RecipeError as error:
        assert f"override '{word}'" in str(error)  # noqa: PT017  both outcomes are right
    else:
        assert key in applied.value["data"]
        assert applied.place(("data", key)) == f"override '{word}'"


def test_errors_of_other_rooms_get_the_place_of_the_value_they_name(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        dump(BASE) + "select: {components: [attn_query, attn_qery]}\nsweep:\n  select.layers: [[0], [12]]\n"
    )
    recipe = load_recipe(path)
    named = recipe.explain(SelectionError("components: no component 'attn_qery'; did you mean 'attn_query'?"), "select")
    assert named.startswith(f"{path}:4:35: select.components.1: no component")
    swept = recipe.explain(SelectionError("layers: layer 12 is out of range: 0 to 5"), "select")
    assert swept.startswith(f"{path}:6:25: sweep.select.layers.1.0: layer 12")
    assert recipe.explain(SelectionError("nothing"), "select") == f"{path}:4:1: select: nothing"


@pytest.mark.parametrize("name", ["quickstart", "bert_layers", "gpt2_layers", "dp_bert", "dp_gpt2"])
def test_packaged_recipes_are_valid_and_open_with_their_question(name: str) -> None:
    assert cells(load_recipe(name))
    text = packaged()[name].read_text()
    assert text.startswith("# ")
    assert "?" in text.split("\n", 1)[0]
    assert f"#   lmleak run {name}\n" in text
