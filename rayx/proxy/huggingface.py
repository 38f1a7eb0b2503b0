"""Hugging Face causal language models: loaded from a folder and evaluated on a corpus' targets.

Their losses can be compared with the proxies', and with each other's whatever the tokenizer: all
predict the same held-out bytes (`rayx.proxy.heldout_text`), are given about the same bytes before
them, and are divided by the same number of bytes. What cannot be compared are losses at different
contexts: a model that is given `--context 128` cannot show what it would do with 4,096 tokens.
Nats per token are over the model's own tokens, so they compare only under one tokenizer.

`transformers` is an optional extra and is imported when a model is opened. Nothing is downloaded,
no code of a folder is run and nothing is unpickled.

Legend: S sequences of a target, T context, C candidates, (...) a tensor's shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayx.corpus import Corpus
from rayx.corpus.tokenizer import num_ids
from rayx.errors import ModelError, SpecError
from rayx.proxy.heldout_text import Passages, passages
from rayx.proxy.merge.model_files import ModelFiles
from rayx.proxy.model_folder import SAFE, first_line, quiet, read_config, read_encoder
from rayx.proxy.models import StoredTensors
from rayx.record import Loss
from rayx.spec import Evaluation
from rayx.units import bits_per_byte

LOGITS = 1 << 26  # of one forward pass, so that a large vocabulary does not fill the memory
PROBE_TOKENS = 8
USUAL_CONTEXT = 1024  # where a model has positions enough and nobody says


class HuggingFaceModel:
    """A causal language model in a folder; the weights are read when they are first needed.

    Args:
        folder: With config.json, safetensors and a tokenizer.
        device: A torch device. On a CPU the weights are float32, else what the folder holds.

    Raises:
        ModelError: The folder does not hold such a model; the message says what is missing.
    """

    def __init__(self, folder: str, device: str = "cpu") -> None:
        self.name = folder
        self.device = torch.device(device)
        path = Path(folder).expanduser()
        self.files = ModelFiles.open(path, path.name)
        self.config = read_config(path, folder)
        self.encoder = read_encoder(path, folder)
        text = self.config.get_text_config()
        needed, rows = num_ids(self.encoder.tokenizer), getattr(text, "vocab_size", None)
        if rows is not None and needed > rows:
            raise ModelError(
                f"{folder}: its tokenizer has {needed} token ids and the model embeds {rows}. "
                "Give the tokenizer that the model was trained with."
            )
        self.vocab_size: int = rows or needed
        # Of its own tokens; None where positions are unbounded.
        self.context: int | None = getattr(text, "max_position_embeddings", None)
        # Half, for a tokenizer may need twice the corpus' tokens for the same text.
        self.usual_context = min((self.context or 2 * USUAL_CONTEXT) // 2, USUAL_CONTEXT)
        self.tensors: Mapping[str, Tensor] = StoredTensors(self.files)
        self._path = path
        self._texts: dict[str, tuple[Passages, float]] = {}
        self._is_own = True  # whether the module holds its own tensors

    def prepare(self, corpus: Corpus, context: int, evaluation: Evaluation) -> None:
        """Set the text to be evaluated on: the proxies' held-out sequences, in own tokens.

        Args:
            corpus: The corpus.
            context: T, in tokens of the corpus.
            evaluation: How many sequences at most, and of which part of the held-out text.

        Raises:
            CorpusError: A target's held-out text is shorter than one sequence.
            SpecError: A sequence has more tokens than the model has positions.
        """
        self._texts = {}
        for target in corpus.targets:
            found = passages(corpus, target, self.encoder, context, evaluation)
            # As the proxies: bytes per token of the whole held-out shard.
            bits = bits_per_byte(1.0, corpus.heldout_tokens[target], corpus.heldout_bytes[target])
            self._texts[target] = found, bits / context
            longest = max(map(len, found.tokens)) - 1
            if self.context is not None and longest > self.context:
                fits = int(context * self.context / longest)
                raise SpecError(
                    f"{self.name}: {context} tokens of the corpus are up to {longest} of its own "
                    f"(target {target!r}), and it has {self.context} positions. Give a context of "
                    f"about {fits}."
                )

    def losses(self, candidates: Mapping[str, Tensor] | None = None) -> list[dict[str, Loss]]:
        """Return target -> loss of each candidate, or of the model itself.

        Bits per byte are the nats of all tokens that are predicted, documents' ends included, over
        ln 2 times the bytes that the proxies count for this text.

        Args:
            candidates: The folder's tensor names -> stored tensors, shape (C, ...).
        """
        if candidates is None:
            return [self._losses(self._own)]
        count = next(iter(candidates.values())).shape[0]
        results = []
        for c in range(count):
            tensors = {name: stack[c] for name, stack in candidates.items()}
            results.append(self._losses(self._with(tensors)))
        return results

    @torch.no_grad()
    def nats(self) -> dict[str, np.ndarray]:
        """Return target -> nats of each sequence's predicted tokens, shape (S,)."""
        return {target: self._nats(self._own, text) for target, (text, _) in self._texts.items()}

    @torch.no_grad()
    def nats_of(self, text: Passages) -> np.ndarray:
        """Return the nats of each sequence's predicted tokens, shape (S,), of other text."""
        return self._nats(self._own, text)

    @property
    def _own(self) -> nn.Module:
        return self.module if self._is_own else self._with(self.tensors)

    @cached_property
    def module(self) -> nn.Module:
        """The model, in evaluation mode.

        Raises:
            ModelError: Tensors are missing or do not fit, or the model looks ahead.
        """
        import transformers

        path, dtype = str(self._path), self._dtype
        try:
            with quiet():
                module, info = cast(Any, transformers.AutoModelForCausalLM).from_pretrained(
                    path, config=self.config, dtype=dtype, output_loading_info=True, **SAFE
                )
        except Exception as error:  # each architecture has its own ways to fail
            raise ModelError(
                f"{self.name}: the weights cannot be loaded ({first_line(error)}). Save the model "
                "again with save_pretrained."
            ) from error
        if info["missing_keys"] or info["mismatched_keys"]:
            names = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
            raise ModelError(
                f"{self.name}: {len(names)} tensors of the model are not in its files, or have "
                f"another shape: {', '.join(names[:4])}. Save the model again with save_pretrained."
            )
        module = module.to(self.device)
        self._refuse_looking_ahead(module)
        return module

    @property
    def _dtype(self) -> torch.dtype | str:
        return torch.float32 if self.device.type == "cpu" else "auto"

    @torch.no_grad()
    def _refuse_looking_ahead(self, module: nn.Module) -> None:
        ids = torch.arange(PROBE_TOKENS, device=self.device) % self.vocab_size
        changed = torch.stack([ids, ids])
        changed[1, -1] = (ids[-1] + 1) % self.vocab_size
        first, second = module(input_ids=changed, use_cache=False).logits[:, :-1].float()
        # NaN weights are equal to nothing and show up as losses.
        if (first - second).abs().max() > 1e-3 * first.abs().max():
            raise ModelError(
                f"{self.name}: {type(module).__name__} sees the tokens that it is to predict. Give "
                "a causal language model."
            )

    def _with(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Return a module that holds these tensors; the last one returned is overwritten."""
        module = self.module
        if self._places is not None:
            self._is_own = False
            for name, place in self._places.items():
                place.copy_(tensors[name])
            return module
        with quiet():  # names or layouts differ between files and module: let its loader do it
            loaded = cast(Any, type(module)).from_pretrained(
                None,
                config=self.config,
                state_dict=dict(tensors),
                dtype=next(module.parameters()).dtype,
            )
        return loaded.to(self.device)

    @cached_property
    def _places(self) -> dict[str, Tensor] | None:
        """File's names -> the module's tensors, or None where they are not one to one."""
        module = self.module
        state = module.state_dict()  # shares memory with the module
        stored = self.tensors
        places, filled = {}, set()
        for name, place in state.items():
            if name not in stored or place.data_ptr() in filled:  # the second is a tied one
                continue
            tensor = stored[name]
            if tensor.shape != place.shape or not torch.equal(
                tensor.to(place).nan_to_num(), place.nan_to_num()
            ):
                return None
            places[name] = place
            filled.add(place.data_ptr())
        return places if all(p.data_ptr() in filled for p in state.values()) else None

    @torch.no_grad()
    def _losses(self, module: nn.Module) -> dict[str, Loss]:
        results = {}
        for target, (text, bits) in self._texts.items():
            nats_S = self._nats(module, text)
            spread = float(nats_S.std(ddof=1)) / math.sqrt(len(nats_S)) if len(nats_S) > 1 else 0.0
            per_token = float(nats_S.sum()) / max(1, int(text.scored_S.sum()))
            results[target] = Loss(per_token, float(nats_S.mean()) * bits, spread * bits)
        return results

    def _nats(self, module: nn.Module, text: Passages) -> np.ndarray:
        """Return the nats of each sequence's predicted tokens, shape (S,)."""
        width = max(map(len, text.tokens)) - 1
        batch = max(1, LOGITS // (width * self.vocab_size))
        nats_S = np.zeros(len(text.tokens))
        for start in range(0, len(text.tokens), batch):
            rows = [torch.from_numpy(row) for row in text.tokens[start : start + batch]]
            # What pads the shorter rows comes after them, where no token of theirs sees it.
            ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)
            logits = module(input_ids=ids[:, :-1], use_cache=False).logits
            for i, row in enumerate(rows):
                scored, end = int(text.scored_S[start + i]), len(row)
                predicted = logits[i, end - 1 - scored : end - 1].float()
                loss = F.cross_entropy(predicted, ids[i, end - scored : end], reduction="none")
                nats_S[start + i] = float(loss.double().sum())
        return nats_S
