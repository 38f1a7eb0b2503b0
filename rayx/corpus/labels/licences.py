"""Stage 1, corpus: what a document's licence allows, as one of nine tiers; allow and deny lists.

A licence is written as an SPDX id, an SPDX expression ("MIT OR GPL-2.0-only"), a name ("Apache
License, Version 2.0"), a Hugging Face tag, a Python classifier or the address of its text. The
`license-expression` library parses expressions and knows the ids with ScanCode's categories; which
tier a category is, and how names are spelled, is here. This is bookkeeping and no legal advice.

Of "A OR B" a user may take either, so its tier is the freer of the two; "A AND B" binds to both,
so it is the stricter; of "A WITH exception" the freer of licence and exception counts.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from rayx.errors import CorpusError, did_you_mean

# From the freest to the strictest; nobody knows what the last allows.
TIERS = (
    "public-domain", "permissive", "attribution", "share-alike", "weak-copyleft", "copyleft",
    "non-commercial", "restricted", "unknown",
)  # fmt: skip
UNKNOWN = "unknown"
CATEGORIES = {  # of ScanCode's licence list; of the others nothing is known
    "Public Domain": "public-domain", "Permissive": "permissive",
    "Copyleft Limited": "weak-copyleft", "Copyleft": "copyleft", "Source-available": "restricted",
    "Free Restricted": "restricted", "Proprietary Free": "restricted", "Commercial": "restricted",
}  # fmt: skip
CONTENT = (  # licences of texts and data, which ScanCode sorts by what they would mean for code
    (re.compile(r"(odc by|ogl (uk|canada)|etalab)\b"), "attribution"),
    (re.compile(r"(odbl|gfdl|lal|free art|cdla sharing)\b"), "share-alike"),
)
RESEARCH = re.compile(r"\b(nc|noncommercial|academic|research)\b")
FAMILIES = {  # names without a version
    "permissive": ("apache", "bsd", "mit", "x", "isc", "zlib", "python", "psf", "afl"),
    "copyleft": ("gpl", "agpl"),
    "weak-copyleft": ("lgpl", "mpl", "epl", "cddl", "artistic"),
    "share-alike": ("gfdl", "odbl"),
    "public-domain": ("publicdomain", "pd", "unlicense", "pddl", "cc publicdomain"),
    "restricted": ("proprietary", "commercial", "all rights reserved", "llama", "gemma"),
}  # fmt: skip
NAMES = {  # other usual names
    "MIT": ("expat", "mit expat"),
    "BSD-3-Clause": ("bsd new", "bsd modified", "bsd revised"),
    "BSD-2-Clause": ("bsd simplified", "freebsd"),
    "BSL-1.0": ("boost 1", "boost software 1", "boost software"),
    "CC0-1.0": ("cc 0", "cc 0 universal", "cc 0 1 universal", "cc 0 1 universal publicdomain"),
    "PSF-2.0": ("python software foundation", "psf"),
    "C-UDA-1.0": ("c uda",),
}  # fmt: skip
PHRASES = tuple(
    (re.compile(pattern), f" {short} ")
    for pattern, short in (
        (r"gnu affero general public|affero general public|gnu affero gpl", "agpl"),
        (r"gnu (lesser|library)( or (lesser|library))? general public", "lgpl"),
        (r"gnu general public|gnu gpl", "gpl"),
        (r"gnu (?=lgpl|agpl)", ""),
        (r"gnu free documentation", "gfdl"),
        (r"mozilla public", "mpl"),
        (r"eclipse public", "epl"),
        (r"common development and distribution", "cddl"),
        (r"academic free", "afl"),
        (r"open data commons attribution", "odc by"),
        (r"(open data commons )?open database|odc odbl", "odbl"),
        (r"open data commons public domain dedication( and)?", "pddl"),
        (r"(cc )?public ?domain( mark)?|cc pdm|cc pdd", "publicdomain"),
        (r"open government", "ogl uk"),
        (r"creative ?commons( cc)?", "cc"),
        (r"(?<=cc )zero", "0"),
        (r"non ?commercial", "nc"),
        (r"no ?deriv(ative)?s?( works)?", "nd"),
        (r"share ?alike", "sa"),
        (r"or (any )?(later|newer|greater)", "+"),
    )
)
FILLERS = {
    "a", "an", "the", "under", "version", "v", "international",
    "unported", "generic", "public", "general", "terms", "of", "deed", "html", "txt", "php", "en",
    "legalcode",
}  # fmt: skip
OF_NO_FAMILY = {"clause", "style", "like", "only", "community", "software", "foundation", "+"}


@dataclass(frozen=True, slots=True)
class Licence:
    """One licence of an expression: its SPDX id, None if it is no known one, and its tier."""

    id: str | None
    tier: str


def tier_of(value: str | None) -> str:
    """Return the tier of a licence as it is written, one of `TIERS`; "unknown" for none.

    Args:
        value: SPDX id or expression, name, tag, classifier or address, in any case.
    """
    tiers = _fold(value, lambda licence: licence.tier, min, max, TIERS.index)
    return str(tiers)


@dataclass(frozen=True, slots=True)
class Licences:
    """Which licences' documents may be used.

    A licence is allowed if it is in no deny list and, where there is an allow list, in that one,
    by its id or its tier. Of "A OR B" one must be allowed, of "A AND B" both.

    Args:
        allow: SPDX ids or names of tiers; none for all that are not denied.
        deny: SPDX ids or names of tiers. Documents without a known licence have the tier "unknown".

    Raises:
        CorpusError: An entry is neither a tier nor a known licence, or in both lists.
    """

    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("allow", "deny"):
            given = getattr(self, name)
            if isinstance(given, str):
                raise CorpusError(f"Licences has {name}={given!r}; expected several, as a tuple.")
            object.__setattr__(self, name, tuple(_entry(name, value) for value in given))
        if both := sorted(set(self.allow) & set(self.deny)):
            raise CorpusError(f"Licences allows and denies {both[0]!r}; leave it in one list.")

    def allows(self, value: str | None) -> bool:
        """Whether documents of this licence may be used."""
        return bool(_fold(value, self._allows_one, max, min, int))

    def reason(self, value: str | None) -> str | None:
        """Return why documents of this licence may not be used, None if they may."""
        if self.allows(value):
            return None
        return f"licence denied: {tier_of(value)}"

    def _allows_one(self, licence: Licence) -> bool:
        names = {licence.id, licence.tier}
        return not names & set(self.deny) and (not self.allow or bool(names & set(self.allow)))


def _entry(name: str, value: str) -> str:
    tier = str(value).strip().lower()
    if tier in TIERS:
        return tier
    found = _lookup(str(value)).id
    if found is None:
        raise CorpusError(
            f"Licences has {name} {value!r}, which is neither a tier ({', '.join(TIERS)}) nor the "
            "id of a licence." + did_you_mean(str(value), (*TIERS, *_index().ids))
        )
    return found


@lru_cache(maxsize=65_536)
def _fold(
    value: str | None,
    of_one: Callable[[Licence], Any],
    of_or: Callable[..., Any],
    of_and: Callable[..., Any],
    order: Callable[[Any], int],
) -> Any:
    """Evaluate a licence as an expression whose leaves are licences."""
    text = "" if value is None else str(value).strip()
    whole = _lookup(text)
    if whole.tier != UNKNOWN or not text:
        return of_one(whole)

    def evaluate(node: Any) -> Any:
        kind = type(node).__name__
        if kind in ("OR", "AND"):
            choose = of_or if kind == "OR" else of_and
            return choose((evaluate(child) for child in node.args), key=order)
        if kind == "LicenseWithExceptionSymbol":
            base = _lookup(node.license_symbol.key)
            freed = _index().exceptions.get(node.exception_symbol.key.lower())
            tier = min(base.tier, freed, key=TIERS.index) if freed else UNKNOWN
            return of_one(Licence(base.id if freed else None, tier))
        return of_one(_lookup(node.key))

    from license_expression import ExpressionError, ExpressionParseError

    # As Cargo writes "or", and as lists are written, all of which bind.
    listed = re.sub(r"\s*[,;]\s*", " AND ", re.sub(r"\s*/\s*", " OR ", text))
    for expression in (text, listed):
        with contextlib.suppress(ExpressionError, ExpressionParseError):
            return evaluate(_index().licensing.parse(expression))
    return of_one(whole)


@lru_cache(maxsize=65_536)
def _lookup(text: str) -> Licence:
    """Return the licence that a name without operators stands for."""
    words = _words(text)
    if found := _index().by_words.get(_key(words)):
        return found
    tier = _family(words)
    twice = re.fullmatch(r"(.+?)\s*\(([^()]+)\)", text)  # `The MIT License (MIT)`
    if tier == UNKNOWN and twice and _lookup(twice[1]).tier == _lookup(twice[2]).tier:
        return _lookup(twice[2])
    return Licence(None, tier)


def _words(text: str) -> list[str]:
    """Return a name's words in one spelling: `Apache License, v2.0` -> apache 2."""
    name = text.strip().lower().rpartition("::")[2].strip()
    if re.match(r"(https?://)?(www\.)?[\w-]+(\.[\w-]+)+/", name):
        name = _of_address(name if "://" in name else f"https://{name}")
    name = re.sub(r"\blicen[cs]es?\b|[^a-z0-9.+]+", " ", name)
    for pattern, short in PHRASES:
        name = " ".join(pattern.sub(short, name).split())
    name = re.sub(r"^(cc )?attribution (?=\d|nc|nd|sa)|^cc attribution$", "cc by ", name)
    name = re.sub(r"(?<=[a-z])v(?=\d)", " ", name)
    pieces = re.findall(r"[a-z]+|\d+(?:\.\d+)*|\+", name)
    return [re.sub(r"(\.0)+$", "", piece) for piece in pieces if piece not in FILLERS]


def _key(words: Iterable[str]) -> str:
    return " ".join(sorted(words))  # so that `3-clause BSD` is BSD-3-Clause


def _of_address(url: str) -> str:
    parts = urlsplit(url)
    pieces = [piece for piece in parts.path.split("/") if piece]
    if "creativecommons.org" in parts.netloc:
        if "mark" in pieces:
            return "publicdomain"
        return " ".join(["cc", *(p for p in pieces[:3] if p not in ("licenses", "publicdomain"))])
    last = re.sub(r"\.(html?|txt|php|md|en)$", "", pieces[-1]) if pieces else ""
    return f"apache {last}" if "apache.org" in parts.netloc else last


def _family(words: list[str]) -> str:
    """Return the tier of a name without a known version."""
    if {"openrail", "rail"} & set(words):
        return "restricted"
    name = [w for w in words if not w[0].isdigit() and w not in OF_NO_FAMILY]
    if name[:1] == ["cc"] and name[1:]:
        return _creative_commons(name[1:])
    if words[:2] == ["cc", "0"] and not name[1:]:
        return "public-domain"
    for pattern, tier in CONTENT:
        if pattern.fullmatch(" ".join(name)):
            return tier
    return next((tier for tier, names in FAMILIES.items() if " ".join(name) in names), UNKNOWN)


def _creative_commons(words: list[str]) -> str:
    others = [word for word in words if word not in ("by", "nc", "nd", "sa")]
    # One other word may be a country's; more of them say something that we do not read.
    if len(others) == len(words) or len(others) > 1 or len("".join(others)) > 3:
        return UNKNOWN
    if "nd" in words:
        return "restricted"
    if "nc" in words:
        return "non-commercial"
    return "share-alike" if "sa" in words else "attribution"


class _Index:
    """The known licences, read from the library when the first is asked for."""

    def __init__(self) -> None:
        from license_expression import get_license_index, get_spdx_licensing

        self.licensing = get_spdx_licensing()
        entries = get_license_index()
        self.exceptions = {
            str(key).lower(): CATEGORIES.get(entry["category"], UNKNOWN)
            for entry in entries
            if entry["is_exception"]
            for key in (entry["spdx_license_key"], entry["license_key"])
        }
        self.by_words: dict[str, Licence] = {}
        known = [e for e in entries if e["spdx_license_key"] and not e["is_exception"]]
        self.ids = [e["spdx_license_key"] for e in known]
        of_id = {id: Licence(id, self._tier(id, e)) for id, e in zip(self.ids, known, strict=True)}
        names = [(id, id) for id in self.ids]
        for entry in known:
            names += [(k, entry["spdx_license_key"]) for k in entry["other_spdx_license_keys"]]
        names += [(name, id) for id, several in NAMES.items() for name in several]
        names += [(e["license_key"], e["spdx_license_key"]) for e in known]
        for name, id in names:  # the first of two equal names counts
            self.by_words.setdefault(_key(_words(name)), of_id[id])

    def _tier(self, id: str, entry: dict[str, Any]) -> str:
        words = _words(id)
        if words[:1] == ["cc"] and (tier := _family(words)) != UNKNOWN:
            return tier
        for pattern, tier in CONTENT:
            if pattern.match(" ".join(words)):
                return tier
        tier = CATEGORIES.get(entry["category"], UNKNOWN)
        return "non-commercial" if tier == "restricted" and RESEARCH.search(id.lower()) else tier


@lru_cache(maxsize=1)
def _index() -> _Index:
    return _Index()
