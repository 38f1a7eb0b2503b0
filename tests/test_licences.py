"""Licences are read as tiers however they are written, and lists keep out what they name."""

import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayx.corpus.labels.licences import TIERS, UNKNOWN, Licences, tier_of
from rayx.errors import CorpusError

WRITTEN = {
    "public-domain": (
        "CC0-1.0", "cc0", "CC-0", "Unlicense", "public domain", "Public Domain Mark 1.0", "pddl",
        "http://creativecommons.org/publicdomain/zero/1.0/", "CC0 1.0 Universal",
        "http://creativecommons.org/publicdomain/mark/1.0",
    ),
    "permissive": (
        "MIT", "mit license", "The MIT License (MIT)", "Apache 2.0", "Apache License, Version 2.0",
        "apache-2.0", "BSD", "3-clause BSD", "New BSD License", "MIT/X11", "ISC", "psf",
        "License :: OSI Approved :: MIT License", "https://www.apache.org/licenses/LICENSE-2.0",
        "https://opensource.org/licenses/MIT", "CDLA-Permissive-2.0",
    ),
    "attribution": (
        "cc-by-4.0", "CC BY 3.0", "cc-by", "Creative Commons Attribution 4.0 International",
        "Creative Commons Attribution License 3.0", "ODC-By-1.0", "odc-by",
        "Open Government Licence v3.0", "etalab-2.0",
    ),
    "share-alike": (
        "CC-BY-SA-4.0", "CC BY-SA 3.0 Unported", "Creative Commons Attribution-ShareAlike 4.0",
        "https://creativecommons.org/licenses/by-sa/4.0/deed.en", "ODbL-1.0", "GFDL",
        "GNU Free Documentation License v1.3", "cdla-sharing-1.0",
    ),
    "weak-copyleft": (
        "LGPL-2.1-or-later", "LGPLv3", "MPL 2.0", "Mozilla Public License 2.0", "EPL-2.0",
        "GNU Lesser General Public License v3.0", "GPL-2.0-only WITH Classpath-exception-2.0",
    ),
    "copyleft": (
        "GPL-3.0", "GPLv3", "gpl", "GPL-2.0+", "GNU General Public License v2 or later (GPLv2+)",
        "AGPL-3.0-only", "https://www.gnu.org/licenses/gpl-3.0.html",
        "License :: OSI Approved :: GNU Affero General Public License v3",
    ),
    "non-commercial": (
        "CC-BY-NC-4.0", "cc by nc sa", "Creative Commons Attribution-NonCommercial 4.0",
        "PolyForm-Noncommercial-1.0.0",
    ),
    "restricted": (
        "CC-BY-ND-4.0", "cc-by-nc-nd-3.0", "openrail", "bigscience-openrail-m", "llama3.1",
        "All rights reserved.", "proprietary", "BUSL-1.1",
    ),
    UNKNOWN: (None, "", "other", "None", "NOASSERTION", "cc", "my own", "MIT AND", "(", "???"),
}  # fmt: skip


@pytest.mark.parametrize("tier", WRITTEN)
def test_licences_are_read_however_they_are_written(tier):
    assert {value: tier_of(value) for value in WRITTEN[tier]} == dict.fromkeys(WRITTEN[tier], tier)


@pytest.mark.parametrize(
    ("expression", "tier"),
    [
        ("MIT OR GPL-2.0-only", "permissive"),
        ("MIT AND GPL-2.0-only", "copyleft"),
        ("(MIT OR GPL-3.0-only) AND cc-by-sa-4.0", "share-alike"),
        ("mit or something of mine", "permissive"),
        ("MIT AND something of mine", UNKNOWN),
        ("Apache-2.0 WITH LLVM-exception", "permissive"),
        ("GPL-3.0-only WITH my-exception", UNKNOWN),
        ("MIT/Apache-2.0", "permissive"),
        ("MIT, GPL-3.0", "copyleft"),
    ],
)
def test_an_expression_is_as_free_as_what_a_user_may_choose(expression, tier):
    assert tier_of(expression) == tier


LEAVES = [value for tier, several in WRITTEN.items() if tier != UNKNOWN for value in several[:1]]


@given(st.sampled_from(LEAVES), st.sampled_from(LEAVES))
def test_or_takes_the_freer_and_and_the_stricter(one, two):
    ranks = sorted(TIERS.index(tier_of(value)) for value in (one, two))
    assert TIERS.index(tier_of(f"{one} OR {two}")) == ranks[0]
    assert TIERS.index(tier_of(f"{one} AND {two}")) == ranks[1]


@given(st.text(max_size=40))
def test_any_text_has_a_tier_and_case_does_not_matter(text):
    assert tier_of(text) in TIERS
    assert not text.isascii() or tier_of(text.upper()) == tier_of(text.lower())


def test_allow_and_deny_lists_take_tiers_and_ids_in_any_spelling():
    free = Licences(allow=("public-domain", "permissive", "CC BY 4.0"))
    assert free.allows("mit") and free.allows("cc0") and free.allows("cc-by-4.0")
    assert not free.allows("cc-by-3.0") and not free.allows(None)
    assert free.allows("MIT OR GPL-3.0-only") and not free.allows("MIT AND GPL-3.0-only")
    some = Licences(deny=("copyleft", "JSON", "unknown"))
    assert some.allows("LGPL-3.0-only") and some.allows("GPL-3.0 OR LGPL-3.0")
    assert not some.allows("GPL-3.0") and not some.allows("json") and not some.allows("my own")
    assert Licences().allows("anything") and Licences().allows(None)
    assert some.reason("GPL-3.0") == "licence denied: copyleft" and some.reason("MIT") is None


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"deny": ("copyleft", "permisive")}, r"neither a tier .* Did you mean 'permissive'\?"),
        ({"allow": ("GPL-3.0-onyl",)}, r"Did you mean 'GPL-3.0-only'\?"),
        ({"allow": ("mit",), "deny": ("MIT License",)}, r"allows and denies 'MIT'"),
        ({"allow": "permissive"}, r"expected several, as a tuple"),
    ],
)
def test_lists_that_cannot_be_meant_are_refused(lists, message):
    with pytest.raises(CorpusError, match=message):
        Licences(**lists)


def test_agrees_with_the_licence_list_of_scancode():
    """Each SPDX id, and each id's names, against the categories of licensedcode-data's files."""
    package = pytest.importorskip("licensedcode", reason="needs licensedcode-data")
    folder = Path(next(iter(package.__path__))) / "data/licenses"
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    free_by_mistake = set()
    for file in sorted(folder.glob("*.LICENSE")):
        facts = dict(re.findall(r"^(\w+): (.*)$", file.read_text().split("---")[1], re.M))
        key = facts.get("spdx_license_key", "LicenseRef")
        if key.startswith("LicenseRef") or {"is_exception", "is_deprecated"} & set(facts):
            continue
        expected = EXPECTED.get(facts["category"], {UNKNOWN})
        for kind in ("spdx_license_key", "name", "short_name"):
            tier = tier_of(facts[kind])
            total[kind] += 1
            right[kind] += tier in expected
            strictest = min(TIERS.index(t) for t in expected)
            if TIERS.index(tier) < strictest:
                free_by_mistake.add((facts[kind], tier, facts["category"]))
    assert total["spdx_license_key"] > 500
    assert right["spdx_license_key"] >= 0.99 * total["spdx_license_key"]
    assert right["short_name"] >= 0.6 * total["short_name"]
    # Data licences, which ScanCode calls Copyleft; no name is taken for freer than it is.
    assert {key for key, _, _ in free_by_mistake} <= {"LAL-1.2", "LAL-1.3", "ODbL-1.0", "ODbL 1.0"}


RESTRICTED = {"restricted", "non-commercial"}
EXPECTED = {
    "Public Domain": {"public-domain"}, "Permissive": {"permissive", "attribution"},
    "Copyleft Limited": {"weak-copyleft", "share-alike"}, "Copyleft": {"copyleft"},
    "Source-available": RESTRICTED, "Free Restricted": RESTRICTED,
    "Proprietary Free": RESTRICTED, "Commercial": RESTRICTED,
}  # fmt: skip
