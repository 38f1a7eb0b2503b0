"""The plan: a choice made executable; what the final run reads, and all it needs to read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

import rayx
from rayx.choose import Choice
from rayx.corpus import Corpus
from rayx.errors import SpecError
from rayx.mixture import Mixture, Schedule, epochs
from rayx.store import Store

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A schedule for the final run, with its evidence; needs neither store nor corpus to be read.

    Attributes:
        schedule: What to train on: phases of a mixture for a number of tokens.
        epochs: Domain -> passes over its tokens that the schedule takes.
        domain_tokens: Domain -> training tokens there are.
        caps: Domain -> largest share that was allowed; a domain left out had none.
        corpus: Fingerprint of the corpus.
        choice: The choice, with predicted losses, intervals, baselines and warnings.
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
            domain_tokens={d: corpus.tokens[d] for d in corpus.domains},
            caps=dict(caps),
            corpus=corpus.fingerprint,
            choice=json.loads(choice.to_json()),
            provenance={
                "store": store.url,
                "runs": hashlib.sha256(",".join(sorted(run_ids)).encode()).hexdigest()[:16],
                "run_ids": list(run_ids),
                "rayx": rayx.__version__,
                "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            },
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data; shares are written beside the exact millionths."""
        shares = [dict(phase.mixture) for phase in self.schedule.phases]
        data = {**asdict(self), "schedule": self.schedule.to_json(), "shares": shares}
        return {"format": FORMAT, **json.loads(json.dumps(data))}

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
            return cls(**{**fields, "schedule": Schedule.from_json(fields["schedule"])})
        except (KeyError, TypeError) as error:
            raise SpecError(f"Plan cannot be read: {error!r}.") from error
