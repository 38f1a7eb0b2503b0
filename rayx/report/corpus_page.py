"""Report: one self-contained HTML page about a corpus, its domains and the clusters they were.

The page opens offline and runs no script. A corpus that was not clustered has no map. The same
corpus gives the same bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from rayx.corpus import Corpus, describe
from rayx.report.page import Html, document, esc, figure, missing, paragraph, table, tiles

MARKERS = ("o", "s", "^", "D", "v", "P")
MAP_WIDTH = 640  # points; wider than a phone, so it scrolls there
LABELS_SHOWN = 12  # values of a label column


def corpus_page(corpus: Corpus, clusters: dict[str, Any] | None = None) -> str:
    """Return the page as HTML text.

    Args:
        corpus: The corpus.
        clusters: What `rayx.corpus.clusters.cluster.read_clusters` returned, None if it was not
            clustered.
    """
    facts = describe(corpus)
    sections = [("verdict", "Summary", _summary(corpus, facts, clusters)),
                ("domains", "Domains", _domains(facts))]  # fmt: skip
    for number, axis in enumerate(corpus.axes):
        shares = pd.DataFrame(corpus.label_shares(axis)).T.fillna(0.0)
        if (shares.max(axis=1) < 1).any():  # else it says no more than the domains' names
            sections.append((f"label-{number}", f"By {axis}", _labels(axis, shares)))
    if clusters is None:
        text = "This corpus was not clustered: its domains were given by its sources."
        sections.append(("clusters", "Clusters", missing(text)))
    else:
        sections += [("map", "Map of the clusters", _map(clusters)),
                     ("clusters", "Clusters", _clusters(clusters)),
                     ("how", "How they were found", _how(clusters))]  # fmt: skip
    name = corpus.url.rstrip("/").rpartition("/")[2].partition("?")[0]
    return document(f"Corpus {name}", sections)


def _summary(corpus: Corpus, facts: pd.DataFrame, clusters: dict[str, Any] | None) -> Html:
    from rayx.plots import short_count

    largest = str(facts["share"].idxmax())
    removed = int(facts["duplicates"].sum() + facts["skipped"].sum())
    tokens, num_bytes = int(facts["tokens"].sum()), int(facts["bytes"].sum())
    entries = [
        ("Domains", len(corpus.domains), f"{largest} is largest, {facts['share'].max():.0%}"),
        ("Train tokens", short_count(tokens), f"{short_count(num_bytes)}B of text, "
         f"{num_bytes / tokens:.2f} bytes a token"),
        ("Held out", short_count(int(facts["heldout_tokens"].sum())),
         f"tokens of {int(facts['heldout_documents'].sum()):,} documents"),
        ("Left out", f"{removed:,}", "documents: duplicates and skips, see Domains"),
    ]  # fmt: skip
    how = f"{len(corpus.domains)} domains"
    if clusters:
        how = f"{len(clusters['clusters'])} clusters of {clusters['documents']:,} documents"
        if only := len(corpus.targets) - len(corpus.domains):
            how += f", and {only} evaluation-only targets"
    facts_of = f"Fingerprint {corpus.fingerprint}, vocabulary {corpus.vocab_size:,}."
    return Html(f"<h1>{esc(how)}</h1>{tiles(entries)}{paragraph(facts_of, 'note')}")


def _domains(facts: pd.DataFrame) -> Html:
    rows = [
        [name, f"{r['documents']:,}", f"{r['tokens']:,}", f"{100 * r['share']:.1f}%",
         _number(r["bytes_per_token"], 2), f"{r['heldout_tokens']:,}",
         _number(r["heldout_error_bpb"], 3), f"{r['duplicates']:,}", r["reasons"] or "none"]
        for name, r in facts.to_dict("index").items()
    ]  # fmt: skip
    head = ("domain", "documents", "train tokens", "share", "bytes a token", "held-out tokens",
            "error of held-out loss (bpb)", "duplicates", "skipped")  # fmt: skip
    return table("What each domain holds, and what was left out of it.", head, rows, text=(8,))


def _labels(axis: str, shares: pd.DataFrame) -> Html:
    shown = list(shares.mean().sort_values(ascending=False, kind="stable").index[:LABELS_SHOWN])
    rows = [[name, *(f"{100 * share:.1f}%" for share in row)]
            for name, row in zip(shares.index, shares[shown].to_numpy(), strict=True)]  # fmt: skip
    rest = shares.shape[1] - len(shown)
    more = f" {rest} more values are not shown." if rest else ""
    caption = f"Share of each domain's train text (bytes) by {axis}.{more}"
    return table(caption, ("domain", *shown), rows)


def _map(clusters: dict[str, Any]) -> Html:
    from rayx.report.svg import draw

    entries, places = clusters["clusters"], clusters["map"]
    total = sum(e["bytes"] for e in entries)
    largest = entries[0]
    title = f"{largest['name']} holds {largest['bytes'] / total:.0%} of the text"
    sizes = draw(
        lambda axes: _bars(axes, entries, title),
        "sizes",
        "Size of each cluster: "
        + ", ".join(f"{e['name']} {e['bytes'] / total:.1%}" for e in entries),
        height=80 + 22 * len(entries),
    )
    parts = [Html(f'<div class="alone">{figure(sizes, "Text in each cluster.")}</div>')]
    if places["method"] == "none":
        parts.append(missing("There are too few documents for a map."))
    else:
        drawn = draw(
            lambda axes: _scatter(axes, entries, places), "map",
            f"Map of {len(places['x'])} documents in two dimensions, coloured by cluster",
            height=470, width=MAP_WIDTH,
        )  # fmt: skip
        caption = (
            f"{len(places['x']):,} sampled documents by {places['method']} of their embeddings: "
            "near ones are alike; distances between groups and their sizes on the map mean little."
        )
        parts.insert(0, figure(drawn, caption, scroll_width=MAP_WIDTH))
    return Html("".join(f'<div style="margin-top:1rem">{part}</div>' for part in parts))


def _scatter(axes: Any, entries: list[dict[str, Any]], places: dict[str, Any]) -> None:
    from rayx.plots import INK, MUTED, PALETTE, label

    x, y, cluster = (np.array(places[key]) for key in ("x", "y", "cluster"))
    middles = {}
    for number, entry in enumerate(entries):
        mine = cluster == number
        if mine.any():
            marker = MARKERS[number // len(PALETTE) % len(MARKERS)]
            axes.plot(x[mine], y[mine], marker, color=PALETTE[number % len(PALETTE)], ms=3.2, mew=0,
                      alpha=0.55, ls="none")  # fmt: skip
            # of the documents, the one in the middle: a mean may lie outside its cluster
            spread = np.hypot(x[mine] - np.median(x[mine]), y[mine] - np.median(y[mine]))
            at = int(spread.argmin())
            middles[number] = [x[mine][at], y[mine][at], label(entry["name"], 26)]
    for at_x, at_y, name in _apart(list(middles.values())):
        axes.text(at_x, at_y, name, color=INK, fontsize=9.5, fontweight="bold", ha="center",
                  va="center")  # fmt: skip
    axes.set_xlim(-0.04, 1.04)
    axes.set_ylim(-0.04, 1.04)
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_color(MUTED)
        side.set_linewidth(0.5)


def _apart(labels: list[list[Any]]) -> list[list[Any]]:
    """Move names up until none lies on another; a name is about 0.012 of the width a letter."""
    placed: list[list[Any]] = []
    for x, y, name in sorted(labels, key=lambda entry: entry[1]):
        half = 0.006 * len(name)
        x = min(max(x, half - 0.03), 1.03 - half)
        for other_x, other_y, other in placed:
            if abs(x - other_x) < half + 0.006 * len(other) and y - other_y < 0.04:
                y = other_y + 0.04
        placed.append([x, y, name])
    return placed


def _bars(axes: Any, entries: list[dict[str, Any]], title: str) -> None:
    from rayx.plots import INK, PALETTE, dress, label

    megabytes = [e["bytes"] / 1e6 for e in entries]
    rows = range(len(entries))
    axes.barh(rows, megabytes, height=0.66, color=[PALETTE[i % len(PALETTE)] for i in rows])
    for row, size in enumerate(megabytes):
        axes.text(size + 0.01 * max(megabytes), row, f"{size:,.2f}", color=INK, va="center",
                  fontsize=9.5)  # fmt: skip
    axes.set_yticks(rows, [label(e["name"], 26) for e in entries])
    axes.set_ylim(len(entries) - 0.4, -0.6)
    axes.set_xlim(0, 1.18 * max(megabytes))
    dress(axes, title, "text (MB)", "")
    axes.grid(False, axis="y")


def _clusters(clusters: dict[str, Any]) -> Html:
    entries = clusters["clusters"]
    rated = any(e["quality"] is not None for e in entries)
    head = ["cluster", "documents", "MB", "cosine with its centroid", "mean quality"]
    rows = [
        [e["name"], f"{e['documents']:,}", f"{e['bytes'] / 1e6:,.2f}", f"{e['similarity']:.2f}",
         *[_number(e["quality"], 2)] * rated, ", ".join(e["terms"]) or "none"]
        for e in entries
    ]  # fmt: skip
    head = [*head[: 4 + rated], "telling terms"]
    shown = table("What each cluster is about; names are its first terms.", head, rows,
                  text=(len(head) - 1,))  # fmt: skip
    texts = [[e["name"] if i == 0 else "", f"{x['similarity']:.2f}", x["text"]]
             for e in entries for i, x in enumerate(e["examples"])]  # fmt: skip
    examples = table("Beginnings of the sampled documents nearest each centroid.",
                     ("cluster", "cosine", "text"), texts, text=(2,))  # fmt: skip
    return Html(shown + examples)


def _how(clusters: dict[str, Any]) -> Html:
    settings = clusters["settings"]
    skipped = ", ".join(f"{n:,} {why}" for why, n in clusters["skipped"].items()) or "none"
    asked = settings["clusters"] or "the fewest of good silhouette"
    if settings["merge_distance"] is not None:
        asked = f"those that stay farther apart than {settings['merge_distance']:g}"
    rows = [
        ("embedder", settings["embedder"]), ("clusters asked for", asked),
        ("documents sampled to fit them", f"{clusters['sampled']:,}"),
        ("initial clusters", clusters["initial"]), ("of these empty", clusters["empty"]),
        ("of these pruned", len(clusters["pruned"])),
        ("too small for a held-out set, joined to their nearest", clusters["joined"]),
        ("documents in which the embedder knows nothing", f"{clusters['unknown']:,}"),
        ("documents skipped", skipped), ("seed", settings["seed"]),
    ]  # fmt: skip
    parts = [table("Settings and what came of them.", ("", "value"), rows, text=(1,))]
    if clusters["pruned"]:
        column, threshold = settings["prune"]
        gone = [[", ".join(e["terms"]) or "none", f"{e['documents']:,}", f"{e['bytes'] / 1e6:,.2f}",
                 _number(e["quality"], 2)] for e in clusters["pruned"]]  # fmt: skip
        head = ("telling terms", "documents", "MB", f"mean {column}")
        parts.append(table(f"Left out: mean {column} below {threshold:g}.", head, gone))
    return Html("".join(parts))


def _number(value: float | None, digits: int) -> str:
    return "none" if value is None or value != value else f"{value:.{digits}f}"
