"""Selection inside a domain: `web@0.3` is the best-scored 30% of web's training text.

A mixture may give weight to a selection as to a domain, so the share is a parameter of the mixture
like its weights: in its run_id, in tables and plans, and open to search.
"""

from __future__ import annotations

SIGN = "@"


def parse_selection(name: str) -> tuple[str, float] | None:
    """Return domain and share, in (0, 1), of a selection; None if the name is none.

    >>> parse_selection("web@0.3")
    ('web', 0.3)
    >>> parse_selection("web@large") is None
    True
    """
    domain, sign, share = name.rpartition(SIGN)
    try:
        value = float(share)
    except ValueError:
        return None
    # one spelling a share, so that equal mixtures are equal
    return (domain, value) if sign and domain and 0 < value < 1 and f"{value:g}" == share else None
