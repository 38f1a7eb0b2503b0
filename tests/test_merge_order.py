"""Every kind of tokenizer file gives the order in which its merges were learnt, or is refused."""

import base64
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from rayx.corpus.merges.files import byte_characters, read_merge_order
from rayx.corpus.merges.order import MergeOrder, word_counts
from rayx.corpus.tokenizer import train_tokenizer
from rayx.errors import CorpusError

MERGES = 60
rng = random.Random(0)
LEXICON = ["".join(rng.choices("etaoinshr", k=rng.randint(2, 7))) for _ in range(80)]
TEXTS = [" ".join(rng.choices(LEXICON, range(80, 0, -1), k=60)) + " 12\n" for _ in range(40)]


def pairs(order: MergeOrder) -> list[tuple[str, str]]:
    return [(order.tokens[a], order.tokens[b]) for a, b, _ in order.merges_T3]


def contents(tokenizer: Tokenizer) -> dict[str, Any]:
    return json.loads(tokenizer.to_str())


def listed(content: dict[str, Any]) -> list[tuple[str, str]]:
    return [(a, b) for a, b in content["model"]["merges"]]


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    return contents(train_tokenizer(TEXTS, 257 + MERGES))


def write(folder: Path, content: Any, name: str = "tokenizer.json") -> Path:
    file = folder / name
    text = content if isinstance(content, str) else json.dumps(content)
    file.write_text(text, encoding="utf-8")
    return file


def ranks(content: dict[str, Any]) -> list[bytes]:
    """The bytes of a tokenizer's tokens by rank: all bytes, then products in order."""
    of = {character: byte for byte, character in enumerate(byte_characters())}
    made = [a + b for a, b in listed(content)]
    return [bytes([b]) for b in range(256)] + [bytes(of[c] for c in token) for token in made]


def rank_lines(tokens: list[bytes]) -> str:
    return "".join(f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(tokens))


def test_json_ranks_and_tekken_give_one_order(content: dict[str, Any], tmp_path: Path) -> None:
    truth = listed(content)
    order = read_merge_order(write(tmp_path, content))
    assert pairs(order) == truth and order.warnings == () and order.listed == MERGES
    tokens = ranks(content)
    by_rank = read_merge_order(write(tmp_path, rank_lines(tokens), "x.tiktoken"), pattern="gpt2")
    assert pairs(by_rank) == truth and by_rank.warnings == ()
    vocab = [{"rank": r, "token_bytes": base64.b64encode(t).decode(), "token_str": None}
             for r, t in enumerate(tokens)]  # fmt: skip
    tekken = {"config": {"pattern": r" ?\p{L}+| ?\p{N}+|\s+"}, "vocab": vocab}
    assert pairs(read_merge_order(write(tmp_path, tekken, "tekken.json"), 20)) == truth[:20]
    assert word_counts(by_rank, TEXTS) == word_counts(order, TEXTS)
    assert pairs(read_merge_order(tmp_path)) == truth  # the folder's tokenizer.json


def test_rank_file_says_which_pattern_was_taken(content: dict[str, Any], tmp_path: Path) -> None:
    order = read_merge_order(write(tmp_path, rank_lines(ranks(content)), "x.tiktoken"))
    assert "the pattern gpt2 was taken for 316 ranks" in order.warnings[0]


def test_list_with_every_split_of_every_token_is_rebuilt(
    content: dict[str, Any], tmp_path: Path
) -> None:
    vocab, truth = content["model"]["vocab"], listed(content)
    every = [[token[:cut], token[cut:]] for token in (a + b for a, b in truth)
             for cut in range(1, len(token))
             if token[:cut] in vocab and token[cut:] in vocab]  # fmt: skip
    full = content | {"model": content["model"] | {"merges": every}}
    order = read_merge_order(write(tmp_path, full))
    assert len(every) > MERGES and pairs(order) == truth and order.listed == len(every)
    assert f"{len(every)} merges are listed for {MERGES} tokens" in order.warnings[0]
    assert "the order was rebuilt from the ids" in order.warnings


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (lambda merges: merges[::-1], "use a token that only a later merge makes"),
        (lambda merges: merges + merges[:9], "9 of 69 listed merges are listed twice"),
    ],
)
def test_impossible_order_is_rebuilt_with_a_warning(
    content: dict[str, Any], tmp_path: Path, change: Any, warning: str
) -> None:
    model = content["model"] | {"merges": change(content["model"]["merges"])}
    order = read_merge_order(write(tmp_path, content | {"model": model}))
    assert pairs(order) == listed(content) and warning in order.warnings[0]


def test_ids_that_fall_are_said(content: dict[str, Any], tmp_path: Path) -> None:
    vocab = {token: 1000 - number for token, number in content["model"]["vocab"].items()}
    shuffled = content | {"model": content["model"] | {"vocab": vocab}, "added_tokens": []}
    order = read_merge_order(write(tmp_path, shuffled))
    assert pairs(order) == listed(content) and "ids of tokens do not rise" in order.warnings[0]


@pytest.mark.parametrize("marks", [{"continuing_subword_prefix": "##"},
                                   {"end_of_word_suffix": "</w>"}])  # fmt: skip
def test_marked_symbols_are_read_and_rebuilt(marks: dict[str, str], tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE(**marks))  # type: ignore[arg-type]
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=90, show_progress=False, **marks)
    tokenizer.train_from_iterator(TEXTS, trainer)
    found = contents(tokenizer)
    order = read_merge_order(write(tmp_path, found))
    assert pairs(order) == listed(found)
    assert all(symbol in found["model"]["vocab"] for symbol in order.symbols("tea"))
    doubled = found["model"] | {"merges": found["model"]["merges"] * 2}
    assert pairs(read_merge_order(write(tmp_path, found | {"model": doubled}))) == listed(found)


def byte_fallback() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    steps: list[Any] = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    special = ["<unk>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=340, show_progress=False, special_tokens=special)
    words = (word for text in TEXTS for word in text.split())
    tokenizer.train_from_iterator(words, trainer)
    return tokenizer


def test_byte_fallback_works_and_words_begin_at_spaces(tmp_path: Path) -> None:
    tokenizer = byte_fallback()
    order = read_merge_order(write(tmp_path, contents(tokenizer)))
    assert pairs(order) == listed(contents(tokenizer))
    assert list(order.words("tea isé\nshe")) == ["▁tea", "▁isé", "▁she"]


def sentencepiece_model(kind: str, **options: Any) -> bytes:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, model_type=kind, vocab_size=70,
        minloglevel=2, hard_vocab_limit=False, **options,
    )  # fmt: skip
    return model.getvalue()


def test_sentencepiece_bpe_and_its_words(tmp_path: Path) -> None:
    file = tmp_path / "some.model"
    file.write_bytes(sentencepiece_model("bpe", split_digits=True))
    order = read_merge_order(file)
    assert len(order) > 20 and not order.warnings
    assert list(order.words("tea  is 12\nshe")) == ["▁tea", "▁is", "▁", "1", "2", "▁she"]
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())
    made = [model.id_to_piece(i) for i in range(3, model.get_piece_size())]
    assert [order.tokens[p] for _, _, p in order.merges_T3] == [t for t in made if len(t) > 1]


def test_sentencepiece_unigram_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "some.model"
    file.write_bytes(sentencepiece_model("unigram"))
    with pytest.raises(CorpusError, match="SentencePiece unigram model, which is not trained by"):
        read_merge_order(file)


def bad(kind: str, content: dict[str, Any], folder: Path) -> Path:
    tokens = ranks(content)
    if kind == "binary":
        (folder / "t.model").write_bytes(bytes(range(128, 256)) * 40)
        return folder / "t.model"
    if kind == "missing":
        write(folder, content)
        return folder / "tokeniser.json"
    texts: dict[str, Any] = {
        "unigram": contents(Tokenizer(models.Unigram([("a", -1.0)], unk_id=0))),
        "wordpiece": contents(Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))),
        "no merges": contents(Tokenizer(models.BPE({"a": 0}, []))),
        "something else": {"name": "rayx", "version": 1},
        "a list": [1, 2],
        "not JSON": "{]",
        "broken BPE": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}},
        "broken tekken": {"config": {}, "vocab": [{"rank": 0}]},
        "broken line": rank_lines(tokens[:300]) + "IGE= x\n",
        "half a token": rank_lines(tokens[:300]) + "IGE 300\n",
        "token twice": rank_lines([*tokens[:300], tokens[299]]),
        "rank twice": rank_lines(tokens[:300]) + "ICAgICAgIA== 299\n",
        "shuffled ranks": rank_lines(tokens[:256] + tokens[:255:-1]),
        "prose": "It was a dark night.\n",
    }
    return write(folder, texts[kind], "t.json")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("unigram", "is a Unigram, which is not trained by merges"),
        ("wordpiece", "is a WordPiece, which is not trained by merges"),
        ("no merges", "has no merges, so nothing tells its text"),
        ("something else", "JSON of something else .name, version.; give a tokenizers JSON"),
        ("a list", "JSON of something else .list."),
        ("not JSON", "is not JSON"),
        ("broken BPE", "cannot be read"),
        ("broken tekken", "has a list `vocab` but is no tekken.json"),
        ("broken line", "line 301: 'IGE= x' is not a token in base64 and its rank"),
        ("half a token", "line 301: 'IGE 300' is not a token in base64"),
        ("token twice", "line 301: .* each token once"),
        ("rank twice", "two tokens have the same one"),
        ("shuffled ranks", "ids are not the order of training"),
        ("prose", "line 1: 'It was a dark night.' is not a token in base64"),
        ("binary", "is binary and no SentencePiece model"),
        ("missing", "does not exist; .* Did you mean 'tokenizer.json'"),
    ],
)
def test_bad_tokenizer_files_are_named(
    kind: str, message: str, content: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(CorpusError, match=message):
        read_merge_order(bad(kind, content, tmp_path))


def test_bad_pattern_and_empty_folder_are_named(content: dict[str, Any], tmp_path: Path) -> None:
    file = write(tmp_path, rank_lines(ranks(content)), "x.tiktoken")
    with pytest.raises(CorpusError, match="neither one of gpt2, cl100k, o200k nor a regular"):
        read_merge_order(file, pattern="(")
    with pytest.raises(CorpusError, match="has none of tokenizer.json"):
        read_merge_order(tmp_path)
