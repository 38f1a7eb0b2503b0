"""Hugging Face models: losses against plain transformers, the proxies' text, merges, refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import rayx
from rayx.corpus import Source, build_corpus
from rayx.corpus.tokenizer import plain
from rayx.merge_operator import Operator
from rayx.mixture import Mixture, Schedule
from rayx.proxy import train_pack
from rayx.proxy.heldout_text import Encoder, passages
from rayx.proxy.models import MergedModels, open_model
from rayx.spec import Evaluation, ModelShape, Optimizer, Parent, TrainSpec

transformers = pytest.importorskip("transformers")

from tests.tiny_models import config_of, own_tokenizer_json, save_model  # noqa: E402

EVALUATION = Evaluation(points=1, sequences=6)
CONTEXT = 24


def evaluated(path, corpus, context=CONTEXT, evaluation=EVALUATION):
    model = open_model(str(path))
    model.prepare(corpus, context, evaluation)
    return model.losses()[0]


def plain_bits(path, corpus, target, context, evaluation, bos=()):
    """Bits per byte by transformers alone, one sequence at a time, with its own text handling."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    shard, own = corpus.heldout(target).tolist(), corpus.tokenizer()
    eos = tokenizer.eos_token_id
    # Byte-level tokenizers: a letter of a token is a byte. The end of a document counts as one.
    sizes = [1 if t == corpus.eos_id else len(own.id_to_token(t)) for t in shard]
    marks = np.cumsum(sizes).tolist()  # bytes up to the end of each token of the corpus
    ids, sizes, start = [], [], 0
    for end in np.flatnonzero(np.array(shard) == corpus.eos_id):
        text, start = own.decode(shard[start:end]), end + 1
        inside = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += [*inside, eos]
        sizes += [*(len(t) for t in tokenizer.convert_ids_to_tokens(inside)), 1]
    ends = np.cumsum(sizes).tolist()
    assert ends[-1] == marks[-1]
    available = (len(shard) - 1) // context
    places = np.unique(
        np.linspace(0, available - 1, min(evaluation.sequences, available)).astype(int)
    )
    total = 0.0
    for place in places:
        low, high = marks[place * context], marks[(place + 1) * context]
        scored = [i for i, end in enumerate(ends) if low < end <= high]
        before = ids[scored[0] - 1 : scored[0]] if scored[0] else []
        row = [*bos, *before, *(ids[i] for i in scored)]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row])).logits[0].double()
        logp = logits.log_softmax(-1)
        asked = range(max(1, len(row) - len(scored)), len(row))
        total -= sum(float(logp[i - 1, row[i]]) for i in asked)
    bytes_per_token = corpus.heldout_bytes[target] / corpus.heldout_tokens[target]
    return total / (math.log(2) * len(places) * context * bytes_per_token)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"tie_word_embeddings": True}),
        ("gpt2", {}),
        ("llama", {"bos": True}),
        ("llama", {"dtype": torch.bfloat16}),
        ("gpt2", {"shard": "20KB"}),
    ],
)
def test_losses_are_those_of_plain_transformers(tiny_corpus, tmp_path, kind, changes):
    folder = save_model(tmp_path / "m", own_tokenizer_json(), kind=kind, **changes)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == ("shard" in changes)
    found = evaluated(folder, tiny_corpus)
    bos = [plain(own_tokenizer_json()).get_vocab_size()] if changes.get("bos") else []
    for target in ("code", "law"):
        expected = plain_bits(folder, tiny_corpus, target, CONTEXT, EVALUATION, bos)
        assert found[target].bpb == pytest.approx(expected, rel=1e-5)


def test_a_model_with_the_corpus_tokenizer_reads_the_tokens_of_the_proxies(tiny_corpus):
    encoder = Encoder(plain(tiny_corpus.tokenizer().to_str()), tiny_corpus.eos_id)
    assert encoder.same_as(tiny_corpus)
    other = Encoder(plain(own_tokenizer_json()), 0)
    assert not other.same_as(tiny_corpus)
    many = Evaluation(points=1, sequences=10**6)
    as_they_are = passages(tiny_corpus, "law", encoder, CONTEXT, many)
    # The way of another tokenizer, decoded and encoded again, ends at the same tokens.
    blind = dataclasses.replace(encoder, prefix=(1,))
    object.__setattr__(blind, "eos", 0)

    class Other(Encoder):
        def same_as(self, corpus):
            return False

    encoded = passages(tiny_corpus, "law", Other(blind.tokenizer, 0), CONTEXT, many)
    for a, b in zip(as_they_are.tokens, encoded.tokens, strict=True):
        assert a.tolist() == b.tolist()
    assert encoded.scored_S.tolist() == as_they_are.scored_S.tolist()


UNEVEN = ["naïve café €5 — 東京 ", "x", "🙂🙃🙂 done", "plain words and words", " lead and trail  "]


@pytest.mark.parametrize("context", [1, 3, 8])
def test_every_byte_is_predicted_once_and_no_character_is_cut(tmp_path, context):
    rows = [{"text": UNEVEN[i % 5] * (1 + i % 3) + str(i)} for i in range(600)]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    corpus = build_corpus(
        [Source(path=str(tmp_path / "t.jsonl"), domain="t")],
        tmp_path / "c", tokenizer=290, heldout_share=0.2,
    )  # fmt: skip
    tokenizer = plain(own_tokenizer_json())
    found = passages(
        corpus, "t", Encoder(tokenizer, 0), context, Evaluation(points=1, sequences=10**6)
    )
    scored = [row[len(row) - n :] for row, n in zip(found.tokens, found.scored_S, strict=True)]
    stream, shard = np.concatenate(scored), corpus.heldout("t")
    texts = []
    for ids, decoder in ((stream, tokenizer), (shard, corpus.tokenizer())):
        texts.append(decoder.decode([int(i) for i in ids], skip_special_tokens=False))
    # All but the first token, and what the last whole sequence leaves over.
    assert texts[0][:-40] and texts[1].find(texts[0][:-40]) <= 40
    assert "\ufffd" not in texts[0] and len(texts[1]) - len(texts[0]) < 40
    for row, n, before in zip(found.tokens[1:], found.scored_S[1:], scored, strict=False):
        if n and len(before):
            assert row[len(row) - n - 1] == before[-1]  # the token before the first predicted one


SHAPE = ModelShape(layers=2, width=32, heads=4, ffn_width=48, vocab_size=300, context=CONTEXT)


@pytest.fixture(scope="module")
def trained(tiny_corpus, tmp_path_factory):
    """Two experts of a sweep: their store, specs, records and checkpoints."""
    store = rayx.open(tmp_path_factory.mktemp("trained") / "s", create=True)
    specs = [
        TrainSpec(
            corpus=tiny_corpus.fingerprint,
            model=dataclasses.replace(SHAPE, vocab_size=tiny_corpus.vocab_size),
            schedule=Schedule.constant(Mixture({domain: 1.0}), 4 * CONTEXT * 20),
            optimizer=Optimizer(lr=0.01, batch_sequences=4),
            evaluation=EVALUATION,
        )
        for domain in ("code", "law")
    ]
    keep = {spec.run_id: [spec.steps] for spec in specs}
    records = train_pack(specs, tiny_corpus, store=store, keep=keep)
    files = [f"{store.root}/{Parent(s, s.steps).checkpoint}" for s in specs]
    return store, specs, records, files


def test_a_checkpoint_has_the_losses_of_its_record(tiny_corpus, trained):
    _, _, records, files = trained
    for record, file in zip(records, files, strict=True):
        for target, loss in evaluated(file, tiny_corpus).items():
            assert loss.bpb == pytest.approx(record.losses[target].bpb, rel=1e-6)
            assert loss.stderr_bpb == pytest.approx(record.losses[target].stderr_bpb, rel=1e-4)


def test_a_proxy_saved_as_a_llama_has_the_losses_of_its_record(tiny_corpus, trained, tmp_path):
    _, specs, records, files = trained
    shape, tensors = specs[0].model, open_model(files[0]).tensors
    config = config_of(
        "llama", shape.vocab_size, num_key_value_heads=4, tie_word_embeddings=True,
        rms_norm_eps=1e-5,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(tensors["embedding"])
        model.model.norm.weight.copy_(tensors["norm"])
        for i, layer in enumerate(model.model.layers):
            own = f"layers.{i}."
            p = {n.removeprefix(own): t for n, t in tensors.items() if n.startswith(own)}
            for name, part in zip("qkv", p["qkv"].chunk(3, dim=1), strict=True):
                getattr(layer.self_attn, f"{name}_proj").weight.copy_(part.T)
            gate, up = p["gate_up"].chunk(2, dim=1)
            layer.self_attn.o_proj.weight.copy_(p["attention_out"].T)
            layer.mlp.gate_proj.weight.copy_(gate.T)
            layer.mlp.up_proj.weight.copy_(up.T)
            layer.mlp.down_proj.weight.copy_(p["down"].T)
            layer.input_layernorm.weight.copy_(p["attention_norm"])
            layer.post_attention_layernorm.weight.copy_(p["ffn_norm"])
    model.save_pretrained(tmp_path / "m")
    tokenizer = Tokenizer.from_str(tiny_corpus.tokenizer().to_str())
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>"
    )
    fast.save_pretrained(tmp_path / "m")
    for target, loss in evaluated(tmp_path / "m", tiny_corpus).items():
        expected = records[0].losses[target]
        assert loss.bpb == pytest.approx(expected.bpb, rel=1e-5)
        assert loss.nats == pytest.approx(expected.nats, rel=1e-5)
        assert loss.stderr_bpb == pytest.approx(expected.stderr_bpb, rel=1e-3)


TASK = Operator(name="ties", density=0.5, scale=0.8)


@pytest.mark.parametrize(
    ("kind", "operator", "changes"),
    [
        ("llama", Operator(), {"tie_word_embeddings": True}),
        ("llama", TASK, {"tie_word_embeddings": False}),
        ("gpt2", Operator(name="task_arithmetic"), {}),
        ("gpt2", Operator(name="multi_slerp"), {"dtype": torch.bfloat16, "shard": "20KB"}),
        ("mixtral", TASK, {}),  # its loader fuses the tensors of experts: files are merged as such
    ],
)
def test_merged_in_memory_is_merged_on_disk(
    tiny_corpus, tmp_path, monkeypatch, kind, operator, changes
):
    from safetensors.torch import load_file, save_file

    from rayx.proxy.merge.operators import merge_tensor

    tokens = own_tokenizer_json()
    base = save_model(tmp_path / "base", tokens, kind=kind, **changes)
    folders = [
        save_model(tmp_path / f"e{i}", tokens, kind=kind, seed=i + 1, near=base, **changes)
        for i in range(3)
    ]
    experts = [open_model(str(folder)) for folder in folders]
    experts[0].prepare(tiny_corpus, CONTEXT, EVALUATION)
    merged = MergedModels(experts, operator, open_model(str(base)))
    written = shutil.copytree(base, tmp_path / "written")
    weights_CK = np.array([[0.2, 0.5, 0.3], [0.0, 0.0, 1.0]])
    found = merged.losses(weights_CK)
    monkeypatch.setattr("rayx.proxy.models.HELD_BYTES", 0)  # read for each call, as large ones are
    assert MergedModels(experts, operator, open_model(str(base))).losses(weights_CK) == found
    for losses, weights_K in zip(found, weights_CK, strict=True):
        for file in folders[0].glob("*.safetensors"):
            parts = [load_file(folder / file.name) for folder in (*folders, base)]
            save_file(
                {
                    name: merge_tensor(
                        operator, torch.stack([p[name] for p in parts[:3]]),
                        torch.from_numpy(weights_K[None]),
                        parts[3][name] if operator.needs_base else None, name,
                    )[0]
                    for name in parts[0]
                },
                written / file.name, metadata={"format": "pt"},
            )  # fmt: skip
        for target, loss in evaluated(written, tiny_corpus).items():
            assert losses[target].bpb == pytest.approx(loss.bpb, rel=1e-5)
            assert losses[target].stderr_bpb == pytest.approx(loss.stderr_bpb, rel=1e-3)
    if operator.name == "linear":  # the second row is the third expert, and the first is unharmed
        alone = evaluated(folders[2], tiny_corpus)
        assert {t: v.bpb for t, v in found[1].items()} == pytest.approx(
            {t: v.bpb for t, v in alone.items()}, rel=1e-6
        )
        assert experts[0].losses()[0] == evaluated(folders[0], tiny_corpus)


def test_merged_checkpoints_are_evaluated_by_the_same_code(tiny_corpus, trained):
    _, specs, records, files = trained
    experts = [open_model(file) for file in files]
    experts[0].prepare(tiny_corpus, CONTEXT, EVALUATION)
    merged = MergedModels(experts, Operator(), None)
    found = merged.losses(np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]))
    for losses, record in ((found[0], records[0]), (found[2], records[1])):
        for target, loss in record.losses.items():
            assert losses[target].bpb == pytest.approx(loss.bpb, rel=1e-5)
    assert all(found[1][t].bpb < records[0].losses[t].bpb for t in ("law",))
