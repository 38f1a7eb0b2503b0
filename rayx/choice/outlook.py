"""What a mixture is predicted to reach in the final run: the fitted models, with repetition priced.

Proxies are too short to repeat a domain as often as the final run would, so the models price
repetition at nothing. With a `Supply`, a mixture is judged by what its tokens are worth.

Shapes: M mixtures, K domains, F folds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rayx.errors import ChoiceError
from rayx.fit.fitted import FittedTable
from rayx.fit.regressor import Predictor
from rayx.units import REPETITION_R_STAR, effective_tokens

# -dlog L / dlog D of L = 1.69 + 406.4 / N^.34 + 410.7 / D^.28 at 7e9 parameters, 1.4e11 tokens.
TOKENS_ELASTICITY = 0.04


@dataclass(frozen=True, kw_only=True)
class Supply:
    """The tokens that there are for the final run, and what repeating them is worth.

    e_k = effective_tokens(w_k D, U_k): the models see the shares e / sum(e), and their losses are
    multiplied by (sum(e) / D)^-elasticity, since the run learns from sum(e) tokens and not D.

    Attributes:
        domain_tokens: Domain -> tokens U_k, >= 0.
        budget_tokens: Tokens D of the final run, > 0.
        r_star: R* of `effective_tokens`, > 0.
        elasticity: By which power of its tokens a run's loss falls, >= 0; from a law where there
            is one.

    Source: Muennighoff et al. 2023, arXiv:2305.16264, for e_k; the default elasticity is that of
        Hoffmann et al. 2022, arXiv:2203.15556, equation 10.
    Differs: theirs is a law of one corpus. Domains are discounted one by one, and the total enters
        through a power law about the budget; both are approximations, good while little is lost.
    """

    domain_tokens: Mapping[str, float]
    budget_tokens: float
    r_star: float = REPETITION_R_STAR
    elasticity: float = TOKENS_ELASTICITY

    def __post_init__(self) -> None:
        for name, least in (("budget_tokens", 0.0), ("r_star", 0.0), ("elasticity", -1e-300)):
            if not least < getattr(self, name) < np.inf:
                raise ChoiceError(
                    f"The supply's {name} is {getattr(self, name)}; expected a finite number"
                    f"{' >= 0' if least else ' > 0'}."
                )

    def epochs(self, domains: tuple[str, ...], weights_MK: np.ndarray) -> np.ndarray:
        """Passes over each domain, shape of the weights; huge where there are no tokens."""
        tokens_MK, unique_K = weights_MK * self.budget_tokens, self._unique(domains)
        return np.where(tokens_MK > 0, tokens_MK / np.where(unique_K > 0, unique_K, 1e-300), 0.0)

    def worth(
        self, domains: tuple[str, ...], weights_MK: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the effective shares, shape (M, K), and the factor on the losses, shape (M,)."""
        tokens_MK = weights_MK * self.budget_tokens
        worth_MK = effective_tokens(tokens_MK, self._unique(domains), self.r_star)
        total_M1 = np.maximum(worth_MK.sum(1, keepdims=True), 1e-9 * self.budget_tokens)
        kept_M = total_M1[:, 0] / tokens_MK.sum(1)
        return worth_MK / total_M1, kept_M**-self.elasticity

    def _unique(self, domains: tuple[str, ...]) -> np.ndarray:
        for domain in domains:
            if not 0 <= self.domain_tokens.get(domain, -1) < np.inf:
                raise ChoiceError(
                    f"The supply of {domain!r} is {self.domain_tokens.get(domain)}; expected "
                    f"its tokens, a finite number >= 0."
                )
        return np.array([float(self.domain_tokens[domain]) for domain in domains])


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """The models' view of a mixture under an objective and, where given, a supply.

    Attributes:
        fitted: The models.
        objective: Target -> weight; they sum to 1.
        supply: Prices repetition; None for not at all.
    """

    fitted: FittedTable
    objective: Mapping[str, float]
    supply: Supply | None = None

    def seen(self, weights_MK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the models see of the mixtures, and the factor on their losses."""
        if self.supply is None:
            return weights_MK, np.ones(len(weights_MK))
        return self.supply.worth(self.fitted.table.domains, weights_MK)

    def loss(self, target: str, weights_MK: np.ndarray) -> np.ndarray:
        """Predicted loss of one target, shape (M,)."""
        seen_MK, factor_M = self.seen(weights_MK)
        return factor_M * self.fitted.models[target].predict_all(seen_MK)

    def losses(self, weights_K: np.ndarray) -> dict[str, float]:
        """Predicted losses of one mixture, of every target of the table."""
        targets = self.fitted.table.targets
        return {target: float(self.loss(target, weights_K[None])[0]) for target in targets}

    def value(self, weights_MK: np.ndarray) -> np.ndarray:
        """Predicted objective, shape (M,)."""
        seen_MK, factor_M = self.seen(weights_MK)
        return factor_M * self.fitted.objective(seen_MK, self.objective)

    def folds(self) -> list[Predictor]:
        """The objective as the models predict it that were fitted without one fold each."""
        models = [self.fitted.models[target] for target in self.objective]
        num_folds = min(len(model.predict_folds) for model in models)

        def fold(f: int) -> Predictor:
            def value(weights_MK: np.ndarray) -> np.ndarray:
                seen_MK, factor_M = self.seen(weights_MK)
                parts = zip(models, self.objective.values(), strict=True)
                return factor_M * sum(
                    share * model.predict_folds[f](seen_MK) for model, share in parts
                )

            return value

        return [fold(f) for f in range(num_folds)]

    def value_and_std(self, weights_K: np.ndarray) -> tuple[float, float]:
        """Predicted objective of one mixture, and its standard deviation for one more run."""
        seen_MK, factor_M = self.seen(weights_K[None])
        value_M, std_M = self.fitted.objective(seen_MK, self.objective, std=True)
        return float(factor_M[0] * value_M[0]), float(factor_M[0] * std_M[0])

    def interval(self, weights_K: np.ndarray, level: float) -> tuple[float, float]:
        """Interval for the objective of one more run of one mixture."""
        seen_MK, factor_M = self.seen(weights_K[None])
        low_M, high_M = self.fitted.objective_interval(seen_MK, self.objective, level)
        return float(factor_M[0] * low_M[0]), float(factor_M[0] * high_M[0])

    def difference(
        self, weights_K: np.ndarray, other_K: np.ndarray, level: float
    ) -> tuple[float, float, float]:
        """Objective of one mixture less that of another: (difference, low, high)."""
        both_MK = np.stack([weights_K, other_K])
        (seen_K, seen_other_K), _ = self.seen(both_MK)
        plain, low, high = self.fitted.difference(seen_K, seen_other_K, self.objective, level)
        value, other = self.value(both_MK)
        # The factors of a supply move the difference; how uncertain it is stays the same.
        gap = float(value - other)
        return gap, gap + low - plain, gap + high - plain
