"""Does a build of real text keep the tokenizer's speed on all cores, bounded, and when killed?

    python experiments/bench/corpus.py --megabytes 300 --folder FOLDER [--folder ...] [--ray]

Text files below the folders (any that are UTF-8), each once, in an order drawn by the seed; one
domain for each kind of file, as Parquet and as JSON lines. Then, each in a process of its own:

- `tokenizer`: `encode_batch_fast` over the texts in memory, on all cores, before and after
- `build`: the whole build with that tokenizer, on all cores; RSS of each process, 20 times a second
- `killed`: a build that is killed (kill -9) while it reads, encodes the held-out text, and encodes
  the train text, started again each time; its fingerprint, and the text that it did again
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayx.corpus import Source, build, build_corpus, encode, stage
from rayx.corpus.tokenizer import plain, train_tokenizer

BATCH = 256  # documents that the tokenizer gets at once
ROUND = 20_000_000  # bytes of a part of the source files
KINDS = {".py": "code", ".pyi": "code", ".license": "licences", ".rule": "licences",
         ".md": "docs", ".rst": "docs", ".txt": "docs"}  # fmt: skip
MOMENTS = ("reading", "heldout", "train")


def find_texts(folders: list[str], num_bytes: int, seed: int) -> Iterator[tuple[str, str]]:
    """Yield (domain, text) of files that are UTF-8 text, each text once, to `num_bytes` in all."""
    files = sorted(
        file for folder in folders for file in Path(folder).rglob("*")
        if file.suffix.lower() in KINDS and file.is_file() and file.stat().st_size < 50_000_000
    )  # fmt: skip
    random.Random(seed).shuffle(files)
    seen, done = set(), 0
    for file in files:
        data = file.read_bytes()
        try:
            text = data.decode()
        except UnicodeDecodeError:
            continue
        key = stage.document_hash(text)
        if key in seen or not text.strip() or "\0" in text or "\ufffd" in text:
            continue
        seen.add(key)
        done += len(data)
        yield KINDS[file.suffix.lower()], text
        if done >= num_bytes:
            return


def write_sources(folder: Path, texts: Iterator[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Write the texts of each domain as Parquet (code) or JSON lines; return what there is."""
    found: dict[str, dict[str, int]] = {}
    waiting: dict[str, list[str]] = {}

    def flush(domain: str) -> None:
        rows, parts = waiting.pop(domain), found[domain]["parts"]
        (folder / domain).mkdir(exist_ok=True)
        file = folder / domain / f"{parts:05d}"
        if domain == "code":
            pq.write_table(pa.table({"text": rows}), file.with_suffix(".parquet"))
        else:
            lines = (json.dumps({"text": text}) + "\n" for text in rows)
            with open(file.with_suffix(".jsonl"), "w", encoding="utf-8") as out:
                out.writelines(lines)
        found[domain]["parts"] += 1

    sizes: dict[str, int] = {}
    for domain, text in texts:
        facts = found.setdefault(domain, {"documents": 0, "bytes": 0, "parts": 0})
        size = len(text.encode())
        facts["documents"] += 1
        facts["bytes"] += size
        waiting.setdefault(domain, []).append(text)
        sizes[domain] = sizes.get(domain, 0) + size
        if sizes[domain] >= ROUND:
            flush(domain)
            sizes[domain] = 0
    for domain in list(waiting):
        flush(domain)
    return found


def read_sources(folder: Path) -> Iterator[str]:
    """Yield the texts that `write_sources` wrote."""
    for file in sorted((folder / "text").rglob("*.*")):
        if file.suffix == ".parquet":
            yield from pq.read_table(file)["text"].to_pylist()
        else:
            yield from (json.loads(line)["text"] for line in open(file, encoding="utf-8"))


# What runs in a process of its own ---------------------------------------------------------------


def tokenize(folder: Path) -> dict[str, Any]:
    """Encode all texts from memory with the tokenizer alone."""
    texts = list(read_sources(folder))
    tokenizer = plain((folder / "tokenizer.json").read_text(encoding="utf-8"))
    began, cpu = time.perf_counter(), time.process_time()
    for start in range(0, len(texts), BATCH):
        tokenizer.encode_batch_fast(texts[start : start + BATCH], add_special_tokens=False)
    return {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}


def build_one(folder: Path, out: str, parallel: bool | None, moment: str | None) -> dict[str, Any]:
    """Build; or be killed half way through reading, the held-out or the train text."""
    facts = json.loads((folder / "facts.json").read_text())
    total = sum(domain["bytes"] for domain in facts.values())
    work = {"read": 0, "encoded": 0}  # bytes of text
    hash_one, encode_some, original = stage.document_hash, encode.encode_texts, build.progress

    def counted_hash(text: str) -> bytes:
        work["read"] += len(text.encode())
        return hash_one(text)

    def counted_encode(column: pa.ChunkedArray, *more: Any) -> bytes:
        ids = encode_some(column, *more)
        work["encoded"] += pc.sum(pc.binary_length(column)).as_py()  # type: ignore[attr-defined]
        return ids

    @contextmanager
    def watched(label: str, total_bytes: int | None = None) -> Iterator[Callable[[int, int], None]]:
        done = 0
        with original(label, total_bytes) as advance:

            def counted(documents: int, num_bytes: int) -> None:
                nonlocal done
                done += num_bytes
                advance(documents, num_bytes)
                # held-out text comes first, about 5% of all
                at = {("reading", "reading"): 0.7, ("encoding", "heldout"): 0.03,
                      ("encoding", "train"): 0.6}.get((label, str(moment)))  # fmt: skip
                if at is not None and done > at * total:
                    note()
                    os.kill(os.getpid(), signal.SIGKILL)

            yield counted

    def note() -> None:
        with open(folder / f"work-{out}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(work) + "\n")

    if moment:
        stage.document_hash, encode.encode_texts = counted_hash, counted_encode
        build.progress = watched
    sources = [Source(path=str(folder / "text" / domain), domain=domain) for domain in facts]
    if parallel:
        import ray

        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
    began, cpu = time.perf_counter(), time.process_time()
    corpus = build_corpus(sources, folder / out, tokenizer=folder / "tokenizer.json",
                          parallel=parallel, min_heldout_tokens=1)  # fmt: skip
    note()
    return {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu,
            "fingerprint": corpus.fingerprint}  # fmt: skip


def run(*call: Any, module: str = "corpus_scale") -> dict[str, Any]:
    """Call a function of a module here in a new process: its result and peak memory, MB."""
    code = (
        f"import json, sys; from pathlib import Path; import {module} as m; "
        "name, folder, *rest = json.loads(sys.argv[1]); "
        "print(json.dumps(getattr(m, name)(Path(folder), *rest)))"
    )
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen([sys.executable, "-c", code, json.dumps(call)], text=True,
                               stdout=subprocess.PIPE, env=environment)  # fmt: skip
    one = several = 0
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        sizes = []
        try:
            for each in (watched, *watched.children(recursive=True)):
                sizes.append(each.memory_info().rss)
        except psutil.Error:
            pass
        one, several = max(one, *sizes, 0), max(several, sum(sizes))
        time.sleep(0.05)
    assert process.stdout is not None
    lines = process.stdout.read().splitlines()
    if process.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{call} ended with {process.returncode}; see above")
    result = json.loads(lines[-1]) if process.returncode == 0 else {"code": process.returncode}
    return result | {"peak_process_mb": one / 1e6, "peak_all_mb": several / 1e6}


# The measurement ---------------------------------------------------------------------------------


def measure(folders: list[str], megabytes: float, vocabulary: int, seed: int,
            with_ray: bool) -> dict[str, Any]:  # fmt: skip
    """Measure and return the figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text").mkdir()
        facts = write_sources(folder / "text", find_texts(folders, int(megabytes * 1e6), seed))
        (folder / "facts.json").write_text(json.dumps(facts))
        size = sum(domain["bytes"] for domain in facts.values()) / 1e6
        sample = (text for k, text in enumerate(read_sources(folder)) if k % 25 == 0)
        train_tokenizer(sample, vocabulary).save(str(folder / "tokenizer.json"))

        runs = {"tokenizer": run("tokenize", name),
                "build": run("build_one", name, "corpus", None, None),
                "tokenizer_again": run("tokenize", name)}  # fmt: skip
        if with_ray:
            runs["build_on_ray"] = run("build_one", name, "ray", True, None)
        peaks = [run("build_one", name, "killed", None, moment) for moment in MOMENTS]
        runs["resumed"] = run("build_one", name, "killed", None, "none")
        work = [json.loads(line) for line in (folder / "work-killed.jsonl").open()]
    built = runs["build"]
    alone = (runs["tokenizer"]["seconds"] + runs["tokenizer_again"]["seconds"]) / 2
    alone_cpu = (runs["tokenizer"]["cpu_seconds"] + runs["tokenizer_again"]["cpu_seconds"]) / 2
    builds = {n: r for n, r in runs.items() if "fingerprint" in r}
    result: dict[str, Any] = {
        "megabytes": size, "cores": encode.cores(),
        "documents": sum(d["documents"] for d in facts.values()), "domains": facts,
    }  # fmt: skip
    for key, found in runs.items():
        if key != "resumed":
            result[f"{key}_mb_per_s"] = size / found["seconds"]
    result |= {
        "ratio": alone / built["seconds"],
        "ratio_of_cpu_seconds": alone_cpu / built["cpu_seconds"],
        "peak_process_mb": max(r["peak_process_mb"] for r in (*builds.values(), *peaks)),
        "peak_all_mb": {n: r["peak_all_mb"] for n, r in builds.items()},
        "killed": [r.get("code") == -signal.SIGKILL for r in peaks],
        "work_of_each_run_mb": [{k: n / 1e6 for k, n in w.items()} for w in work],
        "done_again_mb": {k: sum(w[k] for w in work) / 1e6 - size for k in ("read", "encoded")},
        "fingerprints": {n: r["fingerprint"] for n, r in builds.items()},
    }
    return result | {"aims": {
        "tokenizer's rate, at least .9": result["ratio"] >= 0.9,
        "peak of a process, at most 1,500 MB": result["peak_process_mb"] <= 1500,
        "killed 3 times, the same fingerprint": all(result["killed"])
        and len(set(result["fingerprints"].values())) == 1,
    }}  # fmt: skip


def main() -> None:
    """Measure and print as JSON; `corpus.py --folder` prints the same as a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", action="append", required=True, help="real text")
    parser.add_argument("--megabytes", type=float, default=300)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0, help="order of the files")
    parser.add_argument("--ray", action="store_true", help="also with Ray Data")
    parser.add_argument("--json", action="store_true", help="as it is anyway")
    given = parser.parse_args()
    print(json.dumps(measure(given.folder, given.megabytes, given.vocabulary, given.seed,
                             given.ray)))  # fmt: skip


if __name__ == "__main__":
    main()
