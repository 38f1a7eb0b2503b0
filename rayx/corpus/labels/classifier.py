"""Stage 1, corpus: a rater trained from labelled examples: TF-IDF and logistic regression.

Features are words, punctuation and pairs of them, those most frequent in the examples; classes
count alike however many examples they have. What it is worth is measured before it is used:
stratified 5-fold cross-validation on the examples, with exact duplicates left out (near-duplicates
across folds flatter it).
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from threadpoolctl import threadpool_limits

from rayx.corpus.documents import UNKNOWN, documents
from rayx.corpus.labels.raters import TEXT, Value
from rayx.corpus.source import Source, locate
from rayx.corpus.stage import document_hash
from rayx.errors import CorpusError

log = logging.getLogger(__name__)

FOLDS = 5
FIRST_CHARACTERS = 20_000  # of a document
FEATURES = 2**18
WORDS = r"\w+|[^\w\s]"
CHANCE = 0.5  # AUC of a rater that knows nothing
WEAK = 0.65  # below this AUC a warning is due


@dataclass(frozen=True, slots=True)
class Validation:
    """What a classifier was worth on examples that it had not seen.

    `accuracy` is the share of right labels, `accuracy_se` its binomial standard error, `majority`
    the accuracy of always naming the largest class, `auc` the area under the ROC curve in [0, 1],
    .5 at chance; of more than two classes the mean over each against the rest.
    """

    examples: int
    classes: dict[str, int]
    accuracy: float
    accuracy_se: float
    majority: float
    auc: float


@dataclass(frozen=True)
class ClassifierRater:
    """A trained classifier as a rater; made by `train_classifier`.

    It gives the most likely label; the probability of the label `of`, in [0, 1]; or, where all
    labels are numbers, their mean by probability.
    """

    name: str
    model: Any  # a scikit-learn pipeline
    of: str | None
    validation: Validation
    examples: str  # hash of texts and labels

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the result."""
        return {"rater": "classifier", "name": self.name, "of": self.of,
                "examples": self.examples, "validation": asdict(self.validation)}  # fmt: skip

    def rate(self, documents: pa.Table) -> Sequence[Value]:
        """Return labels, probabilities or mean numbers."""
        texts = [text[:FIRST_CHARACTERS] for text in documents[TEXT].to_pylist()]
        with threadpool_limits(1):
            shares_NC = self.model.predict_proba(texts)
        classes = [str(c) for c in self.model.classes_]
        if self.of is not None:
            return [float(p) for p in shares_NC[:, classes.index(self.of)]]
        if (numbers := _numbers(classes)) is not None:
            return [float(mean) for mean in shares_NC @ np.array(numbers)]
        return [classes[i] for i in shares_NC.argmax(axis=1)]


def train_classifier(
    name: str,
    examples: str | Path | Source,
    *,
    of: str | None = None,
    label_column: str = "label",
    seed: int = 0,
) -> ClassifierRater:
    """Train a rater from labelled examples, and say what cross-validation finds it worth.

    Args:
        name: Of the column that it adds.
        examples: JSONL or Parquet with columns `text` and `label`, or a Source for other names.
        of: The label whose probability is the score.
        label_column: Column with the labels.
        seed: Of the folds.

    Raises:
        CorpusError: The examples cannot be read, have one class or fewer than 5 of a class, or
            no class is named `of`.
    """
    texts, labels = _read(examples, label_column)
    sizes = Counter(labels)
    where = f"Examples {getattr(examples, 'path', examples)!s}"
    if len(sizes) < 2:
        raise CorpusError(
            f"{where} have the one label {labels[0]!r}; expected examples of at least two."
        )
    rare = min(sizes, key=lambda label: (sizes[label], label))
    if sizes[rare] < FOLDS:
        raise CorpusError(
            f"{where} have {sizes[rare]} different texts of label {rare!r}; expected at least "
            f"{FOLDS} of each label. Add examples."
        )
    if of is not None and of not in sizes:
        raise CorpusError(f"{where} have no label {of!r}; labels are {', '.join(sorted(sizes))}.")
    validation = _validate(texts, labels, seed)
    log.info(
        "classifier %s: %d examples (%s); in %d-fold cross-validation accuracy %.3f +- %.3f "
        "(always the largest class: %.3f), AUC %.3f", name, validation.examples,
        ", ".join(f"{n} {label}" for label, n in validation.classes.items()), FOLDS,
        validation.accuracy, validation.accuracy_se, validation.majority, validation.auc,
    )  # fmt: skip
    if validation.auc < WEAK:
        log.warning("classifier %s: AUC %.3f is little above chance (%.1f); its labels say little",
                    name, validation.auc, CHANCE)  # fmt: skip
    digest = hashlib.sha256(repr((FEATURES, WORDS, texts, labels)).encode()).hexdigest()
    with threadpool_limits(1):  # the order of a sum decides its last bits
        model = _pipeline().fit(texts, labels)
    return ClassifierRater(name, model, of, validation, digest[:16])


def _read(examples: str | Path | Source, label_column: str) -> tuple[list[str], list[str]]:
    source = examples if isinstance(examples, Source) else Source(
        path=str(examples), domain="examples", label_columns=(label_column,))  # fmt: skip
    column = source.label_columns[0]
    found: dict[bytes, tuple[str, str]] = {}
    lost: Counter[str] = Counter()
    for document in documents(source, locate(source)):
        label = document.labels.get(column, UNKNOWN)
        key = document_hash(document.text)
        if document.skip:
            lost[document.skip] += 1
        elif label == UNKNOWN:
            lost["no label"] += 1
        elif key in found:
            lost["duplicate"] += 1
        else:
            found[key] = document.text[:FIRST_CHARACTERS], label
    if lost:
        listed = ", ".join(f"{n} {reason}" for reason, n in lost.items())
        log.warning("examples %s: left out %s", source.path, listed)
    if not found:
        raise CorpusError(
            f"Examples {source.path!r} have no text with a label in column {column!r} "
            f"({', '.join(f'{n} {reason}' for reason, n in lost.items()) or 'no rows'})."
        )
    texts, labels = zip(*found.values(), strict=True)
    return list(texts), list(labels)


def _numbers(classes: Sequence[str]) -> list[float] | None:
    try:
        numbers = [float(c) for c in classes]
    except ValueError:
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


def _pipeline() -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(
        ngram_range=(1, 2), token_pattern=WORDS, max_features=FEATURES, sublinear_tf=True
    )
    return make_pipeline(words, LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced"))


def _validate(texts: list[str], labels: list[str], seed: int) -> Validation:
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    classes = sorted(set(labels))
    with threadpool_limits(1):
        found = cross_val_predict(_pipeline(), texts, labels, cv=folds, method="predict_proba")
    shares_NC = np.asarray(found)
    right = np.array(classes)[shares_NC.argmax(axis=1)] == np.array(labels)
    accuracy = float(right.mean())
    scores = shares_NC[:, 1] if len(classes) == 2 else shares_NC
    sizes = Counter(labels)
    return Validation(
        examples=len(texts), classes={label: sizes[label] for label in classes},
        accuracy=accuracy, accuracy_se=math.sqrt(accuracy * (1 - accuracy) / len(texts)),
        majority=max(sizes.values()) / len(texts),
        auc=float(roc_auc_score(labels, scores, multi_class="ovr")),
    )  # fmt: skip
