"""Stage 5, regression: gradient-boosted trees, RegMix's and CLIMB's; the only module with lightgbm.

Shapes: R runs, K domains, M mixtures, I boosting rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightgbm
import numpy as np

from rayx.fit.regressor import PointRegressor, Predictor, make_folds

FIXED: dict[str, Any] = {
    "objective": "regression",
    "metric": "l2",
    "deterministic": True,
    "force_row_wise": True,
    "verbosity": -1,
}


@dataclass
class LightGBM(PointRegressor):
    """L(w) = sum of regression trees, least squares on the loss.

    `min_data_in_leaf` and the number of rounds are those with the least error in an inner
    cross-validation on the rows given to `fit`; other rows are never looked at.

    Args:
        learning_rate: Weight of each tree.
        num_leaves: Leaves of a tree. With 8 the held-out rows of RegMix's table are ranked as well
            as with the usual 31, in a quarter of the time.
        max_rounds: Upper limit of the number of trees.
        min_data_in_leaf: Leaf sizes to choose from. LightGBM's default of 20 collapses on sparse
            sweeps: Spearman .90 against .96 with 5, at 64 RegMix rows.
        inner_folds: Folds of the inner cross-validation.
        num_threads: Fixed, since sums in another order grow other trees.
        folds: See PointRegressor.
        seed: See PointRegressor.

    Source: Liu et al. 2024, arXiv:2407.01492, section 3.2.
    Differs: the authors' notebook stops early on the test set; here the rounds are chosen by inner
        cross-validation. Shallower trees, a larger learning rate.
    """

    learning_rate: float = 0.1
    num_leaves: int = 8
    max_rounds: int = 200
    min_data_in_leaf: tuple[int, ...] = (3, 8, 20)
    inner_folds: int = 3
    num_threads: int = 1

    def fit_point(self, weights_RK: np.ndarray, loss_R: np.ndarray) -> Predictor:
        fold_R = make_folds(weights_RK, self.inner_folds, self.seed)
        # A leaf larger than half a fold's training rows leaves no split at all.
        largest = max(2, len(loss_R) // 4)
        sizes = sorted({min(size, largest) for size in self.min_data_in_leaf})
        error_by_size = {
            size: self._error_by_round(size, weights_RK, loss_R, fold_R) for size in sizes
        }
        size = min(sizes, key=lambda size: error_by_size[size].min())
        rounds = int(np.argmin(error_by_size[size])) + 1
        return _predictor(self._grow(size, rounds, weights_RK, loss_R))

    def _error_by_round(
        self, size: int, weights_RK: np.ndarray, loss_R: np.ndarray, fold_R: np.ndarray
    ) -> np.ndarray:
        """Squared error on the inner held-out rows after 1 ... max_rounds trees, shape (I,)."""
        error_I = np.zeros(self.max_rounds)
        for fold in range(int(fold_R.max()) + 1):
            held_out = fold_R == fold
            history: dict[str, dict[str, list[float]]] = {}
            self._grow(
                size,
                self.max_rounds,
                weights_RK[~held_out],
                loss_R[~held_out],
                (weights_RK[held_out], loss_R[held_out], history),
            )
            # Growth ends before max_rounds when no split is left; the error then stays.
            errors = np.array(history["held_out"]["l2"])
            padded_I = np.pad(errors, (0, self.max_rounds - len(errors)), mode="edge")
            error_I += held_out.sum() * padded_I
        return error_I

    def _grow(
        self,
        size: int,
        rounds: int,
        weights_RK: np.ndarray,
        loss_R: np.ndarray,
        watched: tuple[np.ndarray, np.ndarray, dict] | None = None,
    ) -> lightgbm.Booster:
        params: dict[str, Any] = {
            "learning_rate": self.learning_rate,
            "num_leaves": self.num_leaves,
            "min_data_in_leaf": size,
            "num_threads": self.num_threads,
            "seed": self.seed,
            **FIXED,
        }
        data = lightgbm.Dataset(weights_RK, loss_R, params={"verbosity": -1})
        if watched is None:
            return lightgbm.train(params, data, num_boost_round=rounds)
        held_weights_RK, held_loss_R, history = watched
        return lightgbm.train(
            params,
            data,
            num_boost_round=rounds,
            valid_sets=[data.create_valid(held_weights_RK, held_loss_R)],
            valid_names=["held_out"],
            callbacks=[lightgbm.record_evaluation(history)],
        )


@dataclass
class ClimbTrees(PointRegressor):
    """L(w) = sum of regression trees that stops growing on a validation split of its own.

    The split is a share of the mixtures given to `fit`; other rows, those of a test among them, are
    never looked at. Losses are standardised first, so that L1 and L2 mean the same in any unit.

    Args:
        learning_rate: Weight of each tree.
        max_depth: Of a tree.
        min_data_in_leaf: Fewest rows of a leaf; fewer where half the rows would be less.
        lambda_l1: L1 regularisation of the leaves' values.
        lambda_l2: L2 regularisation of the leaves' values.
        patience: Growth ends after so many trees without a lower error on the validation split.
        max_rounds: Upper limit of the number of trees.
        validation_folds: One fold of so many is the validation split, >= 2.
        folds: See PointRegressor.
        seed: Seed of the split; see also PointRegressor.

    Source: Diao et al. 2025 (CLIMB), arXiv:2504.13161: depth, leaf size, L1 with L2, patience.
    Differs: strengths, learning rate and the size of the split are derived, the paper gives none.
    """

    learning_rate: float = 0.1
    max_depth: int = 4
    min_data_in_leaf: int = 5
    lambda_l1: float = 0.1
    lambda_l2: float = 1.0
    patience: int = 20
    max_rounds: int = 500
    validation_folds: int = 5

    def fit_point(self, weights_RK: np.ndarray, loss_R: np.ndarray) -> Predictor:
        mean, scale = float(loss_R.mean()), float(loss_R.std()) or 1.0
        held_R = make_folds(weights_RK, self.validation_folds, self.seed) == 0
        params = FIXED | {
            "learning_rate": self.learning_rate,
            "max_depth": self.max_depth,
            "num_leaves": 2**self.max_depth,
            "min_data_in_leaf": min(self.min_data_in_leaf, max(1, int((~held_R).sum()) // 2)),
            "lambda_l1": self.lambda_l1,
            "lambda_l2": self.lambda_l2,
            "num_threads": 1,  # sums in another order grow other trees
            "seed": self.seed,
        }
        z_R = (loss_R - mean) / scale
        data = lightgbm.Dataset(weights_RK[~held_R], z_R[~held_R], params={"verbosity": -1})
        booster = lightgbm.train(
            params,
            data,
            num_boost_round=self.max_rounds,
            valid_sets=[data.create_valid(weights_RK[held_R], z_R[held_R])],
            callbacks=[lightgbm.early_stopping(self.patience, verbose=False)],
        )
        predict = _predictor(booster)  # of the trees up to the least error
        return lambda weights_MK: mean + scale * predict(weights_MK)


def _predictor(booster: lightgbm.Booster) -> Predictor:
    return lambda weights_MK: np.asarray(booster.predict(weights_MK, num_threads=1), dtype=float)
