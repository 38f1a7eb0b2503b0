"""RegMix: many small proxies over sampled mixtures, a regression, the best of many simulated.

Source: Liu et al. 2024, arXiv:2407.01492 (algorithm of section 3, released code).
Differs: candidates keep to the final run's token supply (a cap a domain) instead of 15 times the
    prior alone; the regressor is chosen by cross-validation (`auto`) among LightGBM and others and
    never sees the test rows; proxies share initialisation and data order (common random numbers);
    uniform and proportional are among the proxies; the choice is verified by training it and what
    it must beat at a larger scale.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from rayx.candidates import proportional_mixture, regmix_mixtures, uniform_mixture
from rayx.caps import supply_caps
from rayx.choice.choosers import Chooser
from rayx.choose import Choice, Constraints, choose
from rayx.corpus import Corpus
from rayx.experiment import Conclusion
from rayx.fit import FittedTable, Table, fit_once
from rayx.mixture import Mixture, Schedule
from rayx.plan import Plan
from rayx.propose import next_mixtures
from rayx.report import render
from rayx.spec import TrainSpec
from rayx.store import Store
from rayx.verify import CHOICE, compare, verification_specs

log = logging.getLogger(__name__)

Sweep = Callable[[Sequence[TrainSpec]], None]


@dataclass(frozen=True, kw_only=True)
class RegMix:
    """RegMix on one corpus.

    Attributes:
        corpus: Where the text is.
        domains: What to mix, selections such as `web@0.3` among it; () for all domains.
        proxy: Template of the proxies; its mixture and seeds are replaced.
        num_proxies: Proxies in all, uniform and proportional included, >= 8.
        rounds: Rounds that they are trained in, of about equal size; from the second on, mixtures
            are proposed on the regressors of the rounds before.
        acquisition: How they are proposed, see `rayx.propose.next_mixtures`.
        objective: Target -> weight of its loss (bits per byte), > 0.
        budget_tokens: Tokens of the final run that the choice is for; sets the caps.
        max_epochs: How often the final run may read a token.
        seed: Draws the candidates and is the proxies' seed.
        regressor: `auto` or a regressor's name.
        chooser: How the choice is found among the models' predictions; None for `choose`'s own.
        verification: Template of the verification runs, larger than the proxies, or None.
        verification_seeds: Seeds of each arm of the verification.
    """

    corpus: Corpus
    domains: tuple[str, ...] = ()
    proxy: TrainSpec
    num_proxies: int
    rounds: int = 1
    acquisition: str = "thompson"
    objective: Mapping[str, float]
    budget_tokens: int
    max_epochs: float = 4.0
    seed: int = 0
    regressor: str = "auto"
    chooser: Chooser | None = None
    verification: TrainSpec | None = None
    verification_seeds: int = 3

    @property
    def supply(self) -> dict[str, int]:
        """Tokens of what there is to mix."""
        return {name: self.corpus.tokens[name] for name in self.domains or self.corpus.domains}

    @property
    def caps(self) -> dict[str, float]:
        """Domain -> largest share that the supply allows in the final run."""
        return supply_caps(self.supply, self.budget_tokens, self.max_epochs)

    def baselines(self) -> dict[str, Mixture]:
        """Return what a choice must beat without any sweep, within the caps."""
        return {
            "uniform": uniform_mixture(tuple(self.supply), self.caps),
            "proportional": proportional_mixture(self.supply, self.caps),
        }

    def specs(self) -> list[TrainSpec]:
        """Return the proxies of the first round."""
        return self._proxies(self._first(self._sizes()[0]))

    def proposed(self, store: Store) -> list[TrainSpec]:
        """Return the proxies of all rounds up to the first that is not all on record.

        A function of the records and the seed: an interrupted sweep proposes the same again.
        """
        specs = self.specs()
        for number, size in enumerate(self._sizes()[1:], start=1):
            ended = store.status()
            if not all(spec.run_id in ended for spec in specs):
                break
            fitted = self._fit(store, specs)
            mixtures = next_mixtures(
                fitted,
                self.objective,
                {d: self.supply[d] for d in fitted.table.domains},
                self._constraints(fitted.table.domains),
                num=size,
                seed=1_000 * number + self.seed,
                acquisition=self.acquisition,
            )
            specs += self._proxies(mixtures, before=len(specs))
        return specs

    def _first(self, num: int) -> list[Mixture]:
        """The first round: the baselines, then RegMix's candidates."""
        mixtures = list(self.baselines().values())
        rest = num - len(mixtures)
        return mixtures + regmix_mixtures(self.supply, rest, seed=self.seed, caps=self.caps)

    def _sizes(self) -> list[int]:
        """Proxies of each round."""
        ends = [round(self.num_proxies * (i + 1) / self.rounds) for i in range(self.rounds)]
        return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def _proxies(self, mixtures: Sequence[Mixture], before: int = 0) -> list[TrainSpec]:
        """The specs of a round's mixtures; `before` proxies were in the rounds before it."""
        return [
            dataclasses.replace(
                self.proxy,
                schedule=Schedule.constant(mixture, self.proxy.schedule.tokens),
                seed=self.seed,
                data_seed=self.seed,
            )
            for mixture in mixtures
        ]

    def _fit(self, store: Store, specs: Sequence[TrainSpec]) -> FittedTable:
        wanted = {spec.run_id for spec in specs}
        runs = store.runs()
        table = Table.from_frame(runs.loc[runs["run_id"].isin(wanted)])
        return fit_once(table, self.regressor, self.seed)

    def _constraints(self, domains: Sequence[str]) -> Constraints:
        caps = {d: cap for d, cap in self.caps.items() if d in domains}
        return Constraints.by_name(tuple(domains), caps=caps)

    def decide(self, store: Store) -> tuple[FittedTable, Choice]:
        """Fit the proxies' records and choose."""
        fitted = self._fit(store, self.proposed(store))
        domains = fitted.table.domains
        prior = {d: self.supply[d] for d in domains}
        choice = choose(
            fitted,
            self.objective,
            prior,
            self._constraints(domains),
            seed=self.seed,
            method=self.chooser,
        )
        return fitted, choice

    def arms(self, choice: Choice) -> dict[str, Mixture]:
        """Return the arms of the verification; random search is the best proxy that was seen."""
        return {
            CHOICE: Mixture(choice.weights),
            **self.baselines(),
            "best_random": Mixture(choice.baselines["best_seen"].weights),
        }

    def follow_up(self, arms: Mapping[str, Mixture]) -> dict[str, list[TrainSpec]]:
        """Return arm -> verification runs; none without a verification template."""
        if self.verification is None:
            return {}
        first = 1_000 * (self.seed + 1)  # seeds that no proxy has used
        seeds = range(first, first + self.verification_seeds)
        return verification_specs(self.verification, arms, list(seeds))

    def follow_up_cost(self, others: Collection[str] = ()) -> list[TrainSpec]:
        """Return as many runs, as costly, as the verification of any choice will take."""
        arms = [CHOICE, *self.baselines(), "best_random", *others]
        uniform = Mixture.uniform(tuple(self.supply))
        runs = self.follow_up(dict.fromkeys(arms, uniform))
        return [spec for specs in runs.values() for spec in specs]

    def conclude(
        self,
        store: Store,
        sweep: Sweep,
        name: str = "regmix",
        others: Mapping[str, Mixture] | None = None,
    ) -> Conclusion:
        """Decide, verify and write what was decided into the store.

        Writes choices/NAME.json, plans/NAME.json, verifications/NAME.json and reports/NAME.html.

        Args:
            store: Holds the records of the proxies.
            sweep: Trains the verification.
            name: Of the files.
            others: Further arms of the verification -> mixture.
        """
        fitted, choice = self.decide(store)
        store.write_bytes(f"choices/{name}.json", choice.to_json().encode())
        plan = Plan.of(
            choice, self.corpus, self.budget_tokens, self.caps, store, fitted.table.run_ids
        )
        verification = None
        if self.verification is not None:
            arms = self.follow_up(self.arms(choice) | dict(others or {}))
            sweep([spec for specs in arms.values() for spec in specs])
            verification = compare(store, arms, choice.objective)
            plan = dataclasses.replace(plan, verdict=verification["verdict"])
            store.write_json(f"verifications/{name}.json", verification)
        store.write_json(f"plans/{name}.json", plan.to_json())
        page = render(
            store, fitted, choice, verification, plan.to_json(), f"rayx: {name}", self.caps
        )
        store.write_bytes(f"reports/{name}.html", page.encode())
        return Conclusion(
            choice=choice,
            plan=plan,
            verification=verification,
            files={
                "plan": f"{store.url}/plans/{name}.json",
                "report": f"{store.url}/reports/{name}.html",
            },
        )
