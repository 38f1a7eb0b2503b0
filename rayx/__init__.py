"""rayx: decide what data a language model is trained on.

Text becomes a corpus of domains; many small proxies are trained over sampled mixtures on Ray; their
records are fitted; a mixture is chosen and written as a plan for the final run. See README.md.

Importing rayx loads neither torch, ray, lightgbm nor matplotlib: each stage loads what it needs.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "Mixture": "rayx.mixture",
    "Phase": "rayx.mixture",
    "Schedule": "rayx.mixture",
    "ModelShape": "rayx.spec",
    "Optimizer": "rayx.spec",
    "Evaluation": "rayx.spec",
    "TrainSpec": "rayx.spec",
    "Parent": "rayx.spec",
    "Distillation": "rayx.distillation",
    "Probe": "rayx.policy",
    "Experts": "rayx.merging",
    "MergeSpec": "rayx.merging",
    "Operator": "rayx.merging",
    "Record": "rayx.record",
    "Store": "rayx.store",
    "Corpus": "rayx.corpus",
    "RayxError": "rayx.errors",
}

__all__ = [*_EXPORTS, "fit", "open"]


def __getattr__(name: str) -> Any:
    if name == "open":
        return importlib.import_module("rayx.store").open_store
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name == "fit":
        return importlib.import_module("rayx.fit")
    raise AttributeError(f"module 'rayx' has no attribute {name!r}")
