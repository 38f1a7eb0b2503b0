"""Report: one self-contained HTML page about a store: choice, proof, evidence, cost, failures.

The page opens offline: style and figures (SVG) are inside it, there is no script, and nothing is
fetched. It follows the reader's light or dark setting and fits a phone. Sections whose evidence is
missing say so. The same inputs give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayx.choose import Choice
from rayx.fit.fitted import FittedTable
from rayx.store import Store


def render(
    store: Store,
    fitted: FittedTable | None = None,
    choice: Choice | None = None,
    verification: Mapping[str, Any] | None = None,
    plan: Mapping[str, Any] | None = None,
    title: str = "rayx report",
    caps: Mapping[str, float] | None = None,
) -> str:
    """Return the page as HTML text.

    Args:
        store: Its runs, curves and failures are shown.
        fitted: The regression, None if there is none yet.
        choice: The mixture chosen, None if there is none yet.
        verification: What `rayx.verify.compare` returned.
        plan: What `Plan.to_json` returned; gives supply, epochs and the order of the domains.
        title: Name of the page.
        caps: Domain -> largest share allowed, where the choice was capped.
    """
    from rayx.report.evidence import Evidence  # here: importing rayx.report loads no matplotlib
    from rayx.report.sections import page

    evidence = Evidence(
        store=store,
        fitted=fitted,
        choice=choice,
        verification=verification,
        plan=plan,
        caps=dict(caps or {}),
    )
    return page(evidence, title)
