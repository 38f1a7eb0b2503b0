"""Policies: the online rules, one file each; see rayx/policy.py for what a policy is."""

from __future__ import annotations

from typing import Any

POLICIES: dict[str, Any] = {}
