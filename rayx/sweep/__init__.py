"""The sweep: packs of runs as Ray Tune trials, each trained through Ray Train."""

from rayx.sweep.estimate import Estimate, estimate
from rayx.sweep.run import Placement, drop_checkpoints, run_sweep

__all__ = ["Estimate", "Placement", "drop_checkpoints", "estimate", "run_sweep"]
