"""What every exported format is made of: the stages of one model, and what its trainer is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a plan does not know of the trainer that carries it out.

    Attributes:
        paths: Domain -> where the other trainer finds it; `data/DOMAIN` where left out.
        batch_tokens: Tokens of an optimizer step.
        context: Tokens of a sequence.
        seed: Of the other trainer's data order.
    """

    paths: Mapping[str, str] = field(default_factory=dict)
    batch_tokens: int | None = None
    context: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Stage:
    """One mixture of a model's way."""

    number: int  # from 1
    shares: dict[str, float]  # path -> share
    start_tokens: int
    tokens: int
    epochs: dict[str, float]  # path -> passes of this stage over it

    def rows(self, setting: Setting) -> int:
        """Sequences of the stage."""
        assert setting.context is not None, "export_plan asks for it"
        return round(self.tokens / setting.context)

    def steps(self, batch_tokens: int) -> tuple[int, int]:
        """Return the stage's first and last optimizer step, counted from 1."""
        end = self.start_tokens + self.tokens
        return round(self.start_tokens / batch_tokens) + 1, round(end / batch_tokens)


def yaml_text(value: Any, indent: str = "") -> str:
    """Return plain data as YAML; 1e-06 is a string to YAML 1.1, so floats have no exponent."""
    if isinstance(value, Mapping):
        lines = []
        for key, entry in value.items():
            nested = isinstance(entry, (Mapping, list)) and entry
            text = (
                "\n" + yaml_text(entry, indent + "  ") if nested else " " + yaml_text(entry) + "\n"
            )
            lines.append(f"{indent}{key}:{text}")
        return "".join(lines)
    if isinstance(value, list):
        lines = []
        for entry in value:
            text = yaml_text(entry, indent + "  ")
            lines.append(f"{indent}- {text.lstrip() if isinstance(entry, Mapping) else text}")
            lines[-1] = lines[-1].rstrip("\n") + "\n"
        return "".join(lines)
    if isinstance(value, str):
        plain = (c if " " <= c <= "~" and c not in '"\\' else f"\\U{ord(c):08x}" for c in value)
        return f'"{"".join(plain)}"'
    return f"{value:.6f}" if isinstance(value, float) else json.dumps(value)
