"""What lies in a folder of a Hugging Face model, read and checked before any weight is.

Nothing is downloaded, no code of a folder is run and nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rayx.corpus.tokenizer import plain
from rayx.errors import ModelError
from rayx.proxy.heldout_text import Encoder

SAFE: dict[str, Any] = {
    "local_files_only": True, "trust_remote_code": False, "use_safetensors": True,
}  # fmt: skip


def read_config(path: Path, folder: str) -> Any:
    """Read and check the configuration; no weights are read."""
    try:
        import transformers
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except ImportError:
        raise ModelError(
            f"{folder} is a Hugging Face model, and transformers is not installed. Install it: "
            "pip install 'rayx-mix[hf]'"
        ) from None
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        kind = "needs code of its own" if "auto_map" in (path / "config.json").read_text() else ""
        raise ModelError(
            f"{folder}: its config.json {kind or 'cannot be read'} ({first_line(error)}). Give a "
            "model that transformers knows without the folder's code."
        ) from error
    known = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES).get(config.model_type)
    names = (known,) if isinstance(known, str) else tuple(known or ())
    stated = tuple(getattr(config, "architectures", None) or names)
    if not set(names) & set(stated):
        raise ModelError(
            f"{folder}: it is a {', '.join(stated) or config.model_type} and not a causal language "
            f"model{f' ({names[0]})' if names else ''}."
        )
    return config


def read_encoder(path: Path, folder: str) -> Encoder:
    """Read the tokenizer."""
    import transformers

    if not any((path / f).is_file() for f in ("tokenizer.json", "tokenizer_config.json")):
        raise ModelError(
            f"{folder}: it has no tokenizer (tokenizer.json). Save it beside the model with "
            "tokenizer.save_pretrained."
        )
    try:
        with quiet():
            found = transformers.AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        raise ModelError(
            f"{folder}: its tokenizer cannot be read ({first_line(error)})."
        ) from error
    if not found.is_fast:
        raise ModelError(
            f"{folder}: its tokenizer does not say where in the text its tokens lie; give one with "
            "a tokenizer.json."
        )
    if found.eos_token_id is None:
        raise ModelError(
            f"{folder}: its tokenizer has no end-of-text token. Set eos_token in "
            "tokenizer_config.json."
        )
    begins = found("")["input_ids"][:1]
    prefix = tuple(begins) if begins and begins[0] == found.bos_token_id else ()
    return Encoder(plain(found.backend_tokenizer.to_str()), found.eos_token_id, prefix)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the library's bars and remarks off the terminal, and put its settings back."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:200]
