"""Merge operators by name and what each takes; the arithmetic is in `rayx.proxy.merge`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rayx.errors import SpecError, did_you_mean
from rayx.recipe import is_int, is_number, require

# Name -> (uses the base, trims task vectors to a density)
OPERATORS: dict[str, tuple[bool, bool]] = {
    "linear": (False, False),
    "soup": (False, False),
    "task_arithmetic": (True, False),
    "slerp": (False, False),
    "multi_slerp": (False, False),
    "ties": (True, True),
    "dare": (True, True),
    "dare_ties": (True, True),
    "pcb": (True, True),
}
SUM_TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """How experts become one model; `rayx.proxy.merge.operators` has the formulas and papers.

    Attributes:
        name: One of OPERATORS.
        density: Share of each task vector that is kept, in (0, 1]; for ties, dare, dare_ties and
            pcb only.
        scale: Factor on the merged task vector, > 0; for operators on task vectors only.
        seed: Draws DARE's masks.
    """

    name: str = "linear"
    density: float | None = None
    scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in OPERATORS:
            raise SpecError(
                f"Operator {self.name!r} is unknown; expected one of {', '.join(OPERATORS)}."
                f"{did_you_mean(str(self.name), tuple(OPERATORS))}"
            )
        if OPERATORS[self.name][1]:
            require(
                is_number(self.density) and 0 < float(self.density or 0) <= 1,
                f"Operator.density of {self.name}",
                self.density,
                "a share in (0, 1]",
            )
        else:
            require(self.density is None, f"Operator.density of {self.name}", self.density, "None")
        require(
            is_number(self.scale) and self.scale > 0, "Operator.scale", self.scale, "a number > 0"
        )
        require(
            self.needs_base or self.scale == 1.0,
            f"Operator.scale of {self.name}",
            self.scale,
            "1, for it has no task vector to scale",
        )
        require(is_int(self.seed) and self.seed >= 0, "Operator.seed", self.seed, "an integer >= 0")

    def __str__(self) -> str:
        """Return the name, with the options that are not the usual ones."""
        usual = {f.name: f.default for f in dataclasses.fields(self)}
        options = [f"{k}={v:g}" for k, v in self.to_json().items() if v != usual[k] and k != "name"]
        return f"{self.name}({', '.join(options)})" if options else self.name

    @property
    def needs_base(self) -> bool:
        """Whether it works on task vectors, the experts' differences from their base."""
        return OPERATORS[self.name][0]

    def check_weights(self, weights: Sequence[float], base: object) -> None:
        """Refuse weights that this operator cannot take; negative ones are for task vectors only.

        Raises:
            SpecError: A weight is not finite, all are 0, a sum is not 1 where it must be, there are
                not two experts for slerp, or the base that the operator needs is None.
        """
        for weight in weights:
            require(is_number(weight), "A merge weight", weight, "a finite number")
            require(
                weight >= 0 or self.name == "task_arithmetic",
                f"A merge weight of {self.name}",
                weight,
                "a number >= 0 (only task_arithmetic takes something away)",
            )
        require(any(weights), "The merge weights", list(weights), "at least one that is not 0")
        require(
            self.name != "slerp" or len(weights) in (1, 2),
            "The number of experts of slerp",
            len(weights),
            "2; multi_slerp takes more",
        )
        if self.name == "linear":
            require(
                abs(sum(weights) - 1) <= SUM_TOLERANCE,
                "The sum of linear merge weights",
                round(sum(weights), 6),
                "1; weights are never normalised silently (task_arithmetic takes any sum)",
            )
        if self.name == "soup":
            require(
                max(weights) - min(weights) <= SUM_TOLERANCE,
                "The weights of a soup",
                list(weights),
                "equal ones; linear takes others",
            )
        require(
            not self.needs_base or base is not None,
            f"The base of {self.name}",
            base,
            "the model that all experts start from",
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return dataclasses.asdict(self)
