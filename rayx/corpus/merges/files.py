"""Stage 1, corpus: read the merge order of a tokenizer's file.

| file | order of training |
| --- | --- |
| tokenizers JSON of a BPE | the list of merges, if that can be it, else rebuilt from the ids |
| SentencePiece .model of a BPE | rebuilt from the ids of its pieces |
| tiktoken ranks (`base64 rank` lines) | rebuilt from the ranks |
| tekken.json | rebuilt from the ranks |

A SentencePiece vocabulary does not keep a cut into words; where no token crosses a kind of
boundary (white space, script, digits), the trainer is taken not to have crossed it.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from rayx.corpus.merges.order import MergeOrder, check_order, numbered, rebuilt
from rayx.errors import UNREADABLE, CorpusError, did_you_mean

_CASED = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "o200k": rf"[^\r\n\p{{L}}\p{{N}}]?[{_CASED}]*[{_LOWER}]+{_SHORT}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_CASED}]+[{_LOWER}]*{_SHORT}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
PATTERN_UP_TO = {"gpt2": 60_000, "cl100k": 150_000, "o200k": 10**9}  # ranks
KINDS = "a tokenizers JSON, a SentencePiece .model, a tiktoken rank file or a tekken.json"
SPACE = "\u2581"
NORMAL, SPM_BPE = 1, 2  # a piece's type and the model's, in SentencePiece


def read_merge_order(
    file: str | Path, merges: int | None = None, pattern: str | None = None
) -> MergeOrder:
    """Read the order in which a tokenizer's merges were learnt.

    Args:
        file: A file of one of the kinds above, or a folder with tokenizer.json, tekken.json or
            tokenizer.model in it.
        merges: How many are wanted, None for all; rebuilding takes time for each.
        pattern: For a rank file, which does not hold it: the regular expression that cuts text
            into words, or one of PATTERNS; None takes it from the number of ranks.

    Raises:
        CorpusError: The file cannot be read, or its tokenizer is no BPE or has no merges.
    """
    path = Path(file).expanduser()
    if path.is_dir():
        names = ("tokenizer.json", "tekken.json", "tokenizer.model")
        inside = [path / name for name in names if (path / name).is_file()]
        if not inside:
            raise CorpusError(f"Folder {str(path)!r} has none of {', '.join(names)}.")
        path = inside[0]
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        near = [f.name for f in path.parent.iterdir()] if path.parent.is_dir() else []
        raise CorpusError(f"Tokenizer file {str(path)!r} does not exist; give {KINDS}."
                          + did_you_mean(path.name, near)) from None  # fmt: skip
    except OSError as error:
        raise CorpusError(f"Tokenizer file {str(path)!r} cannot be read: {error}") from error
    order = _parsed(path, data, merges, pattern)
    if not len(order):
        raise CorpusError(f"Tokenizer {str(path)!r} has no merges, so nothing tells its text.")
    return order


def _parsed(path: Path, data: bytes, merges: int | None, pattern: str | None) -> MergeOrder:
    name = str(path)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return _sentencepiece(name, data, merges)  # its scores are floats, never UTF-8
    if text.lstrip()[:1] not in ("{", "["):
        return _rank_file(name, text, merges, pattern)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"Tokenizer {name!r} is not JSON: {error}") from None
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        return _tokenizers_json(name, text, content, merges)
    if isinstance(content, dict) and isinstance(content.get("vocab"), list):
        return _tekken(name, content, merges, pattern)
    keys = ", ".join(list(content)[:5]) if isinstance(content, dict) else type(content).__name__
    raise CorpusError(f"{name!r} is JSON of something else ({keys}); give {KINDS}.")


def _tokenizers_json(name: str, text: str, content: Any, merges: int | None) -> MergeOrder:
    model = content["model"]
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind != "BPE":
        raise CorpusError(f"Tokenizer {name!r} is a {kind}, which is not trained by merges; the "
                          "order of merges is what tells the mixture. Give a BPE.")  # fmt: skip
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises bare Exception for what it cannot parse
        raise CorpusError(f"Tokenizer {name!r} cannot be read: {error}") from None
    split = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
    listed = [(str(left), str(right)) for left, right in split]
    prefix = model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""
    ids: dict[str, int] = model["vocab"]
    possible, warnings = check_order(listed, ids, prefix)
    pairs = listed[:merges]
    if not possible:
        special = {t["content"] for t in content.get("added_tokens") or []}
        made = sorted((t for t in ids if not _is_byte(t) and t not in special), key=ids.__getitem__)
        pairs, notes = rebuilt(made, merges, prefix, suffix)
        warnings = [*warnings, "the order was rebuilt from the ids", *notes]
    tokens, merges_T3 = numbered(pairs, prefix)
    before, cut = tokenizer.normalizer, tokenizer.pre_tokenizer
    if cut is None:
        words = _sentence_words(list(ids), before)
    else:
        words = _cut_words(cut, before)
    return MergeOrder(tokens, merges_T3, words, prefix, suffix, len(listed), tuple(warnings))


def _is_byte(token: str) -> bool:
    return re.fullmatch(r"<0x[0-9A-F]{2}>", token) is not None


def _cut_words(cut: Any, before: Any = None) -> Callable[[str], list[str]]:
    def words(text: str) -> list[str]:
        text = before.normalize_str(text) if before is not None else text
        return [word for word, _ in cut.pre_tokenize_str(text)]

    return words


def _at_spaces(word: str) -> list[str]:
    return re.findall(" +(?= [^ ])| ?[^ ]+| +", word)


def _at_scripts(word: str) -> list[str]:
    body = word.lstrip(" ")  # a space belongs to any script, and this splitter drops it
    parts = [part for part, _ in pre_tokenizers.UnicodeScripts().pre_tokenize_str(body)]
    return [word[: len(word) - len(body)] + "".join(parts[:1]), *parts[1:]]


def _at_digits(word: str) -> list[str]:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return [part for part, _ in digits.pre_tokenize_str(word)]


def _sentence_words(vocabulary: Iterable[str], before: Any) -> Callable[[str], list[str]]:
    """Cut lines at the boundaries of SentencePiece's trainer that no token of a vocabulary crosses.

    While they are cut, a space stands for SentencePiece's mark of one.
    """
    tokens = [token.replace(SPACE, " ") for token in vocabulary if len(token) > 1]
    tokens = [t for t in tokens if not re.fullmatch(r"[<\[].*[>\]]", t)]  # bytes, special tokens
    # a boundary may be crossed by one token in a thousand, which was put in by hand
    kept = [cut for cut in (_at_spaces, _at_scripts, _at_digits)
            if sum(len(cut(token)) > 1 for token in tokens) <= len(tokens) / 1000]  # fmt: skip
    seen: dict[str, list[str]] = {}

    def cut(word: str) -> list[str]:
        if word not in seen:
            parts = [word]
            for each in kept:
                parts = [piece for part in parts for piece in each(part)]
            seen[word] = [part.replace(" ", SPACE) for part in parts]
        return seen[word]

    def words(text: str) -> list[str]:
        found = []
        for line in text.splitlines():
            line = before.normalize_str(line) if before is not None else line
            line = line.replace(SPACE, " ")
            for word in _at_spaces(line) if _at_spaces in kept else [line]:
                found += cut(word)
        return found

    return words


def _sentencepiece(name: str, data: bytes, merges: int | None) -> MergeOrder:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        model.ParseFromString(data)
    except (DecodeError, RuntimeError):
        model.Clear()
    if not model.pieces:
        raise CorpusError(f"Tokenizer file {name!r} is binary and no SentencePiece model; give "
                          f"{KINDS}.")  # fmt: skip
    if model.trainer_spec.model_type != SPM_BPE:
        kinds = {1: "unigram", 3: "word", 4: "char"}
        kind = kinds.get(model.trainer_spec.model_type, "unknown")
        raise CorpusError(f"Tokenizer {name!r} is a SentencePiece {kind} model, which is not "
                          "trained by merges; the order of merges is what tells the mixture. Give "
                          "a BPE.")  # fmt: skip
    pieces = [piece.piece for piece in model.pieces if piece.type == NORMAL]
    pairs, warnings = rebuilt(pieces, merges)
    spec = model.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    tokens, merges_T3 = numbered(pairs)
    words = _sentence_words(pieces, normalizers.Sequence(steps))
    listed = sum(len(piece) > 1 for piece in pieces)
    return MergeOrder(tokens, merges_T3, words, listed=listed, warnings=tuple(warnings))


def _rank_file(name: str, text: str, merges: int | None, pattern: str | None) -> MergeOrder:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            token = base64.b64decode(token, validate=True)
            if not token or int(rank) < 0 or token in ranks:
                raise ValueError
            ranks[token] = int(rank)
        except (ValueError, binascii.Error):
            raise CorpusError(
                f"Rank file {name!r}, line {number}: {line[:60]!r} is not a token in base64 and "
                "its rank, each token once. Was the file cut or edited? Fetch it again."
            ) from None
    notes = []
    if pattern is None:
        pattern = next(p for p, most in PATTERN_UP_TO.items() if len(ranks) <= most)
        notes = [f"a rank file does not say how text is cut into words: the pattern {pattern} was "
                 f"taken for {len(ranks):,} ranks; name another with --pattern"]  # fmt: skip
    return _from_ranks(name, ranks, merges, pattern, notes)


def _tekken(name: str, content: Any, merges: int | None, pattern: str | None) -> MergeOrder:
    try:
        entries = content["vocab"]
        ranks = {base64.b64decode(entry["token_bytes"]): int(entry["rank"]) for entry in entries}
        pattern = pattern or str(content["config"]["pattern"])
    except UNREADABLE as error:
        raise CorpusError(f"{name!r} has a list `vocab` but is no tekken.json ({error!r}); give "
                          f"{KINDS}.") from None  # fmt: skip
    return _from_ranks(name, ranks, merges, pattern, [])


def _from_ranks(
    name: str, ranks: dict[bytes, int], merges: int | None, pattern: str, notes: list[str]
) -> MergeOrder:
    if len(set(ranks.values())) < len(ranks):
        raise CorpusError(f"Ranks of {name!r} are not different: two tokens have the same one, so "
                          "there is no order of training.")  # fmt: skip
    character = byte_characters()
    by_rank = sorted(ranks, key=ranks.__getitem__)
    tokens = ["".join(character[b] for b in token) for token in by_rank]
    pairs, warnings = rebuilt(tokens, merges)
    try:
        split = pre_tokenizers.Split(Regex(PATTERNS.get(pattern, pattern)), "isolated")
    except Exception as error:  # tokenizers raises bare Exception
        raise CorpusError(f"Pattern {pattern!r} of {name!r} is neither one of "
                          f"{', '.join(PATTERNS)} nor a regular expression: {error}"
                          ) from None  # fmt: skip
    cut = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    listed = sum(len(token) > 1 for token in tokens)
    numbered_tokens, merges_T3 = numbered(pairs)
    return MergeOrder(numbered_tokens, merges_T3, _cut_words(cut), listed=listed,
                      warnings=(*notes, *warnings))  # fmt: skip


def byte_characters() -> list[str]:
    """Return the character that stands for each byte in a byte-level BPE.

    Printable characters of Latin-1 stand for themselves, the others, in order, for 256 and on.
    """
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]
