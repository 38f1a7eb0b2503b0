"""Planted sweeps of trained and merged candidates: the factor between the two is known."""

from __future__ import annotations

import numpy as np
import pandas as pd

from rayx.merging import Experts, MergeSpec
from rayx.mixture import Mixture
from rayx.record import CurvePoint, Loss, Record
from rayx.store import Store
from rayx.synthetic import World

SHIFT, SLOPE = 0.05, 0.8
TOKENS = 400_000


def merged_log_loss(
    log_loss_RT: np.ndarray, mode: str, rng: np.random.Generator, noise: float = 0.002
) -> np.ndarray:
    """Log losses of merged candidates whose trained runs have log_loss_RT without noise.

    "good": log L_train = z0 + SHIFT + SLOPE (log L_merge - z0); "noise": nothing of the mixture;
    "against": what trains well merges badly.
    """
    centre_T, sd_T = log_loss_RT.mean(0), log_loss_RT.std(0)
    draw_RT = rng.standard_normal(log_loss_RT.shape)
    apart_RT = log_loss_RT - centre_T
    merged_RT = {
        "good": (apart_RT - SHIFT) / SLOPE,
        "noise": sd_T * draw_RT,
        "against": -apart_RT,
    }[mode]
    return centre_T + merged_RT + noise * draw_RT


def both_kinds(
    trained: int,
    merged: int,
    pairs: int = 0,
    mode: str = "good",
    seed: int = 0,
    num_targets: int = 1,
    run_noise: float = 0.004,
) -> tuple[pd.DataFrame, World]:
    """Rows as `store.runs()` has them, and the world that says the truth.

    Args:
        trained: Rows of kind "train".
        merged: Rows of kind "merge".
        pairs: Mixtures that are in both kinds.
        mode: As for `merged_log_loss`.
        seed: Of the world and of all that is drawn.
        num_targets: Targets of the world; it has 4 domains.
        run_noise: Standard deviation of a trained run's log loss.
    """
    rng = np.random.default_rng(seed)
    world = World.random(4, num_targets, seed=seed, noise_sd=0.0)
    trained_RK, merged_RK = (rng.dirichlet(np.ones(4), n) for n in (trained, merged))
    merged_RK[:pairs] = trained_RK[:pairs]
    log_trained, log_merged = (
        np.log(world.loss(weights_RK, 1e6, 1e6)) for weights_RK in (trained_RK, merged_RK)
    )
    log_trained = log_trained + run_noise * rng.standard_normal(log_trained.shape)
    if merged:
        log_merged = merged_log_loss(log_merged, mode, rng)
    frame = pd.DataFrame(
        {
            "run_id": [f"t{i:03}" for i in range(trained)] + [f"u{i:03}" for i in range(merged)],
            "kind": ["train"] * trained + ["merge"] * merged,
            "status": "ok",
            "corpus": "c",
            "params": 1,
            "tokens": 1,
            "trunk_tokens": 0,
        }
    )
    weights_RK = np.concatenate([trained_RK, merged_RK])
    losses_RT = np.exp(np.concatenate([log_trained, log_merged]))
    for k, domain in enumerate(world.domains):
        frame[f"weight/{domain}"] = weights_RK[:, k]
    for t, target in enumerate(world.targets):
        frame[f"loss/{target}"] = losses_RT[:, t]
    return frame, world


def fill_both(
    world: World, store: Store, trained: int, merged: int, pairs: int = 0, mode: str = "good"
) -> tuple[list, list[MergeSpec]]:
    """Fill a store with experts, runs and merged candidates; return (trained, merged) specs."""
    rng = np.random.default_rng(0)
    domains = world.domains
    experts = [world.spec({domain: 1}, TOKENS) for domain in domains]
    mixtures = [
        Mixture.from_array(weights_K, domains)
        for weights_K in rng.dirichlet(np.ones(len(domains)), trained + merged - pairs)
    ]
    runs = [world.spec(mixture, TOKENS) for mixture in mixtures[:trained]]
    set_of = Experts.of(experts)
    specs = [set_of.merge(set_of.weights_for(mixture)) for mixture in mixtures[trained - pairs :]]
    world.fill(store, [*experts, *runs])
    weights_RK = np.stack([spec.mixture.to_array(domains) for spec in specs])
    log_loss_RT = np.log(world.loss(weights_RK, experts[0].model.params, experts[0].tokens))
    losses_RT = np.exp(merged_log_loss(log_loss_RT, mode, rng))
    for spec, loss_T in zip(specs, losses_RT, strict=True):
        losses = {t: Loss(2.8 * x, x, 0.004) for t, x in zip(world.targets, loss_T, strict=True)}
        store.put(merged_record(spec, losses))
    return runs, specs


def merged_record(spec: MergeSpec, losses: dict[str, Loss]) -> Record:
    """What evaluating a merged candidate leaves."""
    return Record(
        spec=spec,
        curve=(CurvePoint(0, 0, losses),),
        epochs={},
        tokens=0,
        flops=1e9,
        seconds=0.01,
        pack_id="merges",
        pack_runs=8,
        device="synthetic",
        versions={"numpy": np.__version__},
        commit="",
        started="2000-01-01T00:00:00Z",
        finished="2000-01-01T00:00:00Z",
    )
