"""Stage 1, corpus: a built corpus, as everything after it sees it.

A corpus is a folder: `manifest.json` (written last, so it exists only for a finished corpus),
`tokenizer.json` and `domains/<name>/{train,heldout}.bin`. Its fingerprint is a hash of tokenizer
and shards and does not depend on where or when it was built. One on an object store is used from
copies on this node, each shard fetched when it is first asked for.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import fs
from tokenizers import Tokenizer

from rayx.corpus.documents import UNKNOWN
from rayx.corpus.manifest import REBUILD, read_manifest
from rayx.corpus.tokenizer import plain
from rayx.corpus.transfer import fetch, read_chunks
from rayx.errors import CorpusError, did_you_mean
from rayx.mixture import Mixture
from rayx.remote import locate, reach
from rayx.selection import parse_selection


class _Supply(dict[str, int]):
    """Train tokens by domain; a selection's are worked out when asked for."""

    def __init__(self, corpus: Corpus) -> None:
        facts = corpus.manifest["domains"]
        super().__init__({d["name"]: d["train"]["tokens"] for d in facts if "train" in d})
        self._corpus = corpus

    def __missing__(self, name: str) -> int:
        selection = self._corpus.selection(name)
        if selection is None:
            raise KeyError(name)
        domain, share = selection
        return math.ceil(share * self[domain])


class Corpus:
    """Domains with their token shards, held-out sets, tokenizer and fingerprint.

    Tokens count the end-of-text token that closes each document; bytes are UTF-8 bytes of text.

    Args:
        url: Where the corpus lies; use `Corpus.load`.
        manifest: The parsed manifest.
    """

    def __init__(self, url: str, manifest: dict[str, Any]) -> None:
        self.url = url
        self.manifest = manifest
        self._domains: dict[str, dict[str, Any]] = {d["name"]: d for d in manifest["domains"]}

    @classmethod
    def load(cls, url: str | Path) -> Corpus:
        """Open a corpus and check that its files are there with the right sizes.

        Raises:
            CorpusError: There is no corpus, its format is another version's, or a file is
                missing or truncated.
        """
        url = str(url)
        filesystem, root = _open(url)
        # absolute, because a Ray worker that gets this object has another working directory
        corpus = cls(url if "://" in url else root, read_manifest(filesystem, root, url))
        files = [(name, size) for name, size, _ in corpus._files()]
        paths = [f"{root}/{name}" for name, _ in files]
        infos = reach(lambda: filesystem.get_file_info(paths), "look for the shards", url)
        for (name, size), info in zip(files, infos, strict=True):
            if info.type != fs.FileType.File:
                raise CorpusError(f"Corpus {url}: {name} is missing ({size} bytes). {REBUILD}")
            if info.size != size:
                raise CorpusError(
                    f"Corpus {url}: {name} has {info.size} bytes, expected {size}. {REBUILD}"
                )
        return corpus

    def __repr__(self) -> str:
        return f"Corpus({self.url!r}, {self.fingerprint}, {', '.join(self.targets)})"

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the content: tokenizer, domain names and shards."""
        return self.manifest["fingerprint"]

    @property
    def domain_fingerprints(self) -> dict[str, str]:
        """The same for each target alone."""
        return {name: d["fingerprint"] for name, d in self._domains.items()}

    @cached_property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains that a mixture can train on."""
        return tuple(n for n, d in self._domains.items() if not d["evaluation_only"])

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """Names with held-out tokens: the domains, then the evaluation-only ones."""
        return self.domains + tuple(n for n, d in self._domains.items() if d["evaluation_only"])

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.manifest["vocab_size"]

    @property
    def eos_id(self) -> int:
        """Id of the token that ends each document."""
        return self.manifest["eos_id"]

    @property
    def tokens(self) -> dict[str, int]:
        """Train tokens of each domain; `tokens["web@0.3"]` are those of a selection."""
        return _Supply(self)

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes of train text of each domain."""
        return {name: self._domains[name]["train"]["bytes"] for name in self.domains}

    @property
    def heldout_tokens(self) -> dict[str, int]:
        """Held-out tokens of each target."""
        return {name: self._domains[name]["heldout"]["tokens"] for name in self.targets}

    @property
    def heldout_bytes(self) -> dict[str, int]:
        """Bytes of held-out text of each target."""
        return {name: self._domains[name]["heldout"]["bytes"] for name in self.targets}

    def bytes_per_token(self, target: str) -> float:
        """Bytes of text per token of the held-out set: turns nats per token to bits per byte."""
        heldout = self._target(target)["heldout"]
        return heldout["bytes"] / heldout["tokens"]

    def proportional(self) -> dict[str, float]:
        """Weights of the domains by their train tokens; they sum to 1."""
        total = sum(self.tokens.values())
        return {name: tokens / total for name, tokens in self.tokens.items()}

    def selection(self, name: str) -> tuple[str, float] | None:
        """Return domain and share of a selection such as `web@0.3`; None if the name is none.

        Raises:
            CorpusError: The domain's text is not ordered by a score.
        """
        found = None if name in self._domains else parse_selection(name)
        if found is None or found[0] not in self.domains:
            return None
        if self._domains[found[0]]["ordered_by"] is None:
            raise CorpusError(
                f"{name!r} asks for the best {found[1]:.0%} of {found[0]!r}, whose documents have "
                f"no scores in corpus {self.url}. Build it with a score column (--score-column)."
            )
        return found

    def check_mixture(self, mixture: Mixture, who: str = "") -> None:
        """Refuse a mixture of domains, or selections inside them, that are not here.

        Raises:
            SpecError: No such domain.
            CorpusError: A selection inside a domain without scores.
        """
        selections = [name for name in mixture if self.selection(name)]
        mixture.check((*self.domains, *selections), f"corpus {self.url}{who}")

    def in_order(self, names: Collection[str]) -> list[str]:
        """Return domains and selections in the order of `domains`, each before its selections."""
        place = {domain: k for k, domain in enumerate(self.domains)}
        parsed = {name: self.selection(name) or (name, 0.0) for name in names}
        known = [name for name, (domain, _) in parsed.items() if domain in place]
        return sorted(known, key=lambda name: (place[parsed[name][0]], parsed[name][1]))

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the labels that are counted in some domain."""
        return tuple(dict.fromkeys(c for d in self._domains.values() for c in d["labels"]))

    def label_shares(self, axis: str) -> dict[str, dict[str, float]]:
        """Return domain -> value of a label -> its share of the training text's bytes.

        Raises:
            CorpusError: No such label in the corpus.
        """
        if axis not in self.axes:
            raise CorpusError(
                f"Corpus {self.url} has no label {axis!r}; it has {', '.join(self.axes) or 'none'}."
                + did_you_mean(axis, self.axes)
            )
        shares = {}
        for name in self.domains:
            counts = self._domains[name]["labels"].get(axis) or {UNKNOWN: 1}
            total = sum(counts.values()) or 1
            shares[name] = {v: n / total for v, n in sorted(counts.items(), key=_largest_first)}
        return shares

    def mixture_labels(self, mixture: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """Return label -> value -> its share of what is trained on, largest first.

        share_v = sum_k w_k share_kv. A selection is taken to have its domain's shares.
        """
        result = {}
        for axis in self.axes:
            by_domain, found = self.label_shares(axis), Counter[str]()
            for name, weight in mixture.items():
                domain = (self.selection(name) or (name,))[0]
                for value, share in by_domain[domain].items():
                    found[value] += weight * share  # pyright: ignore[reportArgumentType]
            result[axis] = dict(sorted(found.items(), key=_largest_first))
        return result

    def train(self, domain: str) -> np.ndarray:
        """Return the train tokens of a domain or selection, 1-d, read from disk as they are used.

        Of a remote corpus the shard is fetched first, once a node.

        Raises:
            CorpusError: No such domain, it is evaluation-only, or has no scores to select by.
        """
        self.check_target(domain, "train")
        name = (self.selection(domain) or (domain,))[0]
        return self._map(name, "train")[: self.tokens[domain]]

    def heldout(self, target: str) -> np.memmap:
        """Return a target's held-out tokens, 1-d, read from disk as they are used.

        Raises:
            CorpusError: No such target.
        """
        self.check_target(target, "heldout")
        return self._map(target, "heldout")

    def check_target(self, name: str, split: str) -> None:
        """Refuse a target that has no such tokens, `train` or `heldout`.

        Raises:
            CorpusError: No such target, or it is evaluation-only.
        """
        if split == "train" and self.selection(name):
            return
        if split == "train" and self._target(name)["evaluation_only"]:
            raise CorpusError(
                f"{name!r} is evaluation-only in corpus {self.url}: it has no train tokens. "
                f"Domains to train on: {', '.join(self.domains)}."
            )
        self._target(name)

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer, with special tokens inside a text taken as plain text."""
        filesystem, root = _open(self.url)
        path = f"{root}/{self.manifest['tokenizer']['file']}"
        return plain(b"".join(read_chunks(filesystem, path, self.url)).decode())

    def verify(self) -> None:
        """Read every file and compare its hash.

        Raises:
            CorpusError: The content of a file has changed.
        """
        filesystem, root = _open(self.url)
        for name, _, expected in self._files():
            digest = hashlib.sha256()
            for chunk in read_chunks(filesystem, f"{root}/{name}", self.url):
                digest.update(chunk)
            if digest.hexdigest() != expected:
                raise CorpusError(
                    f"Corpus {self.url}: the content of {name} has changed (sha256 "
                    f"{digest.hexdigest()[:16]}..., expected {expected[:16]}...). {REBUILD}"
                )

    def _target(self, name: str) -> dict[str, Any]:
        if name not in self._domains:
            raise CorpusError(
                f"Corpus {self.url} has no domain {name!r}; it has {', '.join(self.targets)}."
                + did_you_mean(name, self.targets)
            )
        return self._domains[name]

    def _map(self, name: str, split: str) -> np.memmap:
        filesystem, root = _open(self.url)
        facts = self._domains[name][split]
        file = Path(f"{root}/{facts['file']}")
        if not isinstance(filesystem, fs.LocalFileSystem):
            file = fetch(filesystem, str(file), facts, self.url)
        return np.memmap(file, dtype=self.manifest["dtype"], mode="r")

    def _files(self) -> list[tuple[str, int, str]]:
        shards = [d[s] for d in self._domains.values() for s in ("train", "heldout") if s in d]
        files = [self.manifest["tokenizer"], *shards]
        return [(f["file"], f["file_bytes"], f["sha256"]) for f in files]


def _largest_first(item: tuple[str, float]) -> tuple[float, str]:
    return (-item[1], item[0])


def _open(url: str) -> tuple[fs.FileSystem, str]:
    return locate(url if "://" in url else str(Path(url).expanduser().absolute()))
