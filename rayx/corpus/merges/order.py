"""Stage 1, corpus: in which order a tokenizer's merges were learnt, and the words it saw.

A byte-pair encoding is trained by merging the most frequent pair, again and again, so its list of
merges is a record of its training text. Files keep that record in different ways; `MergeOrder` is
what they have in common: symbols, merges in the order of training, and the cut of a text into
words, over which no pair is ever counted. `rayx.corpus.merges.files` reads files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from rayx.errors import CorpusError

MOST_REPEATED = 0.01  # of merges that make a token again: training itself makes some
MOST_UNREACHABLE = 0.05  # of tokens that no two earlier tokens make

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class MergeOrder:
    """A tokenizer's merges in the order of training.

    Attributes:
        tokens: Token of each id of this object, symbols and products; symbols that are in no merge
            are not among them.
        merges_T3: Ids of left part, right part and product of each merge, (T, 3) int64.
        words: Cuts a text into words, strings of symbols.
        prefix: Put before a symbol that does not begin a word.
        suffix: Put after a symbol that ends a word.
        listed: Merges that the file lists, >= T.
        warnings: What speaks against this being the order of training.
    """

    tokens: tuple[str, ...]
    merges_T3: np.ndarray
    words: Callable[[str], Iterable[str]] = field(repr=False)
    prefix: str = ""
    suffix: str = ""
    listed: int = 0
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.merges_T3)

    def symbols(self, word: str) -> list[str]:
        """Return the symbols of a word, from which the merges start."""
        return symbols_of(word, self.prefix, self.suffix)


def symbols_of(word: str, prefix: str = "", suffix: str = "") -> list[str]:
    """Return a word's characters, marked where a tokenizer marks the inside and end of a word."""
    found = list(word)
    if prefix:
        found[1:] = [prefix + symbol for symbol in found[1:]]
    if suffix and found:
        found[-1] += suffix
    return found


def numbered(pairs: Sequence[Pair], prefix: str = "") -> tuple[tuple[str, ...], np.ndarray]:
    """Return tokens and merges (T, 3) of pairs of strings in order."""
    ids: dict[str, int] = {}
    merges = [
        [ids.setdefault(token, len(ids)) for token in (left, right, joined(left, right, prefix))]
        for left, right in pairs
    ]
    return tuple(ids), np.array(merges, np.int64).reshape(-1, 3)


def joined(left: str, right: str, prefix: str = "") -> str:
    """Return the token that two parts make."""
    return left + (right.removeprefix(prefix) if prefix else right)


def check_order(
    pairs: Sequence[Pair], ids: dict[str, int], prefix: str = ""
) -> tuple[bool, list[str]]:
    """Say whether a list of merges can be the order of training, and what speaks against it.

    It cannot where a merge uses a token that only a later one makes, where a pair is listed twice,
    or where more than MOST_REPEATED of the merges make a token that is already made.

    Args:
        pairs: Merges as the file lists them.
        ids: Token -> id.
        prefix: See `MergeOrder`.

    Returns:
        Whether it can be, and warnings.
    """
    products = [joined(left, right, prefix) for left, right in pairs]
    first: dict[str, int] = {}
    for step, token in enumerate(products):
        first.setdefault(token, step)
    early = sum(any(first.get(part, -1) >= step for part in pair)
                for step, pair in enumerate(pairs))  # fmt: skip
    twice = len(pairs) - len(set(pairs))
    again = len(pairs) - len(first)
    warnings = []
    if early:
        warnings.append(f"{early:,} of {len(pairs):,} listed merges use a token that only a later "
                        "merge makes")  # fmt: skip
    if twice:
        warnings.append(f"{twice:,} of {len(pairs):,} listed merges are listed twice")
    elif again > MOST_REPEATED * len(pairs):
        warnings.append(f"{len(pairs):,} merges are listed for {len(first):,} tokens")
    possible = not warnings
    made = [ids[token] for token in first if token in ids]
    falls = sum(b < a for a, b in zip(made, made[1:], strict=False))
    if falls:
        warnings.append(f"ids of tokens do not rise with the merges that make them ({falls:,} "
                        f"times of {len(made):,})")  # fmt: skip
    return possible, warnings


def pairs_from_ranks(
    tokens: Iterable[str], prefix: str = "", suffix: str = ""
) -> Iterator[Pair | None]:
    """Rebuild the merge that made each token from the order of the tokens alone.

    A token's merge is what is left when the tokens before it have been merged in their order: two
    parts. None where that leaves another number, for a token that no merge made.

    Args:
        tokens: Tokens by rising rank.
        prefix: See `MergeOrder`.
        suffix: See `MergeOrder`.
    """
    rank: dict[str, int] = {}
    for token in tokens:
        inner = bool(prefix) and token.startswith(prefix)
        body = token.removeprefix(prefix) if inner else token
        ends = bool(suffix) and body.endswith(suffix) and body != suffix
        parts = symbols_of(body.removesuffix(suffix) if ends else body, prefix)
        if inner and parts:
            parts[0] = prefix + parts[0]
        if ends and parts:
            parts[-1] += suffix
        if len(parts) > 1:
            yield _last_pair(parts, rank, prefix)
        rank.setdefault(token, len(rank))


def _last_pair(parts: list[str], rank: dict[str, int], prefix: str) -> Pair | None:
    while len(parts) > 2:
        made = [rank.get(joined(a, b, prefix)) for a, b in zip(parts, parts[1:], strict=False)]
        known = [r for r in made if r is not None]
        if not known:
            return None
        at = made.index(min(known))
        parts = [*parts[:at], joined(parts[at], parts[at + 1], prefix), *parts[at + 2 :]]
    return (parts[0], parts[1])


def rebuilt(
    tokens: Iterable[str], merges: int | None, prefix: str = "", suffix: str = ""
) -> tuple[list[Pair], list[str]]:
    """Return the first `merges` pairs rebuilt from the order of tokens, and warnings.

    Raises:
        CorpusError: More than MOST_UNREACHABLE of the tokens cannot have been made by merges.
    """
    pairs: list[Pair] = []
    unreachable = 0
    for pair in pairs_from_ranks(tokens, prefix, suffix):
        unreachable += pair is None
        if pair is not None:
            pairs.append(pair)
        if merges is not None and len(pairs) == merges:
            break
    if unreachable > MOST_UNREACHABLE * (unreachable + len(pairs)):
        raise CorpusError(
            f"{unreachable:,} of {unreachable + len(pairs):,} tokens cannot be made from tokens "
            "before them, so ids are not the order of training. Give a file that lists the merges "
            "in their order."
        )
    note = f"{unreachable:,} tokens that no merge of earlier tokens makes are left out"
    return pairs, [note] if unreachable else []


def word_counts(order: MergeOrder, texts: Iterable[str]) -> Counter[str]:
    """Count the words of texts, as the tokenizer cuts them."""
    found: Counter[str] = Counter()
    for text in texts:
        found.update(order.words(text))
    return found
