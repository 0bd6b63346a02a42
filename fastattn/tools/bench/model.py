"""The benchmark's whole encoder-decoder: generation and a training step, beside the same model on ``torch.nn``.

The training step is timed as a user gets it: ``fastattn.swap`` on the stock model, whose loss stays PyTorch's; and with
fastattn's own loss, which holds no tokens x vocabulary.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastattn.models import Seq2Seq, Seq2SeqConfig
from fastattn.tools.bench.case import SEED, Case, relative
from fastattn.tools.bench.workload import ModelWorkload
from fastattn.tools.swap import swap

# The base model of Vaswani et al. 2017, table 3, with a vocabulary a side.
BASE = Seq2SeqConfig(source_vocab_size=32000, target_vocab_size=32000)
# Sequences that gradients are checked on: float64 takes seconds for each.
_CHECKED_SEQUENCES = 2
# Each of twelve layers rounds anew: in bfloat16 gradients are off by 3 to 4 %, in PyTorch as here.
_TOLERANCE = 3.0


def cases(name: str, row: Mapping[str, Any], dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Yields the cases of one row: its ``task`` is "generate" or "train_step"."""
    make = _generate if row["task"] == "generate" else _train_step
    yield from make(name, row, dtype, device)


def _models(dtype: torch.dtype, device: str, activation: str) -> tuple[Seq2Seq, Seq2Seq]:
    """Returns a random model, and the same weights on ``torch.nn.Transformer``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        ours = Seq2Seq(BASE.replace(activation=activation))
    with torch.no_grad():
        # Their logits are 0 and never the largest: nothing ends before its time.
        ours.target_embedding.weight[[BASE.pad_id, BASE.bos_id, BASE.eos_id, BASE.unk_id]] = 0.0
    ours.to(device, dtype)
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
            device=device,
            dtype=dtype,
        )
    transformer.load_state_dict(ours.transformer.state_dict())
    stock.transformer = transformer  # type: ignore[assignment]
    return ours, stock


def _tokens(vocab_size: int, batch: int, length: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    first = 1 + max(BASE.pad_id, BASE.bos_id, BASE.eos_id, BASE.unk_id)
    return torch.randint(first, vocab_size, (batch, length), generator=generator).to(device)


def stock_call(work: ModelWorkload) -> Callable[[], Any]:
    """Returns the workload's call on ``torch.nn.Transformer``, which keeps no keys: every step decodes all tokens so
    far."""
    stock, source, target = work.stock, work.source, work.target
    if target is not None:
        return _step(stock, partial(_stock_loss, stock, source, target))
    config = stock.config

    @torch.no_grad()
    def generate() -> Tensor:
        stock.eval()
        ids = source.new_full((source.shape[0], 1), config.bos_id)
        memory, padding = stock.encode(source), source == config.pad_id
        for _ in range(work.new_tokens):
            hidden = stock.decode(ids, memory, padding)[:, -1]
            ids = torch.cat((ids, (hidden @ stock.target_embedding.weight.T).argmax(-1, keepdim=True)), dim=1)
        return ids

    return generate


def _generate(name: str, row: Mapping[str, Any], dtype: torch.dtype, device: str) -> Iterator[Case]:
    ours, stock = _models(dtype, device, BASE.activation)
    batch, new_tokens = row["batch"], row["new_tokens"]
    source = _tokens(BASE.source_vocab_size, batch, row["source"], device)

    def generate() -> list[list[int]]:
        return ours.generate(source, max_new_tokens=new_tokens)

    @torch.no_grad()
    def error() -> float:
        """By how much float64 likes the chosen tokens less than the best ones: close calls may go either way."""
        found = torch.tensor(generate(), device=device)
        if found.shape != (batch, new_tokens):
            return float("inf")
        bos = source.new_full((batch, 1), BASE.bos_id)
        logits = copy.deepcopy(stock).double().eval()(source, torch.cat((bos, found[:, :-1]), dim=1))
        return relative(logits.gather(-1, found[..., None])[..., 0], logits.amax(-1))

    encoder, decoder = _parameters(ours)
    yield Case(
        family="model",
        name=name,
        direction="greedy",
        shape=row,
        ours=generate,
        workload=ModelWorkload(stock, source, new_tokens=new_tokens),
        error=error,
        tolerance=_TOLERANCE,
        flops=2.0 * batch * (row["source"] * encoder + new_tokens * decoder),
    )


def _train_step(name: str, row: Mapping[str, Any], dtype: torch.dtype, device: str) -> Iterator[Case]:
    ours, stock = _models(dtype, device, BASE.activation)
    batch = row["batch"]
    source = _tokens(BASE.source_vocab_size, batch, row["source"], device)
    target = _tokens(BASE.target_vocab_size, batch, row["target"] + 1, device)
    target[:, 0] = BASE.bos_id
    swapped = _swapped(stock)
    encoder, decoder = _parameters(ours)
    for direction, model, loss in (("train step", swapped, _stock_loss), ("train step, fused loss", ours, _loss)):
        yield Case(
            family="model",
            name=name,
            direction=direction,
            shape=row,
            ours=_step(model, partial(loss, model, source, target)),
            workload=ModelWorkload(stock, source, target),
            error=partial(_step_error, loss, source[:_CHECKED_SEQUENCES], target[:_CHECKED_SEQUENCES], dtype, device),
            tolerance=_TOLERANCE,
            flops=6.0 * batch * (row["source"] * encoder + row["target"] * decoder),
        )


def _swapped(stock: Seq2Seq) -> Seq2Seq:
    model = copy.deepcopy(stock)
    swap(model, verbose=False)
    return model


def _step_error(loss: Callable[..., Tensor], source: Tensor, target: Tensor, dtype: torch.dtype, device: str) -> float:
    """Returns the error of the loss or of all gradients together, in evaluation mode: without dropout."""
    # Without ReLU: which side of its kink a unit falls on changes gradients by 1e-3, and either may be right.
    ours, exact = _models(dtype, device, "gelu")
    model = ours if loss is _loss else _swapped(exact)
    exact.double()
    found, wanted = loss(model.eval(), source, target), _stock_loss(exact.eval(), source, target)
    parameters = dict(exact.named_parameters())
    grads = torch.autograd.grad(found, list(model.parameters()))
    exact_grads = torch.autograd.grad(wanted, [parameters[name] for name, _ in model.named_parameters()])
    whole = (torch.cat([g.flatten().double() for g in gs]) for gs in (grads, exact_grads))
    return max(relative(found, wanted), relative(*whole))


def _loss(model: Seq2Seq, source: Tensor, target: Tensor) -> Tensor:
    return model.loss(source, target, label_smoothing=BASE.label_smoothing)


def _stock_loss(model: Seq2Seq, source: Tensor, target: Tensor) -> Tensor:
    logits = model(source, target[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), label_smoothing=BASE.label_smoothing)


def _step(model: Seq2Seq, loss: Callable[[], Tensor]) -> Callable[[], Any]:
    parameters = list(model.parameters())

    def run() -> Any:
        model.train()
        return torch.autograd.grad(loss(), parameters)

    return run


def _parameters(model: Seq2Seq) -> tuple[int, int]:
    """Returns how many weights a source token and a target token are multiplied by; attention's products are few."""
    encoder, decoder = (
        sum(p.numel() for p in part.parameters()) for part in (model.transformer.encoder, model.transformer.decoder)
    )
    return encoder, decoder + model.target_embedding.weight.numel()
