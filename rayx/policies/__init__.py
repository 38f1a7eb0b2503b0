"""Policies: the online rules, one file each; see rayx/policy.py for what a policy is."""

from __future__ import annotations

from typing import Any

from rayx.policies.dga import DGA

POLICIES: dict[str, Any] = {"dga": DGA}
