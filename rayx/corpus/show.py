"""Stage 1, corpus: what a corpus holds, as a table."""

from __future__ import annotations

from typing import Any

import pandas as pd

from rayx.corpus.corpus import Corpus
from rayx.corpus.precision import heldout_error_bpb


def describe(corpus: Corpus) -> pd.DataFrame:
    """Return one row per target, in the order of `corpus.targets`.

    Returns:
        Index `domain`; columns documents, tokens, bytes and share (of train tokens; 0 for an
        evaluation-only target), bytes_per_token (fertility), heldout_documents, heldout_tokens,
        heldout_bytes, heldout_error_bpb (see `heldout_error_bpb`), duplicates (documents removed),
        near_duplicates (documents removed), contaminated (train documents that share n-grams with
        held-out text), heldout_shared (share of the held-out n-grams that train text holds too;
        the three nan if not asked for), skipped (documents), reasons, fingerprint. Rows that named
        no domain are under `(no domain)`.
    """
    by_name = {d["name"]: d for d in corpus.manifest["domains"]}
    shares = corpus.proportional()
    none = {"documents": 0, "tokens": 0, "bytes": 0}
    rows = []
    for name in corpus.targets:
        domain = by_name[name]
        train, heldout = domain.get("train", none), domain["heldout"]
        rows.append({"domain": name, **{k: train[k] for k in none}, "share": shares.get(name, 0.0),
                     "bytes_per_token": corpus.bytes_per_token(name),
                     **{f"heldout_{k}": heldout[k] for k in none},
                     "heldout_error_bpb": heldout_error_bpb(corpus, name),
                     "duplicates": domain["duplicates"], **_cleaned(domain),
                     "skipped": sum(domain["skipped"].values()),
                     "reasons": _reasons(domain["skipped"]),
                     "fingerprint": domain["fingerprint"]})  # fmt: skip
    homeless = corpus.manifest["skipped_without_domain"]
    if homeless:
        rows.append({"domain": "(no domain)", **none, "share": 0.0, "bytes_per_token": float("nan"),
                     **{f"heldout_{k}": 0 for k in none}, "heldout_error_bpb": float("nan"),
                     "duplicates": 0, **_cleaned({"near_duplicates": None, "contamination": None}),
                     "skipped": sum(homeless.values()), "reasons": _reasons(homeless),
                     "fingerprint": ""})  # fmt: skip
    return pd.DataFrame(rows).set_index("domain")


def _cleaned(domain: dict[str, Any]) -> dict[str, float]:
    near, shared, nan = domain["near_duplicates"], domain["contamination"], float("nan")
    return {"near_duplicates": near["train"] + near["heldout"] if near else nan,
            "contaminated": shared["train_documents"] if shared else nan,
            "heldout_shared": shared["shared_ngrams"] / max(shared["heldout_ngrams"], 1)
            if shared else nan}  # fmt: skip


def _reasons(skipped: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in skipped.items())
