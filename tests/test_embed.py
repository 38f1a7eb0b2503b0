"""Embedders: directions of documents, and folders that hold no model."""

import base64
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from rayx.corpus.clusters import embed
from rayx.corpus.clusters.embed import OnnxEmbedder, SentenceEmbedder, TfidfEmbedder, open_embedder
from rayx.errors import CorpusError
from tests.conftest import sentences

# A table of 8 tokens' vectors of 4 numbers: token i has 1 + i // 4 at place i % 4, else zeros.
TINY_ONNX = (
    "c-rIOuv*Q;rOCxu&c&ITS5R6KpP5oDB$$&}ToRv=nUa#47hhbGSdyy5=AKxRky<3gn6A~s$iczEBEaaxSnk!p$iUEG&"
    "wv3)5_7;5CtfT{7TM(jTznktLR?(TLX3GJqBu&4i!ZUHBsH%jGe0jrH?cSyQ%#a47p9MeM7V@F7=`!{%D9*~Se#h67z"
    "B6$o&YVQ"
)


def onnx_folder(folder: Path) -> Path:
    pytest.importorskip("onnxruntime", reason="pip install 'rayx-mix[embed]'")
    folder.mkdir(exist_ok=True)
    (folder / "model.onnx").write_bytes(zlib.decompress(base64.b85decode(TINY_ONNX)))
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate("abcdefgh")}, unk_token="h"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_tfidf_tells_the_domains_of_documents_apart():
    texts = sentences("code", 30, 0) + sentences("law", 30, 0)
    vectors = TfidfEmbedder().fit(texts).embed(texts)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    cosines = vectors @ vectors.T
    assert cosines[:30, :30].min() > 0.5 > cosines[:30, 30:].max()


def test_tfidf_takes_documents_one_by_one_or_all_at_once():
    texts = sentences("code", 20, 0) + sentences("news", 20, 0)
    embedder = TfidfEmbedder(seed=3).fit(texts)
    alone = np.concatenate([embedder.embed([text]) for text in texts])
    assert (alone == embedder.embed(texts)).all()
    assert (TfidfEmbedder(seed=3).fit(texts).embed(texts) == alone).all()


def test_document_without_a_known_word_is_zero():
    texts = sentences("code", 20, 0) + sentences("news", 20, 0)
    vectors = TfidfEmbedder().fit(texts).embed(["zyx wvu", texts[0], " "])
    assert not vectors[0].any() and vectors[1].any() and not vectors[2].any()


def test_only_the_beginning_of_a_document_counts(monkeypatch):
    monkeypatch.setattr(embed, "CHARS", 40)
    texts = sentences("code", 20, 0) + sentences("news", 20, 0)
    embedder = TfidfEmbedder().fit(texts)
    assert (embedder.embed([texts[0]]) == embedder.embed([texts[0][:40] + texts[30]])).all()


def test_two_documents_are_enough_for_tfidf():
    vectors = TfidfEmbedder().fit(["one fish", "two fish"]).embed(["one", "two"])
    assert vectors[0] @ vectors[1] == pytest.approx(0, abs=1e-6)


def test_onnx_averages_the_tokens_that_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "BATCH", 2)  # in each, one document is padded
    embedder = open_embedder(str(onnx_folder(tmp_path)))
    assert isinstance(embedder, OnnxEmbedder)
    vectors = embedder.fit([]).embed(["a b b b", "c", "a e", "b a"])  # e is twice a
    expected = np.array([[1, 3, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]])
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors, expected, atol=1e-6)


def test_onnx_reads_no_more_tokens_than_the_model_takes(tmp_path):
    folder = onnx_folder(tmp_path)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 2}))
    vectors = open_embedder(str(folder)).embed(["a a b b b"])
    np.testing.assert_allclose(vectors, [[1, 0, 0, 0]])


def no_such_folder(folder):
    open_embedder(str(folder / "absent"))


def unknown_kind(folder):
    (folder / "weights.gguf").write_text("x")
    open_embedder(str(folder))


def empty_folder(folder):
    open_embedder(str(folder))


def sentence_transformer_without_weights(folder):
    (folder / "modules.json").write_text("[]")
    open_embedder(str(folder))


def onnx_without_tokenizer(folder):
    (onnx_folder(folder) / "tokenizer.json").unlink()
    open_embedder(str(folder)).fit([])


def broken_onnx(folder):
    (onnx_folder(folder) / "model.onnx").write_text("not a model")
    open_embedder(str(folder)).fit([])


def several_onnx(folder):
    (onnx_folder(folder) / "model.onnx").rename(folder / "a.onnx")
    (folder / "b.onnx").write_text("x")
    open_embedder(str(folder)).fit([])


def no_words(folder):
    TfidfEmbedder().fit([f"word{n}" for n in range(60)])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (no_such_folder, "neither 'tfidf' nor a folder"),
        (unknown_kind, "it holds weights.gguf"),
        (empty_folder, "it holds nothing"),
        (sentence_transformer_without_weights, "modules.json but no weights"),
        (onnx_without_tokenizer, "model.onnx but no tokenizer.json"),
        (broken_onnx, "cannot be read as an ONNX model"),
        (several_onnx, "2 ONNX models .a.onnx, b.onnx."),
        (no_words, "no words that two of 60 sampled documents share"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_embedder_that_cannot_be_used_is_refused(wrong, message, tmp_path):
    embed._onnx.cache_clear()
    with pytest.raises(CorpusError, match=message):
        wrong(tmp_path)


@pytest.mark.slow
def test_sentence_transformers_folder_is_read_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("sentence_transformers", reason="pip install 'rayx-mix[embed]'")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abc"]))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    small = BertConfig(vocab_size=7, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                       intermediate_size=8)  # fmt: skip
    BertModel(small).save_pretrained(tmp_path / "bert")
    words = Transformer(str(tmp_path / "bert"))
    SentenceTransformer(modules=[words, Pooling(8)]).save(str(tmp_path / "model"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    embedder = open_embedder(str(tmp_path / "model"))
    assert isinstance(embedder, SentenceEmbedder)
    vectors = embedder.fit([]).embed(["a b", "c", "a b"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-6)
    assert vectors[0] @ vectors[1] < 0.999
    (weights,) = Path(tmp_path / "model").rglob("*.safetensors")
    os.truncate(weights, 10)
    embed._sentence_transformer.cache_clear()
    with pytest.raises(CorpusError, match="cannot be read as a sentence-transformers model"):
        embedder.fit([])
