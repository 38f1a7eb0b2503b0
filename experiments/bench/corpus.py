"""How much of the tokenizer's own speed does building a corpus keep?

    python experiments/bench/corpus.py [--megabytes 24] [--repeats 3] [--vocabulary 4096] [--ray]
    python experiments/bench/corpus.py --megabytes 300 --folder FOLDER [--folder ...] [--ray]

The same text, in one process on one core, paired and interleaved: (a) the tokenizer alone over
texts in memory, (b) `build_corpus` with that tokenizer, from JSON lines to a corpus on disk. Rates
are megabytes of text per second of CPU time, so that other work on the machine counts little, and
per second of wall time. The aim is (b) >= 0.9 (a).
`--ray` also builds with Ray Data on all cores and says what came of each core, after Ray's start.

With folders of real text the measurement is another: all cores, memory and kill -9 (see
`corpus_scale.py`). Else the text is documents of words by Zipf's law with punctuation and numbers,
or --text FILE.jsonl with a column `text`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import corpus_scale
import numpy as np

from rayx.corpus import Source, build_corpus
from rayx.corpus.tokenizer import plain, train_tokenizer

BATCH = 256  # documents that the tokenizer gets at once, as in a build


def make_texts(num_bytes: int, seed: int = 0) -> list[str]:
    """Return documents of about 3 KB, `num_bytes` of UTF-8 in all."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    shares = 1 / np.arange(1, 27)
    lengths = rng.integers(2, 11, 30_000)
    words = ["".join(rng.choice(letters, n, p=shares / shares.sum())) for n in lengths]
    marks = np.array([" ", " ", " ", " ", ", ", ". ", "\n", " (", ") ", "-"])
    texts, done = [], 0
    while done < num_bytes:
        count = int(rng.integers(100, 900))
        drawn = np.minimum(rng.zipf(1.2, count), len(words)) - 1
        glue = rng.choice(marks, count)
        text = "".join(words[w] + g for w, g in zip(drawn, glue, strict=True)) + str(len(texts))
        texts.append(text)
        done += len(text.encode())
    return texts


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Return seconds of this process' CPU, and of wall time."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def measure(
    megabytes: float, repeats: int, vocabulary: int, text: str | None, with_ray: bool
) -> dict[str, Any]:
    """Measure what of the tokenizer's speed building a corpus keeps, and return the figures."""
    texts = (
        [json.loads(line)["text"] for line in open(text, encoding="utf-8")]
        if text
        else make_texts(int(megabytes * 1e6))
    )
    texts = list(dict.fromkeys(texts))
    size = sum(len(t.encode()) for t in texts) / 1e6
    rows: list[dict[str, float]] = []
    result: dict[str, Any] = {"megabytes": size, "documents": len(texts), "repeats": repeats}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_file = Path(folder) / "tokenizer.json"
        tokenizer_json = train_tokenizer(texts[:2000], vocabulary).to_str()
        tokenizer_file.write_text(tokenizer_json, encoding="utf-8")
        source_file = Path(folder) / "text.jsonl"
        with open(source_file, "w", encoding="utf-8") as out:
            out.writelines(json.dumps({"text": t}) + "\n" for t in texts)
        source = Source(path=str(source_file), domain="text")
        tokenizer = plain(tokenizer_json)

        def alone(encode: Callable[..., Any]) -> None:
            for start in range(0, len(texts), BATCH):
                encode(texts[start : start + BATCH], add_special_tokens=False)

        def build(name: str, parallel: bool) -> str:
            out = Path(folder) / name
            built = build_corpus([source], out, tokenizer=tokenizer_file, parallel=parallel)
            return built.fingerprint

        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cores)})
        fingerprints = {build("warm", False)}
        for repeat in range(repeats):
            row: dict[str, float] = {}
            row["encode_batch"], row["encode_batch_wall"] = timed(
                lambda: alone(tokenizer.encode_batch)
            )
            row["tokenizer"], row["tokenizer_wall"] = timed(
                lambda: alone(tokenizer.encode_batch_fast)
            )
            began = time.process_time(), time.perf_counter()
            fingerprints.add(build(f"corpus{repeat}", False))
            row["build"] = time.process_time() - began[0]
            row["build_wall"] = time.perf_counter() - began[1]
            rows.append(row)
        os.sched_setaffinity(0, cores)
        if with_ray:
            result |= _on_ray(build, fingerprints, size)
    result["one_fingerprint"] = len(fingerprints) == 1
    middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    result |= {f"{key}_mb_per_s": size / seconds for key, seconds in middle.items()}
    for suffix in ("", "_wall"):
        ratios = [row[f"tokenizer{suffix}"] / row[f"build{suffix}"] for row in rows]
        result[f"ratio{suffix}"] = statistics.median(ratios)
    ratios = [row["encode_batch"] / row["build"] for row in rows]
    result["ratio_to_encode_batch"] = statistics.median(ratios)
    return result


def _on_ray(build: Callable[[str, bool], str], fingerprints: set[str], size: float) -> dict:
    import ray

    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    build("ray-warm", True)
    began = time.perf_counter()
    fingerprints.add(build("ray", True))
    seconds, cores = time.perf_counter() - began, os.cpu_count() or 1
    ray.shutdown()
    return {"ray_cores": cores, "ray_mb_per_s": size / seconds,
            "ray_mb_per_s_core": size / seconds / cores}  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--text", help="a JSONL file instead of drawn text")
    parser.add_argument("--folder", action="append", help="real text: all cores, kill -9")
    parser.add_argument("--seed", type=int, default=0, help="order of the real files")
    parser.add_argument("--ray", action="store_true", help="also with Ray Data")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.folder:
        result = corpus_scale.measure(given.folder, given.megabytes, given.vocabulary, given.seed,
                                      given.ray)  # fmt: skip
    else:
        os.environ["RAYON_NUM_THREADS"] = "1"  # read when the tokenizer first works
        result = measure(given.megabytes, given.repeats, given.vocabulary, given.text, given.ray)
    if given.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        facts = value.items() if isinstance(value, dict) else [("", value)]
        for part, fact in facts:
            label = f"{name} {part}".strip()
            print(f"{label:50} {fact:.3f}" if isinstance(fact, float) else f"{label:50} {fact}")


if __name__ == "__main__":
    main()
