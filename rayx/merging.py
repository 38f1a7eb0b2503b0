"""Merged candidates: experts, an operator and weights, as specs beside those of trained runs.

A merged candidate trains nothing. It stands for the run on the mixture that its weights make of its
experts' own mixtures: experts trained on 50% general text and 50% of a domain give, with weights a,
the mixture .5 general + .5 a, and not a.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from rayx.errors import UNREADABLE, SpecError
from rayx.merge_operator import Operator
from rayx.mixture import Mixture
from rayx.recipe import Evaluation, ModelShape, require
from rayx.spec import FORMAT, Parent, Precision, TrainSpec

__all__ = ["Experts", "MergeSpec", "Operator", "Spec", "spec_from_json"]

DECIMALS = 9  # of weights
OUTSIDE_TOLERANCE = 1e-4  # L1 distance of a mixture from the experts' hull that rounding explains


@dataclass(frozen=True)
class Experts:
    """Experts that are merged together: states of runs of one model on one corpus.

    Attributes:
        members: A state each; order is the order of merge weights.
    """

    members: tuple[Parent, ...]

    def __post_init__(self) -> None:
        require(
            isinstance(self.members, tuple) and bool(self.members),
            "Experts.members",
            self.members,
            "a tuple of at least one Parent",
        )
        for member in self.members:
            require(isinstance(member, Parent), "A member of Experts", member, "a Parent")
        names = [member.checkpoint for member in self.members]
        require(len(set(names)) == len(names), "Experts.members", names, "each state once")
        first = self.members[0].spec
        for member in self.members[1:]:
            for name in ("corpus", "model", "precision"):
                theirs = getattr(member.spec, name)
                require(
                    theirs == getattr(first, name),
                    f"TrainSpec.{name} of expert {member.spec.run_id}",
                    theirs,
                    f"that of expert {first.run_id} ({getattr(first, name)!r})",
                )

    @classmethod
    def of(cls, specs: Sequence[TrainSpec]) -> Experts:
        """Return the experts that these runs end as."""
        return cls(tuple(Parent(spec, spec.steps) for spec in specs))

    # Thousands of candidates ask for these.

    @cached_property
    def base(self) -> Parent | None:
        """The state that all members branch from, or None."""
        first = self.members[0].spec.parent
        return first if all(member.spec.parent == first for member in self.members) else None

    @cached_property
    def expert_set_id(self) -> str:
        """Hash of the members' checkpoints, which are hashes of what decides them."""
        return _digest([member.checkpoint for member in self.members])

    @cached_property
    def domains(self) -> tuple[str, ...]:
        """All domains that an expert's own schedule reads, sorted."""
        return tuple(sorted({d for m in self.members for d in m.spec.schedule.average()}))

    @cached_property
    def mixtures_KD(self) -> np.ndarray:
        """The component matrix: each expert's own mixture over `domains`; its trunk is left out."""
        domains = self.domains
        return np.stack([m.spec.schedule.average().to_array(domains) for m in self.members])

    def weights_for(self, mixture: Mixture) -> tuple[float, ...]:
        """Return the weights a >= 0 with sum 1 whose merge stands for a mixture.

        a = argmin ||sum_k a_k q_k - mixture||, q_k the experts' own mixtures.

        Source: OP-MIX, arXiv:2605.15220 (components trained on a blend of general and domain text
            stand for the blend; read in a note on the paper).

        Raises:
            SpecError: The mixture is not in the hull of the experts' own mixtures.
        """
        from scipy.optimize import nnls  # takes a while to import, and most readers never need it

        domains = self.domains
        mixture.check(domains, f"experts {self.expert_set_id}")
        q_KD = self.mixtures_KD
        # The sum is asked for as one more, heavy, equation.
        left = np.vstack([q_KD.T, 1e3 * np.ones(len(self.members))])
        weights_K, _ = nnls(left, np.append(mixture.to_array(domains), 1e3))
        weights_K /= weights_K.sum()
        missed = np.abs(weights_K @ q_KD - mixture.to_array(domains)).sum()
        require(
            bool(missed <= OUTSIDE_TOLERANCE),
            "The mixture to stand for",
            dict(mixture),
            f"one inside the hull of the experts' own mixtures; it is {missed:.3f} (L1) outside. "
            "Experts with a smaller share of general text reach further",
        )
        return _rounded(weights_K)

    def merge(
        self,
        weights: Sequence[float],
        operator: Operator | None = None,
        evaluation: Evaluation | None = None,
    ) -> MergeSpec:
        """Return a merged candidate, by default evaluated as the first expert is."""
        usual = dataclasses.replace(self.members[0].spec.evaluation, points=1)
        return MergeSpec(
            experts=self,
            weights=tuple(weights),
            operator=operator or Operator(),
            evaluation=evaluation or usual,
        )

    @cached_property
    def json(self) -> list[dict[str, Any]]:
        """Plain JSON data; not to be changed."""
        return [{"spec": m.spec.to_json(), "steps": m.steps} for m in self.members]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeSpec:
    """Everything that decides a merged candidate's result.

    Attributes:
        experts: What is merged; operators on task vectors take the base that they branch from.
        weights: One an expert, >= 0, not all 0, kept to 9 decimals, never normalised.
        operator: How.
        evaluation: On what; `points` is 1, for there is no curve.
    """

    experts: Experts
    weights: tuple[float, ...]
    operator: Operator = field(default_factory=Operator)
    evaluation: Evaluation

    def __post_init__(self) -> None:
        kinds = {"experts": Experts, "operator": Operator, "evaluation": Evaluation}
        for name, kind in kinds.items():
            value = getattr(self, name)
            require(isinstance(value, kind), f"MergeSpec.{name}", value, f"a {kind.__name__}")
        require(
            len(self.weights) == len(self.experts.members),
            "The number of MergeSpec.weights",
            len(self.weights),
            f"one for each of the {len(self.experts.members)} experts",
        )
        self.operator.check_weights(self.weights, self.experts.base)
        require(
            min(self.weights) >= 0,
            "MergeSpec.weights",
            list(self.weights),
            "weights >= 0, for a candidate stands for a mixture (`rayx merge` takes negative ones)",
        )
        require(self.evaluation.points == 1, "MergeSpec.evaluation.points",
                self.evaluation.points, "1")  # fmt: skip
        object.__setattr__(self, "weights", _rounded(self.weights))

    @property
    def parents(self) -> tuple[Parent, ...]:
        """The states that it is made of."""
        members, base = self.experts.members, self.experts.base
        return (*members, base) if base and self.operator.needs_base else members

    @property
    def corpus(self) -> str:
        """Fingerprint of the experts' corpus."""
        return self.experts.members[0].spec.corpus

    @property
    def model(self) -> ModelShape:
        """The experts' shape."""
        return self.experts.members[0].spec.model

    @property
    def precision(self) -> Precision:
        """The experts' precision."""
        return self.experts.members[0].spec.precision

    @property
    def mixture(self) -> Mixture:
        """What it stands for: sum_k w_k q_k over the experts' own mixtures q_k, rescaled."""
        weights_D = np.array(self.weights) @ self.experts.mixtures_KD
        return Mixture.from_array(weights_D, self.experts.domains)

    @property
    def tokens(self) -> int:
        """Training tokens of the run that it stands for: the mean of its experts'."""
        return round(np.mean([m.steps * m.spec.batch_tokens for m in self.experts.members]))

    @property
    def trunk_tokens(self) -> int:
        """Tokens of the experts' trunks, their mean."""
        return round(np.mean([m.spec.trunk_tokens for m in self.experts.members]))

    @property
    def domain_tokens(self) -> dict[str, float]:
        """Domain -> tokens that it reads itself: none."""
        return {}

    @property
    def run_id(self) -> str:
        """First 12 hex digits of the sha256 of what decides the result."""
        return _digest({"format": FORMAT, **self._own_json(), "experts": self.expert_set_id})

    @property
    def expert_set_id(self) -> str:
        """Id of its experts."""
        return self.experts.expert_set_id

    @property
    def pack_key(self) -> str:
        """Candidates with equal keys can share a pack: what is loaded and evaluated is the same."""
        loaded = {"experts": self.expert_set_id, "base": self.operator.needs_base}
        return json.dumps({"kind": "merge", **loaded, **self.evaluation.to_json()})

    def columns(self) -> dict[str, Any]:
        """Return the spec's columns of `Store.runs`."""
        first = self.experts.members[0].spec
        return {
            "kind": "merge",
            "corpus": self.corpus,
            "params": self.model.params,
            "tokens": self.tokens,
            "trunk_tokens": self.trunk_tokens,
            "parent": self.experts.base.spec.run_id if self.experts.base else None,
            "expert_set": self.expert_set_id,
            "operator": str(self.operator),
            "seed": first.seed,
            "data_seed": first.data_seed,
            "layers": self.model.layers,
            "width": self.model.width,
            "context": self.model.context,
            "phases": 1,
            **{f"weight/{d}": w for d, w in self.mixture.items()},
        }

    def _own_json(self) -> dict[str, Any]:
        return {
            "kind": "merge",
            "weights": list(self.weights),
            "operator": self.operator.to_json(),
            "evaluation": self.evaluation.to_json(),
        }

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data from which `from_json` makes an equal spec."""
        return {**self._own_json(), "experts": self.experts.json}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> MergeSpec:
        """Read what `to_json` wrote.

        Raises:
            SpecError: A field is missing, unknown or out of range, or the data contain themselves.
        """
        try:
            unknown = set(data) - {"kind", "weights", "operator", "evaluation", "experts"}
            if unknown:
                raise SpecError(f"Spec has fields {sorted(unknown)} that this rayx does not know.")
            return cls(
                experts=_experts(json.dumps(data["experts"], sort_keys=True)),
                weights=tuple(data["weights"]),
                operator=Operator(**data["operator"]),
                evaluation=Evaluation(**data["evaluation"]),
            )
        except UNREADABLE as error:
            raise SpecError(
                f"Spec cannot be read: {error!r}. Expected what MergeSpec.to_json wrote."
            ) from error


Spec = TrainSpec | MergeSpec


def spec_from_json(data: dict[str, Any]) -> Spec:
    """Read a spec of either kind.

    Raises:
        SpecError: It is of an unknown kind, or its class refuses it.
    """
    kinds = {"train": TrainSpec, "merge": MergeSpec}
    if not isinstance(data, dict):
        raise SpecError(f"Spec cannot be read: it is {data!r:.40}, not an object.")
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise SpecError(f"Spec has kind {kind!r}; expected one of {', '.join(kinds)}.")
    return kinds[kind].from_json(data)


@lru_cache(maxsize=64)
def _experts(text: str) -> Experts:
    # Thousands of candidates share an expert set: it is read once.
    members = json.loads(text)
    return Experts(tuple(Parent(TrainSpec.from_json(m["spec"]), m["steps"]) for m in members))


def _digest(data: Any) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _rounded(weights: Sequence[float] | np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(weight), DECIMALS) for weight in weights)
