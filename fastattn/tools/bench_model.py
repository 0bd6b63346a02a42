"""The benchmark's whole encoder-decoder: generation and a training step, beside the same model on ``torch.nn``."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastattn.models import Seq2Seq, Seq2SeqConfig
from fastattn.tools.bench_case import Case, relative

# The base model of Vaswani et al. 2017, table 3, with a vocabulary a side.
BASE = Seq2SeqConfig(source_vocab_size=32000, target_vocab_size=32000)
# Sequences that gradients are checked on: float64 takes seconds for each.
_CHECKED_SEQUENCES = 2
# Each of twelve layers rounds anew: in bfloat16 gradients are off by 3 to 4 %, in PyTorch as here.
_TOLERANCE = 3.0
_SEED = 11


def cases(name: str, row: Mapping[str, Any], dtype: torch.dtype) -> Iterator[Case]:
    """Yields the case of one row: its ``task`` is "generate" or "train_step"."""
    make = _generate if row["task"] == "generate" else _train_step
    yield make(name, row, dtype)


def _models(dtype: torch.dtype, activation: str) -> tuple[Seq2Seq, Seq2Seq]:
    """Returns a random model, and the same weights on ``torch.nn.Transformer``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        ours = Seq2Seq(BASE.replace(activation=activation))
    with torch.no_grad():
        # Their logits are 0 and never the largest: nothing ends before its time.
        ours.target_embedding.weight[[BASE.pad_id, BASE.bos_id, BASE.eos_id, BASE.unk_id]] = 0.0
    ours.to(dtype)
    stock = copy.deepcopy(ours)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "enable_nested_tensor")
        transformer = nn.Transformer(
            BASE.model_dim,
            BASE.num_heads,
            BASE.num_encoder_layers,
            BASE.num_decoder_layers,
            BASE.ff_dim,
            BASE.dropout,
            activation,
            layer_norm_eps=BASE.layer_norm_eps,
            batch_first=True,
            norm_first=BASE.norm_first,
            dtype=dtype,
        )
    transformer.load_state_dict(ours.transformer.state_dict())
    stock.transformer = transformer  # type: ignore[assignment]
    return ours, stock


def _tokens(vocab_size: int, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    first = 1 + max(BASE.pad_id, BASE.bos_id, BASE.eos_id, BASE.unk_id)
    return torch.randint(first, vocab_size, (batch, length), generator=generator)


def _generate(name: str, row: Mapping[str, Any], dtype: torch.dtype) -> Case:
    ours, stock = _models(dtype, BASE.activation)
    batch, new_tokens = row["batch"], row["new_tokens"]
    source = _tokens(BASE.source_vocab_size, batch, row["source"])
    bos = source.new_full((batch, 1), BASE.bos_id)

    def generate() -> list[list[int]]:
        return ours.generate(source, max_new_tokens=new_tokens)

    @torch.no_grad()
    def peer() -> Tensor:
        """Greedy search; ``torch.nn`` keeps no keys, so that every step decodes all tokens so far."""
        stock.eval()
        memory, padding, ids = stock.encode(source), source == BASE.pad_id, bos
        for _ in range(new_tokens):
            hidden = stock.decode(ids, memory, padding)[:, -1]
            ids = torch.cat((ids, (hidden @ stock.target_embedding.weight.T).argmax(-1, keepdim=True)), dim=1)
        return ids

    @torch.no_grad()
    def error() -> float:
        """By how much float64 likes the chosen tokens less than the best ones: close calls may go either way."""
        found = torch.tensor(generate())
        if found.shape != (batch, new_tokens):
            return float("inf")
        logits = copy.deepcopy(stock).double().eval()(source, torch.cat((bos, found[:, :-1]), dim=1))
        return relative(logits.gather(-1, found[..., None])[..., 0], logits.amax(-1))

    encoder, decoder = _parameters(ours)
    flops = 2.0 * batch * (row["source"] * encoder + new_tokens * decoder)
    return Case("model", name, "greedy", generate, {"torch.nn": peer}, flops, "GFLOP/s", error, _TOLERANCE)


def _train_step(name: str, row: Mapping[str, Any], dtype: torch.dtype) -> Case:
    ours, stock = _models(dtype, BASE.activation)
    batch = row["batch"]
    source = _tokens(BASE.source_vocab_size, batch, row["source"])
    target = _tokens(BASE.target_vocab_size, batch, row["target"] + 1)
    target[:, 0] = BASE.bos_id

    def loss(model: Seq2Seq, source: Tensor, target: Tensor) -> Tensor:
        return model.loss(source, target, label_smoothing=BASE.label_smoothing)

    def stock_loss(model: Seq2Seq, source: Tensor, target: Tensor) -> Tensor:
        logits = model(source, target[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), label_smoothing=BASE.label_smoothing)

    def step(model: Seq2Seq, loss: Callable[[Seq2Seq, Tensor, Tensor], Tensor]) -> Callable[[], Any]:
        parameters = list(model.parameters())
        return lambda: torch.autograd.grad(loss(model.train(), source, target), parameters)

    def error() -> float:
        few = source[:_CHECKED_SEQUENCES], target[:_CHECKED_SEQUENCES]
        # Without ReLU: which side of its kink a unit falls on changes gradients by 1e-3, and either may be right.
        smooth, exact = _models(dtype, "gelu")
        exact.double()
        # Evaluation mode: without dropout.
        found, wanted = loss(smooth.eval(), *few), stock_loss(exact.eval(), *few)
        parameters = dict(exact.named_parameters())
        grads = torch.autograd.grad(found, list(smooth.parameters()))
        exact_grads = torch.autograd.grad(wanted, [parameters[name] for name, _ in smooth.named_parameters()])
        whole = (torch.cat([g.flatten().double() for g in gs]) for gs in (grads, exact_grads))
        return max(relative(found, wanted), relative(*whole))

    encoder, decoder = _parameters(ours)
    flops = 6.0 * batch * (row["source"] * encoder + row["target"] * decoder)
    peers = {"torch.nn": step(stock, stock_loss)}
    return Case("model", name, "train step", step(ours, loss), peers, flops, "GFLOP/s", error, _TOLERANCE)


def _parameters(model: Seq2Seq) -> tuple[int, int]:
    """Returns how many weights a source token and a target token are multiplied by; attention's products are few."""
    encoder, decoder = (
        sum(p.numel() for p in part.parameters()) for part in (model.transformer.encoder, model.transformer.decoder)
    )
    return encoder, decoder + model.target_embedding.weight.numel()
