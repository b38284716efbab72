"""Noise for a wanted epsilon, what a training run spends, and settings that mean nothing."""

from __future__ import annotations

import json
import math

import pytest
from pydantic import ValidationError

from lmleak.config import load_recipe
from lmleak.defenses import dp_sgd, gaussian_epsilon, gaussian_noise, gdp_mu, noise_for_epsilon, training_epsilon
from lmleak.errors import RecipeError

DELTA = 1e-5


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0, 100.0, 1e4])
@pytest.mark.parametrize("steps", [1, 50])
def test_noise_of_full_batches_spends_what_was_asked(epsilon, steps):
    sigma = noise_for_epsilon(epsilon, DELTA, steps=steps)
    assert gaussian_epsilon(sigma / math.sqrt(steps), DELTA) == pytest.approx(epsilon, rel=1e-6)


def test_noise_of_a_sampled_run_spends_no_more_than_asked_and_little_less():
    sigma = noise_for_epsilon(3.0, DELTA, 0.02, 300)
    assert 2.98 < training_epsilon(sigma, 0.02, 300, DELTA)["epsilon"] <= 3.0
    assert sigma < noise_for_epsilon(3.0, DELTA, 1.0, 300)  # sampling saves noise


def test_mu_is_exact_for_full_batches_and_labelled_where_it_is_a_limit():
    assert gdp_mu(2.0, steps=4) == (1.0, "exact")
    mu, label = gdp_mu(1.0, 0.01, 10_000)
    assert mu == pytest.approx(math.sqrt(math.e - 1))
    assert "no bound" in label
    assert gdp_mu(0.01, 0.5, 10)[0] is None
    assert gdp_mu(0.0)[0] is None


def test_full_batches_without_prv_fall_back_to_the_closed_form_with_a_label():
    spent = training_epsilon(0.05, 1.0, 4, DELTA)
    assert spent["prv_epsilon"] is None
    assert spent["epsilon"] == pytest.approx(gaussian_epsilon(0.025, DELTA))
    assert "PRV does not converge" in spent["accountant"]
    assert spent["rdp_epsilon"] >= spent["epsilon"]


def test_a_run_is_stated_beside_its_single_release():
    config = dp_sgd.Config(noise_multiplier=1.0, sample_rate=0.01, steps=1000)
    stated = dp_sgd.privacy(config, 32)
    json.dumps(stated, allow_nan=False)
    assert stated["epsilon"] == pytest.approx(4.377, abs=1e-3)
    run = stated["training"]
    assert run["epsilon"] == pytest.approx(1.83, rel=0.02)
    assert run["epsilon"] <= run["rdp_epsilon"]
    for words in ("1,000 steps", "Poisson", "0.01", "1e-05", "adding or removing one record", "prv", "Assumed"):
        assert words in run["statement"]
    assert dp_sgd.privacy(dp_sgd.Config(noise_multiplier=1.0), 32)["training"] is None


def test_an_epsilon_in_place_of_noise_is_that_of_the_run():
    config = dp_sgd.Config(epsilon=4.377)
    assert dp_sgd.sigma(config) == pytest.approx(1.0, abs=1e-3)
    assert dp_sgd.gaussian(config).std == pytest.approx(1.0, abs=1e-3)
    stated = dp_sgd.privacy(config, 1)
    assert stated["epsilon"] == pytest.approx(4.377)
    assert stated["noise_multiplier"] == pytest.approx(1.0, abs=1e-3)
    run = dp_sgd.privacy(dp_sgd.Config(epsilon=2.0, steps=10), 1)
    assert run["training"]["epsilon"] == pytest.approx(2.0, rel=0.02)
    assert run["epsilon"] < 2.0


def test_what_means_little_is_said():
    loud = dp_sgd.privacy(dp_sgd.Config(noise_multiplier=0.01), 1)["statement"]
    assert "no guarantee" in loud
    assert "no guarantee" not in dp_sgd.privacy(dp_sgd.Config(noise_multiplier=1.0), 1)["statement"]
    assert "spends more" in loud
    coarse = dp_sgd.Config(noise_multiplier=1.0, delta=0.01, sample_rate=0.1, steps=5)
    assert "1,000" in dp_sgd.privacy(coarse, 100)["training"]["statement"]
    clipped = dp_sgd.privacy(dp_sgd.Config(noise_multiplier=0.0, steps=5), 1)["training"]
    assert clipped["epsilon"] is clipped["mu"] is None
    assert "no differential privacy" in clipped["statement"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "give either noise_multiplier"),
        ({"noise_multiplier": 1.0, "epsilon": 1.0}, "give either noise_multiplier"),
        ({"epsilon": 0.0}, "epsilon must be above 0, not 0.0"),
        ({"epsilon": -3.0}, "epsilon must be above 0, not -3.0"),
        ({"epsilon": math.inf}, "epsilon must be above 0"),
        ({"epsilon": 1e-12, "delta": 1e-9}, "no noise multiplier"),
        ({"noise_multiplier": 1.0, "sample_rate": 1.5}, "at most 1, not 1.5"),
        ({"noise_multiplier": 1.0, "sample_rate": 0.0}, "above 0 and at most 1, not 0.0"),
        ({"noise_multiplier": 1.0, "steps": 0}, "at least 1 step, not 0"),
        ({"noise_multiplier": -1.0, "steps": 5}, "not -1.0"),
    ],
)
def test_nonsense_is_refused(fields, says):
    with pytest.raises(ValidationError) as caught:
        dp_sgd.Config(**fields)
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["epsilon", "delta"])
def test_an_epsilon_asked_of_noise_without_clipping_is_refused_by_name(name):
    with pytest.raises(ValidationError, match="noise without clipping has no epsilon"):
        gaussian_noise.Config(std=1.0, **{name: 1e-5})


def recipe(defense: str, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(
        f"model: {{kind: bert, weights: random, tokenizer: bytes}}\ndata: sample\nattack: span\ndefense: {defense}\n",
        encoding="utf-8",
    )
    return path


def test_a_recipe_is_told_the_place(tmp_path):
    with pytest.raises(RecipeError, match=r"study\.yaml:4:.*defense\.sample_rate: .*at most 1, not 1\.5"):
        load_recipe(recipe("{kind: dp_sgd, noise_multiplier: 1.0, sample_rate: 1.5}", tmp_path))
    with pytest.raises(RecipeError, match=r"study\.yaml:4:.*defense.*: noise without clipping has no epsilon"):
        load_recipe(recipe("{kind: gaussian_noise, std: 1.0, epsilon: 3.0}", tmp_path))


def test_epsilon_can_be_swept(tmp_path):
    from lmleak.config import cells

    study = load_recipe(
        recipe("{kind: dp_sgd, epsilon: 8.0}", tmp_path), ["sweep={defense.epsilon: [1.0, 8.0, 100.0]}"]
    )
    assert [cell.recipe.defense["epsilon"] for cell in cells(study)] == [1.0, 8.0, 100.0]
