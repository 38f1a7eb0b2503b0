"""Policies: the online rules, one file each; see rayx/policy.py for what a policy is."""

from __future__ import annotations

from typing import Any

from rayx.policies.agent import Agent
from rayx.policies.aioli import Aioli
from rayx.policies.dga import DGA
from rayx.policies.doge import DoGE
from rayx.policies.doremi import DoReMi
from rayx.policies.rb import RB
from rayx.policies.scalarised import Scalarised
from rayx.policies.skill_it import SkillIt
from rayx.policies.tikmix import InfluenceSurvey, TiKMiXD

POLICIES: dict[str, Any] = {
    "agent": Agent,
    "aioli": Aioli,
    "dga": DGA,
    "doge": DoGE,
    "doremi": DoReMi,
    "influence-survey": InfluenceSurvey,
    "rb": RB,
    "scalarised": Scalarised,
    "skill-it": SkillIt,
    "tikmix-d": TiKMiXD,
}
