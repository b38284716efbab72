"""Probes: how well a predictive family reads a class, or the input itself, off gradients. Always held out.

Usable (V-) information is I_V(g -> y) = H(y) - H_V(y | g), the best that a family V can do (Xu et al., 2020, arXiv
2002.10689). V must hold the constant predictor: each fit is mixed with the class frequencies, by a weight that inner
folds choose. A family that learned nothing then scores 0 and not below.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from lmleak.errors import LmleakError

Family = Literal["logistic", "mlp", "forest"]
MIXES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999)  #: never 1: one sure mistake would cost infinitely many bits
INNER = 3  #: folds within the training part that choose strength and mix
COMPONENTS = 64  #: principal components that a family sees


@dataclass(frozen=True)
class Held:
    """Held-out predictions."""

    probabilities: np.ndarray  #: [n, classes]
    prior: np.ndarray  #: [n, classes], class frequencies of each training part

    def bits(self, y: np.ndarray) -> np.ndarray:
        """log2 q(y|g) - log2 q(y) of every sample, [n]; y are class indices."""
        rows = np.arange(len(y))
        return np.log2(self.probabilities[rows, y]) - np.log2(self.prior[rows, y])


def constant(features: np.ndarray) -> bool:
    """Whether every sample has the same features [n, k]: there is nothing to fit."""
    return not np.ptp(features, axis=0).any()


def crossfit(features: np.ndarray, y: np.ndarray, family: Family, folds: int, seed: int) -> Held:
    """Predictions of a family for samples it was not fitted to.

    Args:
        features: [n, k]; standardised and reduced to principal components inside every training part.
        y: [n] class indices 0..classes-1.
        family: logistic regression, one hidden layer, or a random forest (scikit-learn's).
        folds: stratified.
        seed: of folds and families.

    Raises:
        LmleakError: a class has fewer samples than there are folds.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import StratifiedKFold

    counts = np.bincount(y)
    if counts.min() < max(folds, INNER + 1):
        raise LmleakError(
            f"a class has {counts.min()} samples, too few for {folds} folds; take more samples or fewer folds"
        )
    out = np.empty((len(y), len(counts)))
    prior = np.empty_like(out)
    with warnings.catch_warnings():
        # A family is what it reaches within its budget of steps.
        warnings.simplefilter("ignore", ConvergenceWarning)
        for train, test in StratifiedKFold(folds, shuffle=True, random_state=seed).split(features, y):
            known = np.bincount(y[train], minlength=len(counts)) / len(train)
            reduce = _reduction(len(train), features.shape[1], seed).fit(features[train])
            x = reduce.transform(features[train])
            make, mix = _chosen(x, y[train], family, seed)
            prior[test] = out[test] = known
            if mix:
                read = make().fit(x, y[train]).predict_proba(reduce.transform(features[test]))
                out[test] = mix * read + (1 - mix) * known
    return Held(out, prior)


def _reduction(samples: int, width: int, seed: int) -> Any:
    """Standardised principal components: no label is used, so one fit serves the inner folds too."""
    from sklearn.decomposition import PCA
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    kept = PCA(min(COMPONENTS, samples // 2, width), svd_solver="full", random_state=seed)
    return make_pipeline(StandardScaler(), kept, StandardScaler())


def _chosen(x: np.ndarray, y: np.ndarray, family: Family, seed: int) -> tuple[Callable[[], Any], float]:
    """The strength of regularisation and the mix with the class frequencies that inner folds like best."""
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    known = np.bincount(y) / len(y)
    inner = StratifiedKFold(INNER, shuffle=True, random_state=seed)
    best: tuple[float, Callable[[], Any], float] | None = None
    for strength in _STRENGTHS[family]:
        make = partial(_model, family, strength, seed)
        own = cross_val_predict(make(), x, y, cv=inner, method="predict_proba")[np.arange(len(y)), y]
        for mix in MIXES:
            loss = -float(np.log(mix * own + (1 - mix) * known[y]).mean())
            if best is None or loss < best[0]:
                best = loss, make, mix
    assert best is not None
    return best[1], best[2]


_STRENGTHS: dict[Family, tuple[float, ...]] = {
    "logistic": (1e-3, 1e-2, 1e-1, 1.0),
    "mlp": (1.0, 10.0),
    "forest": (2, 8),
}


def _model(family: Family, strength: float, seed: int) -> Any:
    if family == "logistic":
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression(C=strength, max_iter=200)
    if family == "mlp":
        from sklearn.neural_network import MLPClassifier

        return MLPClassifier((32,), alpha=strength, solver="lbfgs", max_iter=100, random_state=seed)
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(100, min_samples_leaf=int(strength), random_state=seed)


def decoded(features: np.ndarray, target: np.ndarray, folds: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Held-out squared errors [n, dims] of a ridge regression, and of the training part's mean.

    Raises:
        LmleakError: fewer samples than two a fold.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import KFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(features) < 2 * folds:
        raise LmleakError(f"{len(features)} samples are too few for {folds} folds")
    error, spread = np.empty_like(target), np.empty_like(target)
    for train, test in KFold(folds, shuffle=True, random_state=seed).split(features):
        model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-3, 7, 21)))
        model.fit(features[train], target[train])
        error[test] = (model.predict(features[test]).reshape(len(test), -1) - target[test]) ** 2
        spread[test] = (target[train].mean(0) - target[test]) ** 2
    return error, spread


def interval(statistic: Callable[[np.ndarray], float], n: int, seed: int, draws: int = 1000) -> tuple[float, float]:
    """95 % bootstrap interval of a statistic of sample indices [n]."""
    draw = np.random.default_rng(seed)
    found = [statistic(draw.integers(n, size=n)) for _ in range(draws)]
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)
