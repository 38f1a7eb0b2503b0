"""The sweep: packs of runs as Ray Tune trials, each trained through Ray Train."""

from rayx.sweep.estimate import Estimate, estimate
from rayx.sweep.run import Placement, run_sweep

__all__ = ["Estimate", "Placement", "estimate", "run_sweep"]
