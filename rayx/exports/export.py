"""From a plan to the files of a format, and the manifest beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import rayx
from rayx.errors import SpecError, did_you_mean
from rayx.exports.formats import FORMATS, Files
from rayx.exports.stages import Setting, Stage
from rayx.plan import Plan


def export_plan(plan: Plan, to: str, setting: Setting | None = None) -> Files:
    """Return file name -> text of a plan in another trainer's format, `manifest.json` among them.

    Raises:
        SpecError: An unknown format, a path for a domain that the plan does not have or that the
            format cannot hold, a missing size, or a stage shorter than a step.
    """
    setting = setting or Setting()
    if to not in FORMATS:
        hint = did_you_mean(to, FORMATS)
        raise SpecError(f"Format {to!r} is unknown; rayx writes {', '.join(FORMATS)}.{hint}")
    writer, needs = FORMATS[to]
    for name in needs:
        if getattr(setting, name) is None:
            raise SpecError(f"Format {to!r} counts in it: give --{name.replace('_', '-')}.")
    domains = sorted({d for phases in plan.paths.values() for p in phases for d in p.mixture})
    for domain in setting.paths:
        if domain not in domains:
            raise SpecError(
                f"--paths names {domain!r}, which the plan does not train on "
                f"({', '.join(domains)}).{did_you_mean(domain, domains)}"
            )
    where = {domain: setting.paths.get(domain, f"data/{domain}") for domain in domains}
    if len(set(where.values())) < len(where):
        raise SpecError(f"Two domains have one path in {where}; give each its own with --paths.")
    files: Files = {}
    manifest: dict[str, Any] = {
        "rayx": rayx.__version__, "format": to, "corpus": plan.corpus, "paths": where,
        "branch_after_tokens": plan.schedule.tokens if plan.branches else None,
        "decay_share": plan.decay_share, "models": {},
    }  # fmt: skip
    for number, model in enumerate(plan.paths, start=1):
        stages = _stages(plan, model, where)
        if setting.batch_tokens is not None:
            for stage in stages:
                if stage.tokens < setting.batch_tokens:
                    raise SpecError(
                        f"Stage {stage.number} of model {model!r} has {stage.tokens:,} tokens, "
                        f"less than a step of {setting.batch_tokens:,}. Give a smaller "
                        "--batch-tokens."
                    )
        # A domain's name may hold what a file's may not.
        safe = re.sub(r"[^\w-]", "_", model)
        stem = safe if len(plan.paths) == 1 else f"{number}-{safe}"
        written = writer(stem, stages, setting)
        files |= written
        manifest["models"][model] = {
            "files": list(written),
            "stages": [_entry(stage, setting) for stage in stages],
        }
    return {**files, "manifest.json": json.dumps(manifest, indent=2) + "\n"}


def _stages(plan: Plan, model: str, where: Mapping[str, str]) -> list[Stage]:
    stages, start = [], 0
    for number, phase in enumerate(plan.paths[model], start=1):
        shares = {where[d]: share for d, share in phase.mixture.items()}
        passes = {
            where[d]: share * phase.tokens / plan.domain_tokens[d]
            for d, share in phase.mixture.items()
            if d in plan.domain_tokens
        }
        stages.append(Stage(number, shares, start, phase.tokens, passes))
        start += phase.tokens
    return stages


def _entry(stage: Stage, setting: Setting) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "shares": stage.shares, "start_tokens": stage.start_tokens, "tokens": stage.tokens,
        "epochs": stage.epochs,
    }  # fmt: skip
    if setting.batch_tokens is not None:
        first, end = stage.steps(setting.batch_tokens)
        entry |= {"first_step": first, "steps": end - first + 1}
    return entry
