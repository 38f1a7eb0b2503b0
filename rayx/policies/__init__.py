"""Policies: the online rules, one file each; see rayx/policy.py for what a policy is."""

from __future__ import annotations

from typing import Any

from rayx.policies.dga import DGA
from rayx.policies.scalarised import Scalarised
from rayx.policies.tikmix import InfluenceSurvey, TiKMiXD

POLICIES: dict[str, Any] = {
    "dga": DGA,
    "influence-survey": InfluenceSurvey,
    "scalarised": Scalarised,
    "tikmix-d": TiKMiXD,
}
