"""Are planted copies in real text found, and is what is found a copy? How many has a real corpus?

    python experiments/bench/near_duplicates.py [--seeds 3] [--copies 300] [--json]

Text: five domains of the sample corpus (extra `sample`), joined and cut to documents of 200 bytes
to 50 KB, evenly by logarithm. Into them are planted, `--copies` of each kind and seed:
`exact`, `cased` (upper case, other white space and marks), `changed` (5% of the words replaced by
words of the domain, at least one), and two kinds that are no copies: `rewritten` (30% of the words
replaced) and `half` (a half of one document, a half of another).

Recall: of a planted copy and its original not both stay. Precision: of the documents removed, those
that are right. Right are planted copies, and else pairs whose words agree in order: at least 4 in 5
of both documents' words (difflib, of their first 2,000) - a judge that knows no bigrams, because
real text has near-duplicates of its own that nobody planted. `jaccard_errors` are pairs whose exact
similarity, by counting bigrams, is below the threshold.

Then the sample's pieces as they are, where all pairs are judged by their words in order, and the
rule texts of licensedcode, with some of the pairs found. Memory is what each document that stays
takes. Rates are of one process by its CPU time.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from difflib import SequenceMatcher
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from rayx.corpus import extract_sample
from rayx.corpus.cleaning.contamination import Contamination
from rayx.corpus.cleaning.near_duplicates import NearDuplicates

SIZES = {"code": 6_000_000, "legal": 6_000_000, "speeches": 5_000_000, "medicine": 3_000_000,
         "docs": 2_000_000}  # fmt: skip
LENGTHS = (200, 1_000, 5_000, 50_000)  # bytes; bounds of the rows of the table
COPIES = ("exact", "cased", "changed")
OTHERS = ("rewritten", "half")
ALIGNED = 0.8
BATCH = 256


def base_documents(texts: dict[str, list[str]], rng: random.Random) -> list[tuple[str, str]]:
    """Return (domain, text): runs of each domain's pieces, cut to log-uniform lengths."""
    found = []
    for domain, pieces in texts.items():
        whole = "\n".join(pieces)
        start = 0
        while start < len(whole):
            size = int(math.exp(rng.uniform(math.log(LENGTHS[0]), math.log(LENGTHS[-1]))))
            text = whole[start : start + size]
            start += size
            if len(text) >= LENGTHS[0]:
                found.append((domain, text))
    return found


def replaced(text: str, share: float, words: list[str], rng: random.Random) -> str:
    """Return the text with a share of its words, at least one, drawn anew."""
    parts = re.split(r"(\s+)", text)
    at = [i for i, part in enumerate(parts) if part.strip()]
    for i in rng.sample(at, max(1, round(share * len(at)))):
        parts[i] = rng.choice(words)
    return "".join(parts)


def cased(text: str) -> str:
    """Return the text in upper case, its white space and commas changed."""
    return re.sub(r"\s+", "  ", text.upper().replace(",", " -")) + "\n"


def deduplicate(texts: list[str], threshold: float) -> tuple[np.ndarray, float]:
    """Return for each document the one it resembles or -1, and seconds of CPU."""
    began = time.process_time()
    with (
        tempfile.TemporaryDirectory() as folder,
        NearDuplicates(threshold, Path(folder) / "bigrams") as index,
    ):
        batches = (texts[i : i + BATCH] for i in range(0, len(texts), BATCH))
        found = np.concatenate([index.add(batch) for batch in batches])
    return found, time.process_time() - began


def exact_jaccard(first: str, second: str) -> float:
    """Return the similarity of two texts by counting their bigrams."""
    bags = []
    for text in (first, second):
        words = re.findall(r"[^\W_]+", text.casefold())
        bags.append(Counter(zip(words, words[1:], strict=False)))
    return (bags[0] & bags[1]).total() / max((bags[0] | bags[1]).total(), 1)


def aligned(first: str, second: str) -> float:
    """Return the share of both texts' words, of the first 2,000, that agree in order."""
    words = [re.findall(r"[^\W_]+", text.casefold())[:2000] for text in (first, second)]
    blocks = SequenceMatcher(None, *words, autojunk=False).get_matching_blocks()
    return 2 * sum(block.size for block in blocks) / max(sum(map(len, words)), 1)


def plant(texts: dict[str, list[str]], copies: int, threshold: float, seed: int) -> dict[str, Any]:
    """Plant copies in the text, look for near-duplicates and judge what is found."""
    rng = random.Random(seed)
    base = base_documents(texts, rng)
    words = {domain: [w for t in rng.sample(ts, min(len(ts), 300)) for w in t.split()]
             for domain, ts in texts.items()}  # fmt: skip
    make: dict[str, Callable[[str, str], str]] = {
        "exact": lambda domain, text: text,
        "cased": lambda domain, text: cased(text),
        "changed": lambda domain, text: replaced(text, 0.05, words[domain], rng),
        "rewritten": lambda domain, text: replaced(text, 0.3, words[domain], rng),
        "half": lambda domain, text: text[: len(text) // 2] + rng.choice(base)[1][: len(text) // 2],
    }
    documents = [(text, i, "original") for i, (_, text) in enumerate(base)]
    origins = rng.sample(range(len(base)), min(copies * len(make), len(base)))
    for n, origin in enumerate(origins):
        kind = list(make)[n % len(make)]
        documents.append((make[kind](*base[origin]), origin, kind))
    rng.shuffle(documents)
    found, seconds = deduplicate([text for text, _, _ in documents], threshold)

    where = {(origin, kind): i for i, (_, origin, kind) in enumerate(documents)}
    rows: Counter[tuple[str, ...]] = Counter()
    for (origin, kind), i in where.items():
        if kind in COPIES:
            domain, text = base[origin]
            size = sum(len(text.encode()) >= bound for bound in LENGTHS[1:-1])
            missed = found[i] == -1 and found[where[origin, "original"]] == -1
            for row in (("kind", kind), ("domain", domain), ("bytes", f">= {LENGTHS[size]}")):
                rows[(*row, "planted")] += 1
                rows[(*row, "found")] += not missed
    wrong, own, errors = [], 0, 0
    for i in np.flatnonzero(found >= 0):
        (text, origin, kind), (other, other_origin, other_kind) = documents[i], documents[found[i]]
        errors += exact_jaccard(text, other) < threshold
        if origin == other_origin and {kind, other_kind} <= {"original", *COPIES}:
            continue
        own += 1
        if aligned(text, other) < ALIGNED:
            wrong.append((text[:200], other[:200]))
    removed = int((found >= 0).sum())
    return {"documents": len(documents), "megabytes": sum(len(t.encode()) for t, *_ in documents)
            / 1e6, "seconds": seconds, "removed": removed, "not_planted": own,
            "wrong": len(wrong), "precision": 1 - len(wrong) / max(removed, 1),
            "jaccard_errors": errors, "wrong_pairs": wrong[:3],
            "rows": {" ".join(key): value for key, value in rows.items()}}  # fmt: skip


def rules(threshold: float, examples: int) -> dict[str, Any]:
    """Look for near-duplicates in the texts of licensedcode's rules."""
    spec = find_spec("licensedcode")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("licensedcode-data is not installed: pip install 'rayx-mix[sample]'")
    files = sorted((Path(spec.submodule_search_locations[0]) / "data/rules").glob("*.RULE"))
    texts = [f.read_text(encoding="utf-8")[4:].partition("\n---\n")[2].strip() for f in files]
    found, seconds = deduplicate(texts, threshold)
    at = np.flatnonzero(found >= 0)
    pairs = [(files[i].name, files[found[i]].name, exact_jaccard(texts[i], texts[found[i]]),
              texts[i][:240], texts[found[i]][:240])
             for i in random.Random(0).sample(at.tolist(), min(examples, len(at)))]  # fmt: skip
    drawn = random.Random(1).sample(at.tolist(), min(1_000, len(at)))
    agree = [aligned(texts[i], texts[found[i]]) >= ALIGNED for i in drawn]
    sizes = np.array([len(t.encode()) for t in texts])
    return {"documents": len(texts), "megabytes": sizes.sum() / 1e6, "seconds": seconds,
            "near_duplicates": len(at), "near_duplicate_megabytes": sizes[at].sum() / 1e6,
            "in_order": float(np.mean(agree)), "judged": len(drawn), "pairs": pairs}  # fmt: skip


def unplanted(texts: list[str], threshold: float) -> dict[str, Any]:
    """Look for near-duplicates in the sample's text as it is."""
    found, _ = deduplicate(texts, threshold)
    at = np.flatnonzero(found >= 0)
    agree = [aligned(texts[i], texts[found[i]]) >= ALIGNED for i in at]
    return {"documents": len(texts), "near_duplicates": len(at), "in_order": float(np.mean(agree))}


def state_bytes(threshold: float, count: int = 50_000) -> float:
    """Return the resident memory that each of many different documents takes in the index."""
    rng = np.random.default_rng(0)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def batch() -> list[str]:
        return [" ".join(map(str, row)) for row in rng.integers(0, 10**9, (BATCH, 20))]

    with (
        tempfile.TemporaryDirectory() as folder,
        NearDuplicates(threshold, Path(folder) / "bigrams") as index,
    ):
        for _ in range(8):
            index.add(batch())
        before = resident()
        for _ in range(count // BATCH):
            index.add(batch())
        return (resident() - before) / (count // BATCH * BATCH)


def contamination_rate(texts: list[str], seed: int) -> dict[str, Any]:
    """Return the speed of the contamination count with 5% of the text held out, and its finds."""
    texts = random.Random(seed).sample(texts, len(texts))
    cut = len(texts) // 20
    began = time.process_time()
    index = Contamination(13)
    for texts_of, work in ((texts[:cut], index.add_heldout), (texts[cut:], index.find)):
        for i in range(0, len(texts_of), BATCH):
            work(texts_of[i : i + BATCH])
    counts = index.heldout_counts(texts[:cut])
    seconds = time.process_time() - began
    size = sum(len(t.encode()) for t in texts) / 1e6
    return {"mb_per_s": size / seconds, "heldout": cut, **counts,
            "train_documents": len(index.train_documents())}  # fmt: skip


def measure(seeds: int, copies: int, threshold: float, text: str | None) -> dict[str, Any]:
    """Run everything and return the figures."""
    with tempfile.TemporaryDirectory() as folder:
        sources = extract_sample(text or folder, sizes=SIZES)
        texts = {str(s.domain): [json.loads(line)["text"] for line in
                                 Path(s.path).read_text(encoding="utf-8").split("\n")[:-1]]
                 for s in sources}  # fmt: skip
    runs = [plant(texts, copies, threshold, seed) for seed in range(seeds)]
    rows: Counter[str] = Counter()
    for run in runs:
        rows.update(run.pop("rows"))
    names = list(dict.fromkeys(key.rpartition(" ")[0] for key in sorted(rows)))
    plain = [t for ts in texts.values() for t in ts]
    return {
        "threshold": threshold, "seeds": seeds, "runs": runs,
        "recall": {n: rows[f"{n} found"] / rows[f"{n} planted"] for n in names},
        "planted": {n: rows[f"{n} planted"] for n in names},
        "mb_per_s": sum(r["megabytes"] for r in runs) / sum(r["seconds"] for r in runs),
        "state_bytes_per_document": state_bytes(threshold),
        "contamination": contamination_rate(plain, 0),
        "unplanted": unplanted(plain, threshold),
        "rules": rules(threshold, 6),
    }  # fmt: skip


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    print(f"threshold {result['threshold']}, {result['seeds']} seeds\n\n{'recall':20} planted")
    for name, value in result["recall"].items():
        print(f"{name:20} {result['planted'][name]:7,}  {value:.4f}")
    print("\nseed  documents      MB  removed  not planted  wrong  precision  jaccard errors")
    for seed, run in enumerate(result["runs"]):
        print(f"{seed:4}  {run['documents']:9,}  {run['megabytes']:6.1f}  {run['removed']:7,}  "
              f"{run['not_planted']:11,}  {run['wrong']:5,}  {run['precision']:9.4f}  "
              f"{run['jaccard_errors']:14,}")  # fmt: skip
        for pair in run["wrong_pairs"]:
            print("      wrong:", *map(repr, pair), sep="\n        ")
    found, own = result["rules"], result["unplanted"]
    print(f"\nthe sample as it is: {own['near_duplicates']:,} of {own['documents']:,} documents, "
          f"{own['in_order']:.1%} agree in order")  # fmt: skip
    print(f"\n{result['mb_per_s']:.1f} MB/s, {result['state_bytes_per_document']:.0f} bytes of "
          "memory per document that stays")  # fmt: skip
    print("contamination:", json.dumps(result["contamination"]))
    print(f"\nlicence rules: {found['near_duplicates']:,} of {found['documents']:,} documents "
          f"({found['near_duplicate_megabytes']:.1f} of {found['megabytes']:.1f} MB) in "
          f"{found['seconds']:.1f} s; {found['in_order']:.1%} of {found['judged']:,} pairs agree "
          "in order")  # fmt: skip
    for name, other, value, text, other_text in found["pairs"]:
        print(f"  {value:.3f} {name} ~ {other}\n    {text!r}\n    {other_text!r}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--copies", type=int, default=300, help="of each kind and seed")
    parser.add_argument("--threshold", type=float, default=0.7)
    parser.add_argument("--text", help="folder to keep the extracted sample text in")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    result = measure(given.seeds, given.copies, given.threshold, given.text)
    if given.json:
        print(json.dumps(result))
    else:
        show(result)


if __name__ == "__main__":
    main()
