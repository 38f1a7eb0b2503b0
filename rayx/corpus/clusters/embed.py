"""Stage 1, corpus: documents to vectors, by one of three embedders behind one protocol.

`tfidf` needs no download: it is fitted on a sample of the text itself. A folder is a
sentence-transformers model (`modules.json`) or an ONNX model (`*.onnx` with `tokenizer.json`);
neither is looked for anywhere but in the folder. The same texts in the same order give the same
vectors; padding and quantisation make a neural vector depend on its neighbours in the last digits.

Legend: N documents, F features.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from threadpoolctl import threadpool_limits

from rayx.errors import CorpusError

TFIDF = "tfidf"
CHARS = 6_000  # of a document, from its beginning, that an embedder sees
TERMS = 50_000  # of the vocabulary of TF-IDF, the most frequent
FEATURES = 64
TOKEN = r"(?u)\w+|[^\w\s]"  # words and single signs: code and notation are told by their signs
SINGLE: Any = np.float32  # the stubs of scikit-learn know float64 only
BATCH = 64  # documents that a neural embedder takes at once
MOST_TOKENS = 256  # of a document, where an ONNX folder does not say
MISSING = "The embedder {folder!r} needs {package!r}: pip install 'rayx-mix[embed]'"


class Embedder(Protocol):
    """Turns documents into directions; documents of like content point in like directions."""

    def fit(self, texts: Sequence[str]) -> Embedder:
        """Learn from a sample of the documents what an embedder without training needs."""
        ...

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return vectors, shape (N, F), float32, of unit length or zero where nothing is known."""
        ...


def open_embedder(reference: str, seed: int = 0) -> Embedder:
    """Return the embedder of a name or a folder.

    Args:
        reference: "tfidf", or a folder with a sentence-transformers or ONNX model.
        seed: Of the randomised decomposition of TF-IDF.

    Raises:
        CorpusError: There is no such folder, or it holds no model of a known kind.
    """
    if reference == TFIDF:
        return TfidfEmbedder(seed)
    folder = Path(reference).expanduser()
    if not folder.is_dir():
        raise CorpusError(
            f"Embedder {reference!r} is neither {TFIDF!r} nor a folder; give the folder of a "
            "sentence-transformers or ONNX model."
        )
    if (folder / "modules.json").exists():
        if not [f for f in folder.rglob("*") if f.suffix in (".safetensors", ".bin")]:
            raise CorpusError(
                f"Embedder folder {reference!r} has modules.json but no weights (*.safetensors, "
                "*.bin); copy the model again, whole."
            )
        return SentenceEmbedder(str(folder.absolute()))
    if sorted(folder.rglob("*.onnx")):
        return OnnxEmbedder(str(folder.absolute()))
    names = ", ".join(sorted(f.name for f in folder.iterdir())[:5]) or "nothing"
    raise CorpusError(
        f"Embedder folder {reference!r} has neither modules.json (sentence-transformers) nor "
        f"*.onnx; it holds {names}. Name the folder that holds the model itself."
    )


def embedder_facts(reference: str) -> list[Any]:
    """Return what identifies an embedder: of a folder its files' names, sizes and times."""
    if reference == TFIDF:
        return [TFIDF, CHARS, TERMS, FEATURES, TOKEN]
    files = sorted(f for f in Path(reference).expanduser().rglob("*") if f.is_file())
    return [CHARS, *([f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files)]


@dataclass
class TfidfEmbedder:
    """TF-IDF of words and signs, reduced by a truncated singular value decomposition (LSA).

    Args:
        seed: Of the randomised decomposition.

    Source: Deerwester et al. 1990; Halko et al. 2009, arXiv:0909.4061 (the decomposition).
    """

    seed: int = 0
    _steps: list[Any] = field(default_factory=list, repr=False)

    def fit(self, texts: Sequence[str]) -> TfidfEmbedder:
        """Learn vocabulary, document frequencies and directions.

        Raises:
            CorpusError: The texts have no words.
        """
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer

        words = TfidfVectorizer(token_pattern=TOKEN, sublinear_tf=True, max_features=TERMS,
                                min_df=2 if len(texts) > 50 else 1, dtype=SINGLE)  # fmt: skip
        with threadpool_limits(1):  # the order of a sum decides its last bits
            try:
                counts = words.fit_transform([t[:CHARS] for t in texts])
            except ValueError as error:
                raise CorpusError(
                    f"TF-IDF finds no words that two of {len(texts)} sampled documents share "
                    f"({error}); give another embedder."
                ) from None
            most = min(counts.shape) - 1
            steps: list[Any] = [words]
            if most >= 2:
                svd = TruncatedSVD(min(FEATURES, most), n_iter=7, random_state=self.seed)
                steps.append(svd.fit(counts))
        self._steps = steps
        return self

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return the vectors; a document without a known word is zero."""
        with threadpool_limits(1):
            vectors: Any = self._steps[0].transform([t[:CHARS] for t in texts])
            known = np.diff(vectors.indptr) > 0
            vectors = self._steps[1].transform(vectors) if len(self._steps) > 1 else (
                vectors.toarray())  # fmt: skip
        return _unit(vectors * known[:, None])


@dataclass(frozen=True)
class SentenceEmbedder:
    """A sentence-transformers model in a folder.

    Source: Reimers and Gurevych 2019, arXiv:1908.10084.
    """

    folder: str

    def fit(self, texts: Sequence[str]) -> SentenceEmbedder:
        """Load the model, so that a broken one is known now."""
        _sentence_transformer(self.folder)
        return self

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return the vectors."""
        model = _sentence_transformer(self.folder)
        vectors = model.encode([t[:CHARS] for t in texts], batch_size=BATCH,
                               show_progress_bar=False)  # fmt: skip
        return _unit(np.asarray(vectors))


@dataclass(frozen=True)
class OnnxEmbedder:
    """An ONNX model in a folder, its tokens' vectors averaged unless it averages them itself."""

    folder: str

    def fit(self, texts: Sequence[str]) -> OnnxEmbedder:
        """Load the model, so that a broken one is known now."""
        _onnx(self.folder)
        return self

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return the vectors."""
        session, tokenizer = _onnx(self.folder)
        wanted = {i.name for i in session.get_inputs()}
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
        rows: list[np.ndarray] = []
        for start in range(0, len(texts), BATCH):
            part = [texts[i][:CHARS] for i in order[start : start + BATCH]]
            encoded = tokenizer.encode_batch(part)
            mask = np.array([e.attention_mask for e in encoded], np.int64)
            given = {"input_ids": np.array([e.ids for e in encoded], np.int64),
                     "attention_mask": mask, "token_type_ids": np.zeros_like(mask)}  # fmt: skip
            out = session.run(None, {k: v for k, v in given.items() if k in wanted})[0]
            if out.ndim == 3:
                out = (out * mask[..., None]).sum(1) / np.maximum(mask.sum(1, keepdims=True), 1)
            rows.append(out)
        vectors = np.concatenate(rows)
        return _unit(vectors[np.argsort(order)])


@lru_cache(maxsize=1)
def _sentence_transformer(folder: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        message = MISSING.format(folder=folder, package="sentence-transformers")
        raise CorpusError(message) from None
    try:
        return SentenceTransformer(folder, local_files_only=True)
    except Exception as error:  # four libraries raise their own kinds, derived from nothing else
        raise CorpusError(
            f"Embedder folder {folder!r} cannot be read as a sentence-transformers model: {error}"
        ) from error


@lru_cache(maxsize=1)
def _onnx(folder: str) -> tuple[Any, Any]:
    """Return the session and its tokenizer."""
    try:
        import onnxruntime
    except ImportError:
        message = MISSING.format(folder=folder, package="onnxruntime")
        raise CorpusError(message) from None
    from tokenizers import Tokenizer

    models = sorted(Path(folder).rglob("*.onnx"))
    model = next((m for m in models if m.name == "model.onnx"), models[0])
    if len(models) > 1 and model.name != "model.onnx":
        raise CorpusError(
            f"Embedder folder {folder!r} has {len(models)} ONNX models "
            f"({', '.join(m.name for m in models[:3])}); call the one to use model.onnx."
        )
    file = Path(folder) / "tokenizer.json"
    if not file.exists():
        raise CorpusError(
            f"Embedder folder {folder!r} has {model.name} but no tokenizer.json; copy the model's "
            "tokenizer there."
        )
    options = onnxruntime.SessionOptions()
    # Ray tells its workers so how many cores are theirs; 0 is all.
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS") or 0)
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # both libraries raise their own kinds, derived from nothing else
        raise CorpusError(
            f"Embedder folder {folder!r} cannot be read as an ONNX model: {error}"
        ) from error
    settings = Path(folder) / "sentence_bert_config.json"
    most = json.loads(settings.read_text())["max_seq_length"] if settings.exists() else None
    tokenizer.enable_truncation(most or (tokenizer.truncation or {}).get("max_length", MOST_TOKENS))
    tokenizer.enable_padding(**(tokenizer.padding or {}) | {"length": None})
    return session, tokenizer


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths, where=lengths > 1e-6, out=np.zeros_like(vectors)).astype(
        np.float32
    )
