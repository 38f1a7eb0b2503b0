"""The mixture that a tokenizer was trained on comes back, and bad input is named."""

import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from rayx.cli.main import command_tree, main
from rayx.corpus import Source
from rayx.corpus.merges.files import read_merge_order
from rayx.corpus.merges.order import MergeOrder, numbered, word_counts
from rayx.corpus.merges.pair_counts import PairHistory
from rayx.corpus.merges.word_sample import read_samples
from rayx.corpus.tokenizer import train_tokenizer
from rayx.errors import CorpusError, FitError, RayxError, SpecError
from rayx.methods import tokenizer_mixture
from rayx.methods.merge_contest import Contest, least_violated
from rayx.methods.tokenizer_mixture import infer_mixture

LETTERS = {"alpha": "etaoinshrdlu", "beta": "aeioukmptlsw", "gamma": "xyz.=()_01se"}
MERGES = 100


def lexicon(name: str) -> list[str]:
    rng = random.Random(name)
    return ["".join(rng.choices(LETTERS[name], k=rng.randint(2, 9))) for _ in range(300)]


def text(name: str, words: int, seed: int) -> list[str]:
    """Documents of 50 words whose frequencies fall with the rank."""
    rng, known = random.Random(f"{name} {seed}"), lexicon(name)
    weights = [1 / (rank + 3) for rank in range(len(known))]
    return [" ".join(rng.choices(known, weights, k=50)) + "\n" for _ in range(words // 50)]


def write(folder: Path, name: str, documents: Sequence[str]) -> Source:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in documents), encoding="utf-8")
    return Source(path=str(file), domain=name)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    folder = tmp_path_factory.mktemp("samples")
    return {name: write(folder, name, text(name, 20_000, 1)) for name in LETTERS}


def planted(folder: Path, words: Mapping[str, int], merges: int = MERGES) -> tuple[Path, Any]:
    """A tokenizer trained on other documents, and the shares of bytes."""
    documents = {name: text(name, number, 2) for name, number in words.items()}
    file = folder / "tokenizer.json"
    train_tokenizer((t for ts in documents.values() for t in ts), 257 + merges).save(str(file))
    size = {name: sum(map(len, ts)) for name, ts in documents.items()}
    return file, {name: number / sum(size.values()) for name, number in size.items()}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    words = {"alpha": 24_000, "beta": 9_000, "gamma": 3_000}
    return planted(tmp_path_factory.mktemp("tokenizer"), words)


# --- counts of pairs ------------------------------------------------------------------------------


def brute_force(words: Counter[str], order: MergeOrder, merges: int) -> Counter[tuple[str, str]]:
    """Counts of all pairs after some merges, each word merged again from its symbols."""
    found: Counter[tuple[str, str]] = Counter()
    for word, count in words.items():
        symbols = order.symbols(word)
        for left, right, product in order.merges_T3[:merges]:
            merged: list[str] = []
            at = 0
            while at < len(symbols):
                if symbols[at : at + 2] == [order.tokens[left], order.tokens[right]]:
                    merged.append(order.tokens[product])
                    at += 2
                else:
                    merged.append(symbols[at])
                    at += 1
            symbols = merged
        for pair in zip(symbols, symbols[1:], strict=False):
            found[pair] += count
    return found


def check_counts(order: MergeOrder, words: Counter[str], every: int = 1) -> None:
    history = PairHistory.follow(order, list(words))
    counts_UK = history.counts(np.array(list(words.values()), float)[:, None])
    rows = np.unique(history.row_U)
    for merge in range(0, len(order), every):
        truth = brute_force(words, order, merge)
        left, right, _ = order.merges_T3[merge]
        own = history.count_before(counts_UK, history.own_T[[merge]], np.array([merge]))
        assert own[0, 0] == truth[order.tokens[left], order.tokens[right]]
        found = history.count_before(counts_UK, rows, np.full(len(rows), merge))[:, 0]
        assert sorted(found[found > 0]) == sorted(truth.values())
        assert (found >= 0).all()


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(st.text("aab", min_size=1, max_size=9), st.integers(1, 5), min_size=1),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=6, unique=True),
)
def test_incremental_counts_equal_brute_force(
    words: dict[str, int], chosen: list[tuple[int, int]]
) -> None:
    tokens, pairs = ["a", "b"], []
    for left, right in chosen:  # runs of one token, merges of merges, tokens made twice
        pairs.append((tokens[left % len(tokens)], tokens[right % len(tokens)]))
        tokens.append("".join(pairs[-1]))
    pairs = list(dict.fromkeys(pairs)) or [("a", "b")]
    found, merges_T3 = numbered(pairs)
    check_counts(MergeOrder(found, merges_T3, lambda text: [text]), Counter(words))


@pytest.mark.parametrize("marks", [{}, {"continuing_subword_prefix": "##"},
                                   {"end_of_word_suffix": "</w>"}])  # fmt: skip
def test_counts_of_a_trained_tokenizer_equal_brute_force(
    marks: dict[str, Any], tmp_path: Path
) -> None:
    trained = Tokenizer(models.BPE(**marks))
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=70, show_progress=False, **marks)
    documents = text("alpha", 200, 0)
    trained.train_from_iterator(documents, trainer)
    trained.save(str(tmp_path / "t.json"))
    order = read_merge_order(tmp_path / "t.json")
    words = word_counts(order, documents)
    check_counts(order, words, every=7)
    for merge in range(0, len(order), 9):  # the trainer took the highest
        left, right, _ = order.merges_T3[merge]
        truth = brute_force(words, order, merge)
        assert truth[order.tokens[left], order.tokens[right]] == max(truth.values())


# --- the linear program ---------------------------------------------------------------------------


def all_constraints(contest: Contest) -> tuple[np.ndarray, float]:
    """Shares and least sum of slacks by one program of every merge, pair and slack."""
    history, (T, K) = contest.history, contest.own_TK.shape
    rows = np.unique(history.row_U)
    R, scale = len(rows), contest.own_TK.sum() / K
    blocks = []
    for merge in range(T):
        rate_RK = history.count_before(contest.rate_UK, rows, np.full(R, merge))
        slack_t = np.zeros((R, T))
        slack_t[:, merge] = 1
        block = np.hstack([(contest.own_TK[merge] - rate_RK) / scale, slack_t, np.eye(R)])
        blocks.append(np.delete(block, history.own_T[merge], axis=0))
    solved = linprog(
        np.append(np.zeros(K), np.ones(T + R)), A_ub=-np.vstack(blocks),
        b_ub=np.zeros(sum(map(len, blocks))), method="highs",
        A_eq=np.append(np.ones(K), np.zeros(T + R))[None], b_eq=[1],
    )  # fmt: skip
    return solved.x[:K], solved.fun * scale


def test_lazy_program_equals_the_one_with_all_constraints(
    samples: dict[str, Source], tmp_path: Path
) -> None:
    small = [write(tmp_path, name, text(name, 1_500, 1)) for name in LETTERS]
    file, _ = planted(tmp_path, {"alpha": 1_500, "beta": 900, "gamma": 600}, merges=15)
    order = read_merge_order(file)
    sample = read_samples(order, small)
    contest = Contest.of(PairHistory.follow(order, sample.types), sample.rates())
    share_K, value, _ = least_violated(contest, np.full(3, 1 / 3), 1e-9)
    best_K, least = all_constraints(contest)
    np.testing.assert_allclose(value, least, rtol=1e-6)
    np.testing.assert_allclose(share_K, best_K, atol=2e-3)


# --- inference ------------------------------------------------------------------------------------


def test_planted_mixture_comes_back_with_intervals(
    samples: dict[str, Source], tokenizer: tuple[Path, dict[str, float]]
) -> None:
    file, truth = tokenizer
    found = infer_mixture(file, list(samples.values()), MERGES, bootstrap=10)
    assert sum(found.shares.values()) == pytest.approx(1)
    for name, share in truth.items():
        assert found.shares[name] == pytest.approx(share, abs=0.02), (found.shares, truth)
        low, high = found.intervals[name]
        assert 0 <= low <= found.shares[name] <= high <= 1 and high - low < 0.1
    assert found.unseen == 0 and found.violation < 0.05 and found.unchecked < MERGES / 10


def test_same_seed_same_answer(tokenizer: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    given = [write(tmp_path, name, text(name, 2_000, 1)) for name in LETTERS]
    one, two, other = (
        infer_mixture(tokenizer[0], given, 50, bootstrap=10, seed=seed) for seed in (0, 0, 1)
    )
    assert one == two and one.shares == other.shares and one.intervals != other.intervals


def test_text_that_trained_it_leaves_no_violation(tmp_path: Path) -> None:
    words = {"alpha": 4_000, "beta": 2_000}
    file, truth = planted(tmp_path, words)
    same = [write(tmp_path, name, text(name, number, 2)) for name, number in words.items()]
    found = infer_mixture(file, same, MERGES, bootstrap=0)
    assert found.violation < 1e-6 and not found.intervals
    assert found.shares["alpha"] == pytest.approx(truth["alpha"], abs=0.03)


def test_missing_category_is_told(
    samples: dict[str, Source], tokenizer: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    file, _ = planted(tmp_path, {"alpha": 6_000, "beta": 2_000, "gamma": 6_000})
    found = infer_mixture(file, [samples["alpha"], samples["beta"]], MERGES, bootstrap=0)
    assert found.unseen > 0.1
    assert any("categories are missing" in warning for warning in found.warnings)
    complete = infer_mixture(tokenizer[0], list(samples.values()), MERGES, bootstrap=0)
    assert not any("categories are missing" in warning for warning in complete.warnings)


def test_same_text_twice_is_told(
    samples: dict[str, Source], tokenizer: tuple[Path, dict[str, float]]
) -> None:
    twin = Source(path=samples["alpha"].path, domain="twin")
    given = [samples["alpha"], twin, samples["beta"], samples["gamma"]]
    found = infer_mixture(tokenizer[0], given, MERGES, bootstrap=10)
    assert any(re.match("alpha and twin are nearly the same .* only the sum", w)
               for w in found.warnings)  # fmt: skip
    low, high = found.intervals["twin"]
    assert high - low > 0.2  # its share is anybody's guess, and the interval says so
    truth = tokenizer[1]["alpha"]
    assert found.shares["alpha"] + found.shares["twin"] == pytest.approx(truth, abs=0.02)


def test_one_document_has_an_interval_of_its_parts(
    samples: dict[str, Source], tokenizer: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    one = write(tmp_path, "beta", ["".join(text("beta", 20_000, 3))])
    given = [samples["alpha"], one, samples["gamma"]]
    found = infer_mixture(tokenizer[0], given, MERGES, bootstrap=10)
    assert "beta is one document: its interval is only of that document's parts" in found.warnings
    assert found.documents["beta"] == 1 and found.intervals["beta"][0] < found.shares["beta"]


def test_more_merges_than_there_are_is_told(
    samples: dict[str, Source], tokenizer: tuple[Path, dict[str, float]]
) -> None:
    found = infer_mixture(tokenizer[0], list(samples.values()), 3000, bootstrap=0)
    assert f"3,000 merges were asked for, the tokenizer has {MERGES:,}" in found.warnings
    assert found.merges == MERGES


def test_rare_words_are_left_out_when_there_are_too_many(
    samples: dict[str, Source],
    tokenizer: tuple[Path, dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rayx.corpus.merges.word_sample.MOST_SYMBOLS", 3_000)
    found = infer_mixture(tokenizer[0], list(samples.values()), MERGES, bootstrap=0)
    assert re.search(r"word types, the rarest, are left out \([\d.]+% of", found.warnings[0])
    for name, share in tokenizer[1].items():
        assert found.shares[name] == pytest.approx(share, abs=0.04)


def test_samples_that_cannot_be_used_are_named(
    samples: dict[str, Source], tokenizer: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    file, alpha = tokenizer[0], samples["alpha"]

    def refused(error: type[RayxError], message: str, *given: Source, **options: Any) -> None:
        with pytest.raises(error, match=message):
            infer_mixture(file, list(given), **options)

    binary = tmp_path / "binary.txt"
    binary.write_bytes(bytes(range(256)) * 50)
    blank = write(tmp_path, "blank", [" ", "\n"])
    (tmp_path / "empty.jsonl").write_text("")
    empty = Source(path=str(tmp_path / "empty.jsonl"), domain="empty")
    as_text = Source(path=str(binary), domain="binary")
    refused(CorpusError, r"'binary' .* has no usable document; skipped: 1 \(binary file\)",
            alpha, as_text)  # fmt: skip
    refused(CorpusError, r"'blank' .* no usable document; skipped: 2 \(empty\)", alpha, blank)
    refused(CorpusError, "empty.jsonl' is empty", alpha, empty)
    refused(CorpusError, "Category 'alpha' is given twice", alpha, alpha)
    refused(SpecError, "two categories or more", alpha)
    refused(SpecError, "50 or more", alpha, blank, merges=3)
    refused(SpecError, "0, or 10 or more", alpha, blank, bootstrap=3)
    digits = [write(tmp_path, name, ["7" * 30]) for name in ("one", "two")]
    refused(FitError, "None of the 100 merges' pairs is in a sample", *digits)


# --- the command ----------------------------------------------------------------------------------


def command(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr("sys.argv", ["rayx", "corpus", "infer-mixture", *map(str, arguments)])
        main()
    return stopped.value.code if isinstance(stopped.value.code, int) else 0


def test_command_prints_a_table_or_json(
    samples: dict[str, Source],
    tokenizer: tuple[Path, dict[str, float]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [part for n, s in samples.items() for part in ("--sample", f"{n}={s.path}")]
    assert command(tokenizer[0], *given, "--merges", 50, "--bootstrap", 0, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["shares"]) == set(LETTERS) and found["merges"] == 50
    assert command(tokenizer[0], *given, "--merges", 50, "--bootstrap", 10) == 0
    shown = capsys.readouterr().out
    assert re.search(r"alpha +\d+\.\d% +\d+\.\d% to \d+\.\d%", shown)
    assert "50 of 100 merges, 0.0% of them in no sample" in shown


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ("alpha", "--sample 'alpha' is not category=path, e.g. code=data/code.jsonl."),
        ("=a.jsonl", "--sample '=a.jsonl' is not category=path"),
        ("a/b=a.jsonl", "cannot be a folder name"),
        ("alpha=none.jsonl", "'none.jsonl' does not exist"),
    ],
)
def test_command_names_bad_samples(
    sample: str, message: str, samples: dict[str, Source],
    tokenizer: tuple[Path, dict[str, float]], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    beta = f"beta={samples['beta'].path}"
    assert command(tokenizer[0], "--sample", sample, "--sample", beta) == 2
    assert message in capsys.readouterr().err.replace("\n", "")


def test_method_is_reached_from_the_command_tree() -> None:
    corpus = next(g for g in command_tree().registered_groups if g.name == "corpus")
    assert corpus.typer_instance is not None
    names = [c.name for c in corpus.typer_instance.registered_commands]
    assert "infer-mixture" in names and tokenizer_mixture.LEVEL == 0.9
