"""Stage 1, corpus: the tokenizer, trained on the corpus or given.

A trained one is a byte-level BPE, so every text can be encoded and comes back exactly. Domains
count about equally in its training whatever their sizes: each gives `balanced_texts`.
Training is deterministic. Documents are encoded with special tokens taken as plain text, so the
end-of-text token appears in a shard only where a document ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from rayx.errors import CorpusError

log = logging.getLogger(__name__)

EOS = "<|endoftext|>"
EOS_NAMES = (EOS, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<EOS>", "[EOS]")
MIN_VOCAB_SIZE = 260  # 256 bytes, end of text and a few merges
BALANCED_BYTES = 16_000_000  # per domain: BPE merges of a few thousand tokens settle well before
MAX_REPEATS = 4  # of a small domain, so that its own phrases do not become tokens


def balanced_texts(
    texts: dict[str, Callable[[], Iterable[str]]], num_bytes: dict[str, int]
) -> Iterator[str]:
    """Yield about the same bytes from each domain, for training a tokenizer.

    The share is the mean size of a domain, at most `BALANCED_BYTES`; a larger domain gives every
    n-th document, a smaller one all documents up to `MAX_REPEATS` times.

    Args:
        texts: For each domain a function that returns its documents in order.
        num_bytes: Size of each domain's text, bytes, > 0.
    """
    share = min(sum(num_bytes.values()) // len(num_bytes), BALANCED_BYTES)
    for domain, read in texts.items():
        repeats = min(MAX_REPEATS, max(1, round(share / num_bytes[domain])))
        kept = min(1.0, share / num_bytes[domain])
        for _ in range(repeats):
            for index, text in enumerate(read()):
                if int((index + 1) * kept) > int(index * kept):
                    yield text


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with one special token, `EOS`, of id 0.

    Args:
        texts: Documents.
        vocab_size: Tokens wanted, >= 260; fewer come out if the text has no more merges.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        log.warning(
            "the text gives a vocabulary of %d tokens, %d were asked for",
            tokenizer.get_vocab_size(), vocab_size,
        )  # fmt: skip
    return tokenizer


def load_tokenizer(reference: str) -> Tokenizer:
    """Load a tokenizers JSON file or, if there is no such file, a Hugging Face tokenizer.

    Raises:
        CorpusError: It cannot be read, or has no end-of-text token.
    """
    file = Path(reference).expanduser()
    try:
        if file.is_file():
            tokenizer = Tokenizer.from_file(str(file))
        elif file.suffix == ".json":
            raise CorpusError(f"Tokenizer file {reference!r} does not exist.")
        else:
            tokenizer = Tokenizer.from_pretrained(reference)
    except CorpusError:
        raise
    except Exception as error:  # tokenizers raises bare Exception for a file it cannot parse
        raise CorpusError(
            f"Tokenizer {reference!r} cannot be read ({error}); give a vocabulary size, a "
            "tokenizers JSON file or a Hugging Face name that is reachable from here."
        ) from error
    eos_id(tokenizer, reference)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def eos_id(tokenizer: Tokenizer, name: str = "") -> int:
    """Return the id of the end-of-text token.

    Raises:
        CorpusError: There is none under any of the usual names.
    """
    for token in EOS_NAMES:
        found = tokenizer.token_to_id(token)
        if found is not None:
            return found
    raise CorpusError(
        f"Tokenizer {name!r} has no end-of-text token; looked for {', '.join(EOS_NAMES)}. Add one "
        "with Tokenizer.add_special_tokens and save it again."
    )


def num_ids(tokenizer: Tokenizer) -> int:
    """Return the number of token ids that a model needs: the highest id and one."""
    return max(tokenizer.get_vocab().values()) + 1


def plain(tokenizer_json: str) -> Tokenizer:
    """Load a tokenizer so that special tokens inside a text are encoded as plain text."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_special_tokens = True  # is not kept in the JSON
    return tokenizer
