"""The plan: a choice made executable; what the final run reads, and all it needs to read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any

import rayx
from rayx.branching import make_branch, make_trunk
from rayx.choose import Choice
from rayx.corpus import Corpus
from rayx.errors import UNREADABLE, SpecError
from rayx.mixture import Mixture, Phase, Schedule, epochs
from rayx.spec import TrainSpec
from rayx.split import SplitChoice
from rayx.store import Store

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A schedule for the final run, with its evidence; needs neither store nor corpus to be read.

    Attributes:
        schedule: What to train on: phases of a mixture for a number of tokens.
        branches: Where one model becomes several: expert -> what it goes on with after `schedule`,
            from the state at its end. Empty for one model.
        decay_share: With branches: the share of each path, trunk included, over which the rate
            falls to its end.
        epochs: Domain -> passes over its tokens that the schedule takes.
        domain_tokens: Domain -> training tokens there are.
        caps: Domain -> largest share that was allowed; a domain left out had none.
        corpus: Fingerprint of the corpus.
        choice: The choice, with predicted losses, intervals, baselines and warnings.
        labels: Label (licence, language …) -> value -> its share of all that is trained on.
        verdict: Outcome of the verification in one sentence, or None.
        provenance: store (URL), runs (hash of the run_ids fitted), run_ids, rayx, created.
    """

    schedule: Schedule
    epochs: dict[str, float]
    domain_tokens: dict[str, int]
    caps: dict[str, float]
    corpus: str
    choice: dict[str, Any]
    provenance: dict[str, Any]
    branches: dict[str, Schedule] = field(default_factory=dict)
    decay_share: float | None = None
    labels: dict[str, dict[str, float]] = field(default_factory=dict)
    verdict: str | None = None

    @classmethod
    def of(
        cls,
        choice: Choice,
        corpus: Corpus,
        budget_tokens: int,
        caps: Mapping[str, float],
        store: Store,
        run_ids: Sequence[str],
    ) -> Plan:
        """Make the plan of one phase that trains on the chosen mixture for `budget_tokens`."""
        mixture = Mixture(choice.weights)
        return cls(
            schedule=Schedule.constant(mixture, budget_tokens),
            epochs=epochs(mixture, budget_tokens, corpus.tokens),
            domain_tokens={d: corpus.tokens[d] for d in dict.fromkeys((*corpus.domains, *mixture))},
            labels=corpus.mixture_labels(mixture),
            caps=dict(caps),
            corpus=corpus.fingerprint,
            choice=json.loads(choice.to_json()),
            provenance=provenance(store, run_ids),
        )

    @classmethod
    def of_split(
        cls,
        choice: SplitChoice,
        corpus: Corpus,
        general: Mixture,
        domains: Sequence[str],
        decay_share: float,
        store: Store,
        run_ids: Sequence[str],
    ) -> Plan:
        """Make the plan of a trunk on `general` and, where a split was chosen, an expert a domain.

        `epochs` counts for each domain the expert that reads it most.
        """
        trunk_tokens = round(choice.trunk_tokens)
        read = {d: general.get(d, 0.0) * trunk_tokens for d in corpus.domains}
        branches = {}
        if choice.branch_tokens > 0:
            own_tokens = max(1, round(choice.branch_tokens))
            branches = {d: Schedule.constant(Mixture({d: 1}), own_tokens) for d in domains}
            read |= {d: read[d] + own_tokens for d in domains}
        return cls(
            schedule=Schedule.constant(general, trunk_tokens),
            branches=branches,
            decay_share=decay_share,
            epochs={d: count / corpus.tokens[d] for d, count in read.items()},
            labels=corpus.mixture_labels(Mixture(read)),
            domain_tokens={d: corpus.tokens[d] for d in corpus.domains},
            caps={},
            corpus=corpus.fingerprint,
            choice=json.loads(choice.to_json()),
            provenance=provenance(store, run_ids),
        )

    def specs(self, template: TrainSpec) -> dict[str, TrainSpec]:
        """Return the runs that carry the plan out: expert -> run, or "model" -> the one run.

        Experts share a trunk, which a sweep trains first and once.

        Args:
            template: Model, optimizer, evaluation and seeds.
        """
        if not self.branches and self.decay_share is None:
            return {"model": dataclasses.replace(template, schedule=self.schedule)}
        (phase,) = self.schedule.phases
        trunk = make_trunk(template, phase.mixture, phase.tokens)
        paths = {name: branch.phases for name, branch in self.branches.items()} or {"model": ()}
        return {
            name: make_branch(trunk, phase.tokens, phases, self.decay_share or 0.0)
            for name, phases in paths.items()
        }

    @property
    def paths(self) -> dict[str, tuple[Phase, ...]]:
        """What each model reads from its first token on: expert, or "model", -> phases."""
        trunk = self.schedule.phases
        return {n: (*trunk, *b.phases) for n, b in self.branches.items()} or {"model": trunk}

    def check(self, corpus: Corpus, other_corpus: bool = False) -> None:
        """Refuse a corpus on which the plan cannot be carried out.

        Args:
            corpus: What the final run is to read.
            other_corpus: Take one that is not the plan's, with the same domains.

        Raises:
            SpecError: The corpus is another one, lacks a domain, or holds so little of one that it
                would be read more often than the plan says.
        """
        if corpus.fingerprint != self.corpus and not other_corpus:
            raise SpecError(
                f"The plan is for corpus {self.corpus}, but {corpus.url} holds "
                f"{corpus.fingerprint}. Give the plan's corpus, or --other-corpus for one that has "
                "the same domains."
            )
        for name, phases in self.paths.items():
            path = Schedule(phases)
            corpus.check_mixture(path.average())
            for domain, tokens in path.domain_tokens(path.tokens).items():
                passes, planned = tokens / corpus.tokens[domain], self.epochs.get(domain, 0.0)
                if passes > 1.01 * max(1.0, planned):
                    raise SpecError(
                        f"Model {name!r} of the plan would pass {passes:.2f} times over domain "
                        f"{domain!r}, of which {corpus.url} holds {corpus.tokens[domain]:,}; "
                        f"the plan says {planned:.2f}. Give a corpus with more of it, or choose "
                        "again with fewer tokens."
                    )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data; shares are written beside the exact millionths."""
        shares = [dict(phase.mixture) for phase in self.schedule.phases]
        exact = {
            "schedule": self.schedule.to_json(),
            "branches": {name: branch.to_json() for name, branch in self.branches.items()},
        }
        return {
            "format": FORMAT,
            **json.loads(json.dumps({**asdict(self), **exact, "shares": shares})),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """Read what `to_json` wrote.

        Raises:
            SpecError: It is not a plan, or of another format.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise SpecError(f"Plan has format {found!r}; this rayx reads {FORMAT}.")
        fields = {k: v for k, v in data.items() if k not in ("format", "shares")}
        try:
            exact = {
                "schedule": Schedule.from_json(fields["schedule"]),
                "branches": {n: Schedule.from_json(b) for n, b in fields["branches"].items()},
            }
            return cls(**{**fields, **exact})
        except UNREADABLE as error:
            raise SpecError(f"Plan cannot be read: {error!r}.") from error


def provenance(store: Store, run_ids: Sequence[str]) -> dict[str, Any]:
    """Return where a plan's evidence is: store, runs (their hash and ids), version and time."""
    return {
        "store": store.url,
        "runs": hashlib.sha256(",".join(sorted(run_ids)).encode()).hexdigest()[:16],
        "run_ids": list(run_ids),
        "rayx": rayx.__version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
