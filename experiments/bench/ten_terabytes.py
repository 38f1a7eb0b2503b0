"""What does a corpus of 10 TB take: hours, machines, memory, storage and money?

    python experiments/bench/ten_terabytes.py --folder FOLDER [--folder ...] [--sizes 20 80 300]
        [--terabytes 10] [--machines 64] [--cores 2] [--memory-gb 8] [--price 0.04] [--near]

Measures each stage of a build at several sizes of real text (CPU seconds, so that other work on the
machine counts little), shows that they grow in proportion, and simulates a cluster of `machines`
(or slices of larger ones), each building one part, with stragglers and lost machines, at those
rates. docs/ten_terabytes.md says how to read the figures.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import corpus_scale
import numpy as np

from rayx.corpus import Source, stage
from rayx.corpus.cleaning.clean import Cleaning, clean
from rayx.corpus.encode import Encoder
from rayx.corpus.parts import staged_parts
from rayx.corpus.route import route
from rayx.corpus.shards import Shard, encode_shards
from rayx.corpus.source import locate
from rayx.corpus.tokenizer import train_tokenizer

STAGGER = 0.2  # sd of the log of a machine's slowness
PARTS = 64  # that the measured routing writes
CHECKPOINT_MB = 64.0  # done again when a machine is lost


def stages(folder: Path, near: bool) -> dict[str, Any]:
    """Run the stages of a build one after another; CPU seconds, memory and bytes of each."""
    facts = json.loads((folder / "facts.json").read_text())
    sources = [Source(path=str(folder / "text" / name), domain=name) for name in facts]
    located = [(source, locate(source)) for source in sources]
    seconds: dict[str, float] = {}
    kept: dict[str, Any] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began = time.process_time()
        result = work()
        seconds[name] = time.process_time() - began
        return result

    def nothing(documents: int, num_bytes: int) -> None:
        pass

    def staged(to: str, partition: tuple[int, int] | None) -> Any:
        return stage.stage_sources(located, folder / to, 0.3, 0, nothing, partition)

    staged("warm", (0, 10**9))  # imports
    timed("filter", lambda: staged("none", (0, 10**9)))
    timed("route", lambda: [route(source, folder / "routed" / str(source.domain), PARTS)
                            for source in sources])  # fmt: skip
    tallies, _ = timed("stage", lambda: staged("staged", None))
    documents = sum(t.documents.total() for t in tallies.values())
    hashes = {n.to_bytes(16, "little") for n in range(documents)}
    kept["bytes_of_memory_per_document"] = sys.getsizeof(hashes) / documents + sys.getsizeof(
        next(iter(hashes))
    )
    del hashes
    kept["staged_bytes"] = sum(f.stat().st_size for f in (folder / "staged").rglob("*.parquet"))
    if near:
        both = Cleaning(near_duplicates=0.7)
        paths = folder / "staged", folder / "cleaned"
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        timed("near_duplicates", lambda: clean(*paths, tallies, both, nothing))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        kept["near_duplicates_bytes_per_document"] = 1024 * grown / documents
    tokenizer = (folder / "tokenizer.json").read_text(encoding="utf-8")
    text = folder / ("cleaned" if near else "staged")
    shards = [
        Shard(staged_parts(text, name, split), folder / f"{name}.{split}.bin",
              folder / f"{name}.{split}.json")
        for name in tallies for split in stage.SPLITS if tallies[name].documents[split]
    ]  # fmt: skip
    with Encoder(tokenizer) as encoder:
        encoded = timed("encode", lambda: list(encode_shards(shards, encoder, nothing)))
    kept["encoded_bytes"] = sum(f["bytes"] for f in encoded)
    kept["tokens"] = sum(f["tokens"] for f in encoded)
    return {"cpu_seconds": seconds, "documents": documents, **kept}


def measure(folders: list[str], sizes: list[float], vocabulary: int, seed: int,
            near: bool) -> dict[str, Any]:  # fmt: skip
    """Return MB/s of a core for each stage and size, and what a document and a byte take."""
    rows, tokenizer = [], None
    for megabytes in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "text").mkdir()
            texts = corpus_scale.find_texts(folders, int(megabytes * 1e6), seed)
            facts = corpus_scale.write_sources(folder / "text", texts)
            (folder / "facts.json").write_text(json.dumps(facts))
            if tokenizer is None:
                sample = list(corpus_scale.read_sources(folder))[:3000]
                tokenizer = train_tokenizer(sample, vocabulary).to_str()
            (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
            found = corpus_scale.run("stages", name, near, module="ten_terabytes")
            size = sum(f["bytes"] for f in facts.values()) / 1e6
            sizes_of = dict.fromkeys(found["cpu_seconds"], size)
            sizes_of["encode"] = found["encoded_bytes"] / 1e6
            rates = {k: sizes_of[k] / s for k, s in found["cpu_seconds"].items()}
            rows.append({"megabytes": size, "mb_per_s_core": rates, **found})
            shutil.rmtree(folder / "text")
    last = rows[-1]
    return {
        "sizes": rows,
        "mb_per_s_core": last["mb_per_s_core"],
        "rate_largest_over_smallest": {
            k: last["mb_per_s_core"][k] / rows[0]["mb_per_s_core"][k] for k in last["mb_per_s_core"]
        },
        "bytes_per_document": last["megabytes"] * 1e6 / last["documents"],
        "bytes_of_memory_per_document": max(r["bytes_of_memory_per_document"] for r in rows),
        "staged_bytes_per_byte": last["staged_bytes"] / (last["megabytes"] * 1e6),
        "bytes_per_token": last["encoded_bytes"] / last["tokens"],
    }  # fmt: skip


# A cluster ---------------------------------------------------------------------------------------


def simulate(work_s: list[float], nodes: int, losses_per_hour: float, back_s: float,
             again_s: float, rng: np.random.Generator) -> tuple[float, int]:  # fmt: skip
    """Return the seconds until `nodes` machines have done all pieces of work, and losses.

    A machine takes the next piece when it is free, and is slower or faster by a factor of its own.
    When it is lost, another takes its place after `back_s`, goes on from the checkpoint, and does
    `again_s` again.
    """
    slowness = np.exp(rng.normal(-(STAGGER**2) / 2, STAGGER, nodes))
    free = [(0.0, node) for node in range(nodes)]
    end, lost = 0.0, 0
    for work in sorted(work_s, reverse=True):
        now, node = heapq.heappop(free)
        left = work * slowness[node]
        while losses_per_hour > 0:
            until = rng.exponential(3600 / losses_per_hour)
            if until >= left:
                break
            now += until + back_s
            left += again_s - until
            slowness[node] = math.exp(rng.normal(-(STAGGER**2) / 2, STAGGER))
            lost += 1
        now += left
        end = max(end, now)
        heapq.heappush(free, (now, node))
    return end, lost


def plan(found: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """Return hours and money of each way to build, by simulation, and what each stage holds."""
    rates, total = found["mb_per_s_core"], given.terabytes * 1e6
    mean = given.document_bytes or found["bytes_per_document"]
    documents = total * 1e6 / mean
    memory = documents * found["bytes_of_memory_per_document"] / 1e9
    # a third of a machine's memory is for encoding and reading
    needed = math.ceil(memory / (given.memory_gb * 2 / 3))
    shards_gb = total / 1e3 / found["bytes_per_token"] * given.token_bytes
    result: dict[str, Any] = {
        "documents": documents, "hashes_gb": memory, "fewest_parts": needed,
        "input_gb": total / 1e3, "staged_gb": total / 1e3 * found["staged_bytes_per_byte"],
        "shards_gb": shards_gb,
        "storage_per_month": (total / 1e3 + shards_gb) * given.gb_month, "ways": {},
    }  # fmt: skip

    def build_s(read_mb: float, own_mb: float) -> float:
        """Seconds of a build: one process reads all and stages its own while all cores encode."""
        reading = read_mb / rates["filter"] + own_mb / rates["stage"]
        return max(reading, (reading + own_mb / rates["encode"]) / given.cores)

    ways = {"one build": (1, build_s(0, total))}
    for times in (1, 4):  # parts a machine: with more, a slow one holds the rest up less
        n = max(needed, times * given.machines)
        ways[f"{n} parts by hash"] = (n, build_s(total, total / n))
        ways[f"{n} parts by file"] = (n, build_s(0, total / n))
        routed = total / n / given.cores / rates["route"]
        ways[f"{n} parts routed"] = (n, build_s(0, total / n) + routed)
    for name, (n, each) in ways.items():
        runs, machines = [], min(n, given.machines)
        for seed in range(given.simulations):
            rng = np.random.default_rng(seed)
            again = CHECKPOINT_MB / rates["encode"] / given.cores + 30
            seconds, lost = simulate([each] * n, machines, given.losses, 300.0, again, rng)
            runs.append((seconds / 3600, lost))
        hours = sorted(h for h, _ in runs)
        result["ways"][name] = {
            "hours": hours[len(hours) // 2], "hours_p95": hours[int(0.95 * (len(hours) - 1))],
            "hours_without_trouble": each * math.ceil(n / machines) / 3600,
            "machines_lost": float(np.mean([lost for _, lost in runs])),
            "price": hours[len(hours) // 2] * machines * given.cores * given.price,
            "memory_gb_a_machine": memory / n + 0.5 * given.cores,
            "shuffled_tb": given.terabytes if "routed" in name else 0,
            "read_tb": given.terabytes * (n if "hash" in name else 2 if "routed" in name else 1),
        }  # fmt: skip
    return result


def main() -> None:
    """Measure, simulate and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--folder", action="append", required=True, help="folders of real text")
    add("--sizes", type=float, nargs="+", default=[20, 80, 300], help="MB of text")
    add("--vocabulary", type=int, default=4096)
    add("--near", action="store_true", help="also measure their removal")
    add("--terabytes", type=float, default=10)
    add("--document-bytes", type=float, help="mean of a document; measured by default")
    add("--token-bytes", type=int, default=2, help="4 above 65,536 tokens")
    add("--machines", type=int, default=64)
    add("--cores", type=int, default=2, help="of a machine")
    add("--memory-gb", type=float, default=8, help="of a machine")
    add("--price", type=float, default=0.04, help="of a core-hour")
    add("--gb-month", type=float, default=0.023, help="price of storage")
    add("--losses", type=float, default=0.02, help="of a machine, an hour")
    add("--simulations", type=int, default=200)
    add("--seed", type=int, default=0)
    add("--json", action="store_true")
    given = parser.parse_args()
    found = measure(given.folder, given.sizes, given.vocabulary, given.seed, given.near)
    result = {"measured": found, "plan": plan(found, given)}
    if given.json:
        print(json.dumps(result))
        return
    for row in found.pop("sizes"):
        rates = ", ".join(f"{k} {v:.1f}" for k, v in row["mb_per_s_core"].items())
        near = row.get("near_duplicates_bytes_per_document", math.nan)
        print(
            f"{row['megabytes']:.0f} MB, {row['documents']} documents: MB/s of a core: {rates}; "
            f"peak {row['peak_process_mb']:.0f} MB; near-duplicates {near:.0f} bytes a document"
        )
    for name, value in (*found.items(), *result["plan"].items()):
        if name == "ways":
            continue
        shown = {k: round(v, 2) for k, v in value.items()} if isinstance(value, dict) else value
        print(f"{name:34} {shown:,.2f}" if isinstance(shown, float) else f"{name:34} {shown}")
    for name, way in result["plan"]["ways"].items():
        print(f"{name:20} " + ", ".join(f"{k} {v:,.2f}" for k, v in way.items()))


if __name__ == "__main__":
    main()
