"""Can these models be merged? Every difference that would spoil a merge, found in headers alone."""

from __future__ import annotations

from collections.abc import Sequence

from rayx.errors import ModelError
from rayx.proxy.merge.model_files import ModelFiles

LISTED = 8  # differences that a message names
# Two models with tensors of equal shapes compute other functions where one of these differs.
SAME_FUNCTION = (
    "model_type",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "activation_function",
    "tie_word_embeddings",
)
INCIDENTAL = (
    "_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
VOCABULARY = ("embed", "wte", "lm_head", "head.weight")


def check_compatible(first: ModelFiles, others: Sequence[ModelFiles]) -> list[str]:
    """Return warnings about differences that a merge can bear.

    Raises:
        ModelError: A model differs from the first in kind, architecture, tensors or vocabulary.
    """
    warnings = []
    vocabulary = first.vocabulary()
    for other in others:
        if other.is_folder != first.is_folder:
            raise ModelError(
                f"{other.label} ({other.path}) is a {_kind(other)} and {first.label} "
                f"({first.path}) a {_kind(first)}; give all in one layout."
            )
        for name in SAME_FUNCTION:
            mine, theirs = (m.config.get(name, "(not set)") for m in (first, other))
            if mine != theirs:
                raise ModelError(
                    f"config.json has {name} {theirs!r} in {other.label} and {mine!r} in "
                    f"{first.label}; only models of one architecture are merged."
                )
        mine, theirs = (m.metadata.get("model") for m in (first, other))
        if mine and theirs and mine != theirs:  # the shape that checkpoints of rayx state
            raise ModelError(
                f"{other.label} ({other.path}) is a model of shape {theirs} and {first.label} of "
                f"{mine}; only models of one architecture are merged."
            )
        wrong = _differences(first, other)
        if wrong:
            more = f"; and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
            raise ModelError(
                f"{other.label} ({other.path}) cannot be merged with {first.label} "
                f"({first.path}): {'; '.join(wrong[:LISTED])}{more}."
            )
        theirs = other.vocabulary()
        if vocabulary is not None and theirs is not None and vocabulary != theirs:
            raise ModelError(_vocabularies_differ(first, vocabulary, other, theirs))
        keys = sorted(set(first.config) | set(other.config))
        differ = [
            k for k in keys if k not in INCIDENTAL and first.config.get(k) != other.config.get(k)
        ]
        if differ:
            warnings.append(
                f"config.json of {other.label} differs from {first.label}'s, which is kept, in "
                f"{', '.join(differ[:LISTED])}."
            )
    return warnings


def _kind(model: ModelFiles) -> str:
    return "folder" if model.is_folder else "file"


def _differences(first: ModelFiles, other: ModelFiles) -> list[str]:
    """Return what differs, tensor by tensor, in words."""
    wrong = [f"tensor {n!r} is missing" for n in first.tensors if n not in other.tensors]
    wrong += [
        f"tensor {n!r} is in it and not in {first.label}"
        for n in other.tensors
        if n not in first.tensors
    ]
    for name, mine in first.tensors.items():
        theirs = other.tensors.get(name)
        if theirs is None:
            continue
        if mine.shape != theirs.shape:
            rows = mine.shape[1:] == theirs.shape[1:] and any(part in name for part in VOCABULARY)
            wrong.append(
                f"the vocabularies differ: {name!r} has {theirs.shape[0]} rows and {mine.shape[0]} "
                f"in {first.label}"
                if rows
                else f"tensor {name!r} has shape {theirs.shape} and {mine.shape} in {first.label}"
            )
        elif mine.dtype != theirs.dtype:
            wrong.append(
                f"tensor {name!r} is {theirs.dtype} and {mine.dtype} in {first.label} (save both "
                "in one dtype)"
            )
    return wrong


def _vocabularies_differ(
    first: ModelFiles, mine: dict[str, int], other: ModelFiles, theirs: dict[str, int]
) -> str:
    changed = [t for t in sorted(set(mine) | set(theirs)) if mine.get(t) != theirs.get(t)]
    token = changed[0]
    return (
        f"The tokenizers of {other.label} and {first.label} differ in {len(changed)} of "
        f"{len(theirs)} and {len(mine)} tokens: {token!r} is {theirs.get(token)} and "
        f"{mine.get(token)}. Rows of their embeddings mean different tokens; merge models of one "
        "tokenizer."
    )
