"""A model as a folder: config.json, model.safetensors, tokenizer.json; what is wrong with one is said with its name."""

from __future__ import annotations

import os
import pathlib
from typing import TYPE_CHECKING, Any

import safetensors.torch

from fastattn.models.config import Seq2SeqConfig
from fastattn.models.files import write_atomically
from fastattn.models.tokenizer import Seq2SeqTokenizer

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"


def save(
    folder: str | os.PathLike[str], config: Seq2SeqConfig, model: nn.Module, tokenizer: Seq2SeqTokenizer | None
) -> None:
    """Write the folder; each file is replaced whole.  The configuration comes last: with it the folder is complete."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in _unique(model.state_dict()).items()}
    contents = {WEIGHTS: safetensors.torch.save(weights, metadata={"format": "pt"})}
    if tokenizer is not None:
        contents[TOKENIZER] = tokenizer.to_json().encode()
    contents[CONFIG] = config.to_json().encode()  # metadata that is no JSON fails here, before anything is written
    path = pathlib.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_atomically(path / name, content)


def load_config(folder: str | os.PathLike[str]) -> Seq2SeqConfig:
    """The configuration in a folder.

    Raises:
        FileNotFoundError: no folder, or no ``config.json`` in it.
        ValueError: a damaged or wrong file; the message names it.
    """
    path = _existing(folder, CONFIG)
    try:
        return Seq2SeqConfig.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def load_tokenizer(folder: str | os.PathLike[str], config: Seq2SeqConfig) -> Seq2SeqTokenizer | None:
    """The tokenizer in a folder, checked against the fingerprint; None for a model that never had one.

    Raises:
        FileNotFoundError: the model was trained with a tokenizer and it is missing.
        ValueError: a damaged file, or another tokenizer than the model was trained with.
    """
    if config.tokenizer_fingerprint is None:
        return None
    path = _existing(folder, TOKENIZER)
    try:
        tokenizer = Seq2SeqTokenizer.from_json(path.read_text(encoding="utf-8"))
        check_tokenizer(tokenizer, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return tokenizer


def load_weights(folder: str | os.PathLike[str], model: nn.Module) -> None:
    """Copy the weights in a folder into a model of the same configuration, strictly.

    Raises:
        FileNotFoundError: no ``model.safetensors``.
        ValueError: a damaged or truncated file, or tensors that the model does not have in that shape.
    """
    path = _existing(folder, WEIGHTS)
    try:
        weights = safetensors.torch.load_file(path)
    except Exception as error:  # safetensors has an exception of its own that is no ValueError
        raise ValueError(
            f"{path} is damaged or no safetensors file ({path.stat().st_size:,} bytes): {error}"
        ) from error
    expected = _unique(model.state_dict())
    problems = [f"missing {name}" for name in expected if name not in weights]
    problems += [f"unexpected {name}" for name in weights if name not in expected]
    problems += [
        f"{name} is {list(weights[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(f"{path} does not fit {CONFIG} beside it: {shown}")
    # Tied tensors are stored once; loading that one fills them all.
    model.load_state_dict(weights, strict=False)


def check_tokenizer(tokenizer: Seq2SeqTokenizer, config: Seq2SeqConfig) -> None:
    """Refuse a tokenizer other than the one the model was trained with.

    Raises:
        ValueError: another fingerprint, or vocabularies of other sizes.
    """
    if config.tokenizer_fingerprint not in (None, tokenizer.fingerprint):
        raise ValueError(
            "this is not the tokenizer the model was trained with: its token ids mean other things "
            f"(fingerprint {tokenizer.fingerprint[:12]}, expected {str(config.tokenizer_fingerprint)[:12]})"
        )
    sizes = (tokenizer.source.vocab_size, tokenizer.target.vocab_size)
    expected = (config.source_vocab_size, config.target_vocab_size)
    if sizes != expected:
        raise ValueError(f"the tokenizer has {sizes} source and target tokens, the model expects {expected}")


def _existing(folder: str | os.PathLike[str], name: str) -> pathlib.Path:
    path = pathlib.Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"no model folder {path}")
    if not (path / name).is_file():
        raise FileNotFoundError(f"{path / name} is missing; a model folder holds {CONFIG}, {WEIGHTS} and {TOKENIZER}")
    return path / name


def _unique(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state without further names of the same tensor (safetensors stores no sharing)."""
    seen: set[tuple[Any, ...]] = set()
    unique = {}
    for name, tensor in state.items():
        identity = (tensor.data_ptr(), tensor.storage_offset(), tuple(tensor.shape))
        if tensor.numel() and identity in seen:
            continue
        seen.add(identity)
        unique[name] = tensor
    return unique
