"""Do raters tell good text from bad?

    python experiments/bench/raters.py [--text data/sample-text] [--model FOLDER] [--documents 50]

Held-out AUC (1 is perfect, .5 is chance) of telling real text from worse text:
- a classifier, trained on --examples labelled examples (half of them good), judged on documents of
  other groups: encyclopedia and documentation against the same kind of text with its words
  shuffled, with letters swapped in a tenth of its words, and against code and legal text; beside
  its own cross-validated AUC, which is what a user sees.
- with --model (a folder of a Hugging Face causal language model): its perplexity, and its answer to
  a rating prompt (--prompt FILE), on --documents documents and the same ones with words shuffled
  (and, for perplexity, with letters swapped). Rated are a document's first --tokens tokens.

Each with --seeds seeds, which draw documents and shuffles; of the language model, whose ratings are
the same each time, the first seed alone. The text is that of the sample corpus
(`rayx corpus sample` keeps it beside the corpus).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from rayx.corpus.labels.classifier import train_classifier
from rayx.corpus.labels.raters import Rater

PROSE, OTHER = ("wiki", "docs"), ("code", "legal")
PROMPT = """<|im_start|>user
Is the following text fluent English (5) or words in random order (1)?

{text}

Answer with a number from 1 to 5.<|im_end|>
<|im_start|>assistant
The answer is """
FIRST_CHARACTERS = 3_000  # of a document, good or bad, so that length tells nothing
LEAST_CHARACTERS = 400


def shuffled(text: str, rng: random.Random) -> str:
    """Return the text with its words in another order."""
    words = text.split()
    rng.shuffle(words)
    return " ".join(words)


def swapped(text: str, rng: random.Random, share: float = 0.1) -> str:
    """Return the text with two neighbouring letters swapped in a share of its words."""
    words = text.split(" ")
    for place, word in enumerate(words):
        if len(word) > 3 and rng.random() < share:
            i = rng.randrange(len(word) - 1)
            words[place] = word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    return " ".join(words)


def read(folder: Path, domains: Sequence[str]) -> list[tuple[str, str]]:
    """Return (group, text) of documents that are long enough."""
    found = []
    for domain in domains:
        for line in open(folder / f"{domain}.jsonl", encoding="utf-8"):
            row = json.loads(line)
            if len(row["text"]) >= LEAST_CHARACTERS:
                text = " ".join(row["text"].split())  # as shuffled text has it
                found.append((f"{domain} {row.get('group')}", text[:FIRST_CHARACTERS]))
    return found


def auc(good: Sequence[Any], bad: Sequence[Any]) -> float:
    """Return the share of pairs in which the good one is rated higher; ties count half."""
    wins = sum((g > b) + 0.5 * (g == b) for g in good for b in bad)
    return wins / (len(good) * len(bad))


def ratings(rater: Rater, texts: Sequence[str]) -> list[Any]:
    """Return what a rater says of texts."""
    return list(rater.rate(pa.table({"text": list(texts)})))


def classifier(
    folder: Path, damage: Callable[[str, random.Random], str] | None, examples: int, seed: int
) -> dict[str, float]:
    """Train on half of the groups and judge on the other half."""
    rng = random.Random(f"raters {seed}")
    prose = read(folder, PROSE)
    worse = read(folder, OTHER) if damage is None else prose
    groups = sorted({group for group, _ in prose + worse})
    rng.shuffle(groups)
    unseen = set(groups[: len(groups) // 2])
    rng.shuffle(prose)
    # A document is good or bad, never both: else the same words would be of either class.
    half = len(prose) // 2
    good, bad = (prose[:half], prose[half:]) if damage else (prose, worse)
    rng.shuffle(bad)
    bad = [(group, damage(text, rng) if damage else text) for group, text in bad]
    seen = [[t for g, t in rows if g not in unseen][: examples // 2] for rows in (good, bad)]
    held = [[t for g, t in rows if g in unseen] for rows in (good, bad)]
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "examples.jsonl"
        labelled = zip(("good", "bad"), seen, strict=True)
        rows = [{"text": text, "label": label} for label, texts in labelled for text in texts]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        rater = train_classifier("quality", file, of="good", seed=seed)
    began = time.process_time()
    scores = [ratings(rater, texts) for texts in held]
    seconds = time.process_time() - began
    num_bytes = sum(len(t.encode()) for texts in held for t in texts)
    return {
        "examples": len(rows), "heldout": sum(map(len, held)), "auc": auc(*scores),
        "cross_validated_auc": rater.validation.auc, "mb_per_s": num_bytes / 1e6 / seconds,
    }  # fmt: skip


def language_model(
    folder: Path, model: str, prompt: str, documents: int, tokens: int, seed: int
) -> dict[str, Any]:
    """Rate documents and what was made worse of them by perplexity and by a prompt."""
    from rayx.proxy.rating import PerplexityRater, PromptRater

    rng = random.Random(f"raters {seed}")
    prose = [text for _, text in read(folder, PROSE)]
    rng.shuffle(prose)
    good = prose[:documents]
    worse = {
        "shuffled": [shuffled(t, rng) for t in good],
        "swapped": [swapped(t, rng) for t in good],
    }
    result: dict[str, Any] = {"documents": documents, "tokens": tokens}
    raters = (
        ("perplexity", -1, PerplexityRater("bpb", model, tokens), ("shuffled", "swapped")),
        ("prompt", 1, PromptRater("rating", model, prompt, tokens=tokens), ("shuffled",)),
    )
    for name, sign, rater, damages in raters:
        began = time.perf_counter()
        real = ratings(rater, good)
        result[f"{name}_real"] = statistics.mean(real)
        for damage in damages:
            bad = ratings(rater, worse[damage])
            right = sum(sign * r > sign * b for r, b in zip(real, bad, strict=True))
            result |= {
                f"{name}_{damage}": statistics.mean(bad),
                f"{name}_auc_{damage}": auc([sign * v for v in real], [sign * v for v in bad]),
                f"{name}_pairs_right_{damage}": right / documents,
            }  # fmt: skip
        seconds = time.perf_counter() - began
        result[f"{name}_documents_per_s"] = (1 + len(damages)) * documents / seconds
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", default="data/sample-text", help="JSONL files by domain")
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", help="folder of a Hugging Face causal language model")
    parser.add_argument("--prompt", help="file with {text}; by default one for chat models")
    parser.add_argument("--documents", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--only-model", action="store_true", help="leave the classifiers out")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    folder = Path(given.text)
    result: dict[str, Any] = {}
    tasks = (("shuffled words", shuffled), ("swapped letters", swapped), ("code and legal", None))
    for name, damage in () if given.only_model else tasks:
        runs = [classifier(folder, damage, given.examples, seed) for seed in range(given.seeds)]
        result[f"classifier, {name}"] = {key: [run[key] for run in runs] for key in runs[0]}
    if given.model:
        prompt = Path(given.prompt).read_text(encoding="utf-8") if given.prompt else PROMPT
        result["language model"] = language_model(
            folder, given.model, prompt, given.documents, given.tokens, seed=0
        )
    if given.json:
        print(json.dumps(result))
        return
    for name, facts in result.items():
        print(name)
        for key, value in facts.items():
            values = value if isinstance(value, list) else [value]
            print(f"  {key:32}", *(f"{v:.4g}" for v in values))


if __name__ == "__main__":
    main()
