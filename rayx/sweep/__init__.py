"""The sweep: packs of runs as Ray Tune trials, each trained through Ray Train."""

from rayx.sweep.run import Estimate, Placement, estimate, run_sweep

__all__ = ["Estimate", "Placement", "estimate", "run_sweep"]
