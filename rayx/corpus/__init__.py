"""Stage 1, corpus: text -> domains -> token shards.

`build_corpus` turns sources of text into a corpus on disk, `Corpus.load` opens one, `describe`
tabulates it, `build_sample` makes a small real one from installed packages, `label_corpus` adds
columns to documents.
"""

from rayx.corpus.build import build_corpus
from rayx.corpus.corpus import Corpus
from rayx.corpus.labels.buckets import Buckets
from rayx.corpus.labels.label import label_corpus
from rayx.corpus.labels.licences import Licences
from rayx.corpus.sample import build_sample, extract_sample
from rayx.corpus.show import describe
from rayx.corpus.source import Source

__all__ = ["Buckets", "Corpus", "Licences", "Source", "build_corpus", "build_sample", "describe",
           "extract_sample", "label_corpus"]  # fmt: skip
