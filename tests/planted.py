"""Planted laws: losses of runs under known parameters, for laws to find them again."""

import numpy as np

from rayx.fit.laws import Law


def planted_loss(law: type[Law], truth: dict, *columns: np.ndarray) -> np.ndarray:
    """Losses of a law with the parameters `truth`; a domain's are given as a list."""
    theta = {
        name: np.array(value, float)[None, None] if np.ndim(value) else np.array([[float(value)]])
        for name, value in truth.items()
    }
    return law().loss(theta, dict(zip(law.inputs, columns, strict=True)))[0][0]


def with_noise(loss_R: np.ndarray, noise: float, seed: int) -> np.ndarray:
    """Losses with lognormal noise of relative size `noise`."""
    return loss_R * np.exp(np.random.default_rng(seed).normal(0.0, noise, len(loss_R)))
