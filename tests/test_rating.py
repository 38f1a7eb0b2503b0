"""Language models as raters: what they say is what the model says, whatever shares the batch."""

import dataclasses
import json
import math
import pickle

import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from rayx.corpus.labels.raters import rated
from rayx.corpus.tokenizer import EOS, plain
from rayx.errors import ModelError, SpecError
from rayx.proxy.model import Rotary, initial_parameters, token_losses
from rayx.proxy.rating import PerplexityRater, PromptRater
from rayx.spec import ModelShape
from tests.conftest import sentences
from tests.tiny_models import POSITIONS, own_tokenizer_json, save_model

TEXTS = ["def é return x" * 3, "a", *sentences("news", 3, 5), "", f"end {EOS} or not"]
PROMPT = f"{EOS}rate: {{text}}\nfrom 1 to 5: "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("model"), own_tokenizer_json()))


@pytest.fixture(scope="module")
def module(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def documents(texts) -> pa.Table:
    return pa.table({"text": texts})


def test_perplexity_is_the_models_own_in_bits_per_byte(folder, module):
    found = PerplexityRater("bpb", folder, tokens=20).rate(documents(TEXTS))
    tokenizer = plain(own_tokenizer_json())
    eos = tokenizer.token_to_id(EOS)
    for text, bits in zip(TEXTS, found, strict=True):
        ids = tokenizer.encode(text).ids[:20]
        if not ids:
            assert bits is None
            continue
        logits = module(input_ids=torch.tensor([[eos, *ids]])).logits[0, :-1].double()
        nats = -logits.log_softmax(-1)[range(len(ids)), ids].sum().item()
        num_bytes = len(tokenizer.decode(ids, skip_special_tokens=False).encode())
        assert bits == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5), text


def test_perplexity_is_of_the_beginning_alone(folder):
    long = " ".join(sentences("law", 4, 0))
    rater = PerplexityRater("bpb", folder, tokens=10)
    short, other = rater.rate(documents([long[:200], long]))
    assert short == other
    whole = PerplexityRater("bpb", folder, tokens=10**6).rate(documents([long]))
    most = PerplexityRater("bpb", folder, tokens=POSITIONS - 1).rate(documents([long]))
    assert whole == most != [short]


def test_a_checkpoint_of_rayx_rates_with_its_corpus_tokenizer(tiny_corpus, tmp_path):
    shape = ModelShape(layers=1, width=16, heads=2, ffn_width=32,
                       vocab_size=tiny_corpus.vocab_size, context=32)  # fmt: skip
    parameters = initial_parameters(shape, seed=1)
    file = tmp_path / "run.safetensors"
    save_file(parameters, file, {"model": json.dumps(dataclasses.asdict(shape))})
    tokenizer = f"{tiny_corpus.url}/tokenizer.json"
    texts = [text for text in TEXTS if text]
    found = PerplexityRater("bpb", str(file), tokenizer=tokenizer).rate(documents(texts))
    own = plain(tiny_corpus.tokenizer().to_str())
    for text, bits in zip(texts, found, strict=True):
        ids = own.encode(text).ids[:32]
        tokens = torch.tensor([[[tiny_corpus.eos_id, *ids]]])
        stacked = {name: tensor[None] for name, tensor in parameters.items()}
        nats = token_losses(stacked, shape, Rotary(shape, torch.device("cpu")), tokens).sum().item()
        num_bytes = len(own.decode(ids, skip_special_tokens=False).encode())
        assert bits == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5), text
    with pytest.raises(SpecError, match="needs its corpus' tokenizer.json"):
        PerplexityRater("bpb", str(file)).rate(documents(texts))
    with pytest.raises(ModelError, match="needs a folder of a Hugging Face model"):
        PromptRater("r", str(file), PROMPT).rate(documents(texts))


def test_a_rating_is_the_mean_of_the_answers_by_probability(folder, module):
    texts = [text for text in TEXTS if len(text) < 60]
    found = rated(PromptRater("rating", folder, PROMPT), documents(texts)).to_pylist()
    marking, reading = Tokenizer.from_str(own_tokenizer_json()), plain(own_tokenizer_json())
    before, after = (marking.encode(part).ids for part in PROMPT.split("{text}"))
    assert before[0] == marking.token_to_id(EOS)
    answers = [reading.token_to_id(str(k)) for k in range(1, 6)]
    for text, rating in zip(texts, found, strict=True):
        # Special tokens are marks in a prompt and plain text in documents.
        ids = [*before, *reading.encode(text).ids, *after]
        shares = module(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1)[answers]
        expected = (shares * torch.arange(1, 6)).sum() / shares.sum()
        assert rating == pytest.approx(expected.item(), rel=1e-5)
    assert min(found) > 1 and max(found) < 5 and len(set(found)) == len(texts)


def test_a_prompt_keeps_its_end_however_long_the_document(folder):
    long = sentences("news", 1, 0)[0] * 5
    rater = PromptRater("rating", folder, PROMPT, tokens=10**6)
    assert rater.rate(documents([long])) == rater.rate(documents([long + " and more"]))


def test_raters_travel_and_know_their_model(folder):
    rater = PromptRater("rating", folder, PROMPT, answers={"1": 0.0, "5": 1.0})
    again = pickle.loads(pickle.dumps(rater))
    assert again.rate(documents(TEXTS)) == rater.rate(documents(TEXTS))
    assert json.loads(json.dumps(rater.facts)) == json.loads(json.dumps(again.facts))
    assert "model.safetensors" in json.dumps(rater.facts)
    assert PerplexityRater("a", folder, device="cuda").parallel_bytes == math.inf


def test_a_model_that_does_not_answer_is_warned_of(folder, caplog):
    PromptRater("rating", folder, PROMPT).rate(documents(TEXTS))
    assert "it does not answer this prompt" in caplog.text


@pytest.mark.parametrize(
    ("prompt", "answers", "message"),
    [
        ("Rate this.", {}, r"has \{text\} 0 times; expected once"),
        ("{text} {text} ", {}, r"has \{text\} 2 times"),
        ("{text} ", {"answers": {"1": 1.0}}, r"has 1 answers; expected two"),
        ("{text} ", {"answers": {"yes": 1.0, "no": 0.0}}, r"Answer 'yes' is .* expected one token"),
        ("word " * POSITIONS + "{text}: ", {}, r"positions; shorten it"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused(folder, prompt, answers, message):
    with pytest.raises(SpecError, match=message):
        PromptRater("rating", folder, prompt, **answers).rate(documents(TEXTS))


def test_a_folder_that_is_no_model_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="empty"):
        PerplexityRater("bpb", str(tmp_path / "empty")).rate(documents(TEXTS))
    with pytest.raises(ModelError, match="neither a folder of a Hugging Face model"):
        PromptRater("r", str(tmp_path / "none"), PROMPT).rate(documents(TEXTS))
