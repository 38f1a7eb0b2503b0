"""Stage 1, corpus: text -> domains -> token shards.

`build_corpus` turns sources of text into a corpus on disk, `Corpus.load` opens one, `describe`
tabulates it, `build_sample` makes a small real one from installed packages.
"""

from rayx.corpus.build import build_corpus
from rayx.corpus.corpus import Corpus
from rayx.corpus.sample import build_sample, extract_sample
from rayx.corpus.show import describe
from rayx.corpus.source import Source

__all__ = ["Corpus", "Source", "build_corpus", "build_sample", "describe", "extract_sample"]
