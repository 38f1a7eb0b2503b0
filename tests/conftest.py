"""Fixtures that the whole suite shares: one Ray, one small real corpus."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from rayx.corpus import Corpus, Source, build_corpus

WORDS = {
    "code": "def return for in if else import self None True lambda yield class with as".split(),
    "law": "shall party agreement hereby licence term notice liability provided such any".split(),
    "news": "today minister said police market rose fell president city storm match won".split(),
}


def sentences(domain: str, count: int, seed: int) -> list[str]:
    """Return documents in which each word follows the last by a rule of its domain."""
    rng = random.Random(f"{domain} {seed}")
    words = WORDS[domain]
    documents = []
    for _ in range(count):
        place, text = rng.randrange(len(words)), []
        for _ in range(rng.randint(60, 120)):
            text.append(words[place])
            place = (place * 2 + rng.randint(0, 2)) % len(words)
        documents.append(" ".join(text))
    return documents


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory) -> Corpus:
    """Three domains of predictable text, vocabulary 300, about 40,000 tokens each."""
    folder = tmp_path_factory.mktemp("tiny")
    sources = []
    for number, domain in enumerate(WORDS):
        file = folder / f"{domain}.jsonl"
        rows = (json.dumps({"text": t}) for t in sentences(domain, 400 - 100 * number, 0))
        file.write_text("\n".join(rows))
        sources.append(Source(path=str(file), domain=domain))
    return build_corpus(sources, folder / "corpus", tokenizer=300, heldout_share=0.1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that use Ray share one process of `pytest -n`, and so one cluster; others are whole."""
    on_ray = {
        item.path
        for item in items
        if item.get_closest_marker("ray") or "ray_cluster" in getattr(item, "fixturenames", ())
    }
    for item in items:
        group = "ray" if item.path in on_ray else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def ray_cluster():
    """One local Ray of two CPUs for all tests that need one."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def reference() -> Path:
    """Published sweep results; tests that need them are skipped, with the reason, without them."""
    default = Path(__file__).parents[2] / "shared" / "reference"
    folder = Path(os.environ.get("RAYX_REFERENCE", default))
    if not folder.is_dir():
        pytest.skip(f"no reference data at {folder} (set RAYX_REFERENCE)")
    return folder
