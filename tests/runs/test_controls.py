"""Controls: cells of their own beside every cell, which resume, print and score like any other."""

from __future__ import annotations

import json
import re

import pytest
import torch

from lmleak.config import cells, load_recipe
from lmleak.errors import DataError, RecipeError
from lmleak.records import Reconstruction
from lmleak.runs import cell_lines, load_results, read_results, rescore, run

ALL = ["wrong_update", "no_gradient", "replay"]


def with_controls(recipe, *names):
    recipe["sweep"] = {"select.layers": [[0]]}
    return {**recipe, "controls": list(names)}


def test_a_recipe_without_controls_keeps_its_ids(recipe, puppet):
    plain, controlled = load_recipe(recipe), load_recipe({**recipe, "controls": ALL})
    assert plain.id == load_recipe({**recipe, "controls": []}).id != controlled.id
    own = [cell for cell in cells(controlled) if cell.control is None]
    assert [cell.id for cell in own] == [cell.id for cell in cells(plain)]
    assert len({cell.id for cell in cells(controlled)}) == 16
    assert [cell.axes["control"] for cell in cells(controlled)[:4]] == ["none", *ALL]
    assert "control" not in cells(plain)[0].axes
    assert load_recipe({**recipe, "controls": "replay"}).controls == ["replay"]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (["replay", "wrong_updat"], "controls.1: no control \"wrong_updat\"; did you mean 'wrong_update'?"),
        (["replay", "replay"], "controls.1: 'replay' is given twice"),
        ({"replay": 1}, "controls: should be a list of wrong_update, no_gradient, replay"),
        ([3], "(there are: wrong_update, no_gradient, replay)"),
    ],
)
def test_what_is_no_control_is_refused_at_its_place(recipe, puppet, value, says):
    with pytest.raises(RecipeError) as caught:
        load_recipe({**recipe, "controls": value})
    assert any(says in problem for problem in caught.value.problems)


def test_the_attack_gets_the_next_batchs_gradient_or_noise_of_its_norm(recipe, puppet, tmp_path):
    met = []

    def act(config, observation, generator):
        released = next(iter(observation.gradients.values()))
        met.append((released, float(torch.rand(1, generator=generator))))
        return Reconstruction(((1, 2),), ("some text",))

    puppet.act = act
    result = run(with_controls(recipe, "wrong_update", "no_gradient"), root=tmp_path, quiet=True)
    own, wrong, noise = met[:2], met[2:4], met[4:]
    assert torch.equal(wrong[0][0], own[1][0])
    assert torch.equal(wrong[1][0], own[0][0])
    assert not torch.equal(noise[0][0], own[0][0])
    assert torch.allclose(noise[0][0].norm(), own[0][0].norm())
    assert [draw for _, draw in own] == [draw for _, draw in wrong] == [draw for _, draw in noise]
    line = read_results(result)[2]
    assert line["details"]["wrong_update"]["gradient_of"] == 1
    assert set(load_results(result)["control"]) == {"none", "wrong_update", "no_gradient"}


def test_another_batch_is_needed_for_its_gradient(recipe, puppet, tmp_path):
    made = with_controls(recipe, "wrong_update")
    made["data"] = {**made["data"], "limit": 1}
    with pytest.raises(DataError, match=re.escape("controls.0: wrong_update takes the gradient of another batch")):
        run(made, root=tmp_path / "runs", quiet=True)
    assert not puppet.calls
    assert not (tmp_path / "runs").exists()


def test_replay_is_the_attacks_own_measure_at_the_truth_or_says_that_there_is_none(recipe, puppet, tmp_path):
    lines = cell_lines(run(with_controls(recipe, "replay"), root=tmp_path, quiet=True))
    assert (lines[1]["status"], lines[1]["scores"]) == ("not_applicable", None)
    assert "no measure" in lines[1]["reason"]
    given = []

    def replay(config, observation, knowledge, victim, tokens):
        given.append(tokens)
        return {"energy": 0.5 * len(given)}

    puppet.replay = replay
    made = with_controls({**recipe, "seed": 1}, "replay")
    result = run(made, root=tmp_path, quiet=True)
    line = cell_lines(result)[1]
    assert (line["status"], line["scores"], line["scores_all"]) == ("ok", None, None)
    assert line["replay"]["energy"] == {"mean": 0.75, "low": 0.5, "high": 1.0, "n": 2}
    assert len(given[0]) == 1
    assert len(given[0][0]) == 8  # special tokens included
    rescore(result)
    assert cell_lines(result)[1] == line


def test_span_explains_the_gradient_at_the_truth(recipe, tmp_path):
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    made = with_controls(recipe, "replay", "wrong_update", "no_gradient")
    made |= {"attack": {"kind": "span"}, "model": {**recipe["model"], "config": config, "dtype": "float64"}}
    result = run(made, root=tmp_path, quiet=True)
    own, replay, wrong, noise = cell_lines(result)
    assert own["scores"]["exact_match"]["mean"] == 1.0
    assert max(replay["replay"][name]["mean"] for name in ("unexplained", "outside", "missed")) < 1e-6
    assert wrong["scores"]["exact_match"]["mean"] == 0.0
    assert (noise["status"], noise["scores"], noise["scores_all"]) == ("no_signal", None, None)
    other = [line["details"]["wrong_update"] for line in read_results(result) if line["cell"] == wrong["cell"]]
    assert [one["scores"]["exact_match"] for one in other] == [1.0, 1.0]  # it read the sentence whose gradient it got


def test_controls_resume_and_print_one_line_each(recipe, puppet, tmp_path, capsys):
    made = with_controls(recipe, *ALL)
    first = run(made, root=tmp_path, quiet=True, json_lines=True)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["axes"]["control"] for line in printed] == ["none", *ALL]
    assert printed == cell_lines(first)
    calls = len(puppet.calls)
    again = run(made, root=tmp_path, quiet=True)
    assert (again.path, again.ran, len(puppet.calls)) == (first.path, 0, calls)


def test_scores_of_all_batches_count_the_best_guess_and_nothing_for_a_refusal(recipe, puppet, tmp_path):
    statuses = iter(["ok", "budget_exhausted", "not_applicable", "budget_exhausted"])

    def act(config, observation, generator):
        status = next(statuses)
        texts = () if status == "not_applicable" else ("some text",)
        return Reconstruction(
            ((1, 2),) if texts else (), texts, status=status, reason=None if status == "ok" else "late"
        )

    puppet.act = act
    recipe["sweep"] = {"attack.strength": [1, 2]}
    recipe["metrics"] = ["rouge", "exact_match"]
    result = run(recipe, root=tmp_path, quiet=True)
    mixed, refused = cell_lines(result)
    assert mixed["scores"]["exact_match"]["n"] == 1
    assert mixed["scores_all"]["exact_match"]["n"] == 2
    assert (refused["status"], refused["scores"]) == ("not_applicable", None)
    assert refused["scores_all"]["exact_match"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 2}
    before = cell_lines(result)
    rescore(result)
    assert cell_lines(result) == before
