"""An analytic world with a known optimum: the whole pipeline in seconds, and the tests' oracle.

The loss of target t after training N parameters on D tokens of mixture w is, in bits per byte,

    L_t(w, N, D) = E_t + 1 / sum_k C_tk (w_k + eps)^gamma_tk + A / N^alpha + B / D^beta

With gamma in (0, 1] the sum is concave in w, so L is convex and its optimum can be certified. A
world makes records of the same kind as a sweep does, noise included, without torch or Ray.
Limits: repetition costs nothing, and the optimum does not move with N or D.

Shapes: R runs, K domains, T targets.

Source: Shukor et al. 2025, arXiv:2507.09404, additive law.
Differs: eps keeps the loss of an absent domain finite.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from rayx.errors import ChoiceError, SpecError, did_you_mean
from rayx.mixture import Mixture, Schedule, epochs
from rayx.record import CurvePoint, Failure, Loss, Record
from rayx.spec import Evaluation, ModelShape, Optimizer, TrainSpec
from rayx.store import Store

NAMES = ("web", "code", "math", "books", "papers", "forum", "wiki", "news", "law", "patents")
BYTES_PER_TOKEN = 4.0  # only to write nats beside bits per byte
FLOPS_PER_SECOND = 1e12  # of the pretended device
OPTIMUM_TOLERANCE_BPB = 1e-5  # largest duality gap that is accepted as an optimum
MODEL = ModelShape(layers=2, width=64, heads=2, ffn_width=160, vocab_size=1024, context=64)
OPTIMIZER = Optimizer(lr=3e-3, batch_sequences=16)


@dataclass(frozen=True, kw_only=True, eq=False)
class World:
    """Parameters of the law, the noise of a run and the supply of each domain.

    `eq=False`: worlds are compared by `fingerprint`, as corpora are.
    """

    domains: tuple[str, ...]
    targets: tuple[str, ...]
    floor: np.ndarray  # E, shape (T,), bpb
    gain: np.ndarray  # C, shape (T, K), > 0
    power: np.ndarray  # gamma, shape (T, K), in (0, 1]
    supply: Mapping[str, int]  # domain -> tokens
    params_scale: float = 12.0  # A
    params_power: float = 0.3  # alpha
    tokens_scale: float = 25.0  # B
    tokens_power: float = 0.3  # beta
    eps: float = 1e-3
    noise_sd: float = 0.004  # bpb, of a run's loss on each target
    failing_share: float = 0.0  # of the runs, chosen by their run_id

    def __post_init__(self) -> None:
        shape = (len(self.targets), len(self.domains))
        for name in ("gain", "power"):
            values = np.asarray(getattr(self, name))
            if values.shape != shape or not (values > 0).all():
                raise SpecError(f"World.{name} has shape {values.shape}; expected {shape}, > 0.")
        if np.max(self.power) > 1:
            raise SpecError("World.power exceeds 1; the optimum would not be known.")
        if set(self.supply) != set(self.domains):
            raise SpecError(f"World.supply has {sorted(self.supply)}; expected {self.domains}.")

    @classmethod
    def random(
        cls,
        num_domains: int = 5,
        num_targets: int = 3,
        seed: int = 0,
        *,
        noise_sd: float = 0.004,
        failing_share: float = 0.0,
    ) -> World:
        """Draw a world in which each target has a domain of its own and borrows from the others.

        Args:
            num_domains: K >= 2.
            num_targets: T >= 1; target t is the held-out text of domain t, further ones are tasks.
            seed: Seed of the draw.
            noise_sd: Noise of a run's loss, bpb.
            failing_share: Share of runs that give a failure record.
        """
        if num_domains < 2 or num_targets < 1:
            raise SpecError(f"World of {num_domains} domains, {num_targets} targets; give 2 and 1.")
        rng = np.random.default_rng(seed)
        domains = tuple(
            (*NAMES, *(f"domain{k}" for k in range(len(NAMES), num_domains)))[:num_domains]
        )
        tasks = (f"task{t}" for t in range(num_domains, num_targets))
        targets = (*domains, *tasks)[:num_targets]
        gain_TK = rng.lognormal(0.0, 0.8, (num_targets, num_domains)) * 2.0 / num_domains
        own = np.arange(num_targets) % num_domains
        gain_TK[np.arange(num_targets), own] += rng.uniform(2.0, 3.5, num_targets)
        return cls(
            domains=domains,
            targets=targets,
            floor=rng.uniform(0.3, 0.6, num_targets),
            gain=gain_TK,
            power=rng.uniform(0.2, 0.7, (num_targets, num_domains)),
            supply={d: int(10 ** rng.uniform(5, 7)) for d in domains},
            noise_sd=noise_sd,
            failing_share=failing_share,
        )

    @property
    def fingerprint(self) -> str:
        """First 12 hex digits of a hash of everything that decides a loss."""
        arrays = (self.floor, self.gain, self.power)
        rest = (self.domains, self.targets, sorted(self.supply.items()), self.params_scale)
        rest += (self.params_power, self.tokens_scale, self.tokens_power, self.eps, self.noise_sd)
        text = repr((rest, [np.asarray(a, dtype=float).tolist() for a in arrays]))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def spec(
        self, mixture: Mapping[str, float], tokens: int, seed: int = 0, points: int = 4
    ) -> TrainSpec:
        """Return the spec of a small run in this world; replicates differ in `seed`."""
        return TrainSpec(
            corpus=self.fingerprint,
            model=MODEL,
            schedule=Schedule.constant(Mixture(mixture), tokens),
            optimizer=OPTIMIZER,
            seed=seed,
            data_seed=seed,
            evaluation=Evaluation(points=points),
        )

    def loss(self, weights_RK: np.ndarray, params: float, tokens: float) -> np.ndarray:
        """Return the noise-free loss of mixtures.

        Args:
            weights_RK: Shares, shape (R, K), in the order of `domains`.
            params: Parameters N.
            tokens: Training tokens D.

        Returns:
            Bits per byte, shape (R, T).
        """
        powers_RTK = (np.asarray(weights_RK)[:, None, :] + self.eps) ** self.power
        scale = self.params_scale / params**self.params_power
        scale += self.tokens_scale / tokens**self.tokens_power
        return self.floor + 1.0 / (self.gain * powers_RTK).sum(axis=2) + scale

    def record(self, spec: TrainSpec) -> Record:
        """Return what the run of `spec` leaves: the law along the run plus the run's noise.

        The noise depends on nothing but the spec; a share `failing_share` of all specs fails.

        Raises:
            SpecError: The spec is of another corpus, or names a domain that this world lacks.
        """
        if spec.corpus != self.fingerprint:
            raise SpecError(
                f"Spec is of corpus {spec.corpus!r}; this world is {self.fingerprint!r}."
            )
        mixture = spec.schedule.average()
        weights_1K = mixture.to_array(self.domains)[None]
        rng = np.random.default_rng(int(spec.run_id, 16))
        failed = rng.random() < self.failing_share
        noise_T = self.noise_sd * rng.standard_normal(len(self.targets))
        points = []
        for index in range(spec.evaluation.points):
            step = round(spec.steps * (index + 1) / spec.evaluation.points)
            tokens = step * spec.batch_tokens
            loss_T = self.loss(weights_1K, spec.model.params, tokens)[0] + noise_T
            losses = {
                target: Loss(
                    nats=float(bpb) * math.log(2.0) * BYTES_PER_TOKEN,
                    bpb=float(bpb),
                    stderr_bpb=self.noise_sd,
                )
                for target, bpb in zip(self.targets, loss_T, strict=True)
            }
            points.append(CurvePoint(step, tokens, losses))
        failure = Failure(type="Diverged", message=f"Loss is not finite at step {points[0].step}.")
        passes = epochs(mixture, spec.tokens, self.supply)
        return Record(
            spec=spec,
            curve=() if failed else tuple(points),
            epochs={d: passes.get(d, 0.0) for d in self.domains},
            tokens=spec.tokens,
            flops=spec.flops,
            seconds=spec.flops / FLOPS_PER_SECOND,
            pack_id=f"synthetic-{self.fingerprint}",
            pack_runs=1,
            device="synthetic",
            versions={"numpy": np.__version__},
            commit="",
            started="2000-01-01T00:00:00Z",  # nothing was run: a fixed time keeps records equal
            finished="2000-01-01T00:00:00Z",
            failure=failure if failed else None,
        )

    def fill(self, store: Store, specs: Iterable[TrainSpec]) -> int:
        """Write the record of each spec to the store and return how many."""
        records = [self.record(spec) for spec in specs]
        for record in records:
            store.put(record)
        return len(records)

    def optimum(
        self, objective: Mapping[str, float], caps: Mapping[str, float] | None = None
    ) -> Mixture:
        """Return the best mixture: min over w of sum_t objective_t L_t(w), 0 <= w_k <= cap_k.

        SLSQP from several starts; the duality gap of the convex problem certifies the result.

        Args:
            objective: Target -> weight, >= 0, not all zero.
            caps: Domain -> largest share; a domain left out may take all.

        Raises:
            ChoiceError: A name is unknown, the caps add up to less than 1, or no start passes.
        """
        for name in (*objective, *(caps or {})):
            known = self.targets if name in objective else self.domains
            if name not in known:
                raise ChoiceError(f"No {name!r} in this world.{did_you_mean(name, known)}")
        cap_K = np.array([min(1.0, (caps or {}).get(d, 1.0)) for d in self.domains])
        weight_T = np.array([objective.get(t, 0.0) for t in self.targets])
        if cap_K.sum() < 1.0 or cap_K.min() < 0 or weight_T.min() < 0 or weight_T.sum() <= 0:
            raise ChoiceError(f"Caps {caps} or objective {objective} leave nothing to choose.")

        def value(w_K: np.ndarray) -> tuple[float, np.ndarray]:
            shifted_K = np.maximum(w_K, 0.0) + self.eps
            terms_TK = self.gain * shifted_K**self.power
            sum_T = terms_TK.sum(axis=1)
            slope_K = -(weight_T / sum_T**2) @ (self.power * terms_TK / shifted_K)
            return float(weight_T @ (1.0 / sum_T)), slope_K

        def gap(w_K: np.ndarray) -> float:
            """Largest decrease that convexity still allows: slope @ (w - best vertex)."""
            slope_K = value(w_K)[1]
            left, vertex_K = 1.0, np.zeros(len(w_K))
            for k in np.argsort(slope_K):
                vertex_K[k] = min(left, cap_K[k])
                left -= vertex_K[k]
            return float(slope_K @ (w_K - vertex_K))

        rng = np.random.default_rng(0)
        starts = [cap_K / cap_K.sum()]
        starts += [cap_K * u / (cap_K @ u) for u in rng.dirichlet(np.ones(len(cap_K)), 7)]
        best = None
        for start in starts:
            result = minimize(
                value,
                np.minimum(start, cap_K),
                jac=True,
                method="SLSQP",
                bounds=[(0.0, c) for c in cap_K],
                constraints={
                    "type": "eq",
                    "fun": lambda w: w.sum() - 1.0,
                    "jac": lambda w: np.ones_like(w),
                },
                options={"ftol": 1e-12, "maxiter": 500},
            )
            if best is None or gap(result.x) < gap(best):
                best = result.x
        assert best is not None
        if not gap(best) <= OPTIMUM_TOLERANCE_BPB * weight_T.sum() or abs(best.sum() - 1) > 1e-6:
            raise ChoiceError(f"The optimum was not found: duality gap {gap(best):g} bpb.")
        return Mixture.from_array(np.clip(best, 0.0, cap_K), self.domains)
