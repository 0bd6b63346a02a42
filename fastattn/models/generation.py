"""Generation: greedy, beam and sampling over one step of a decoder, cached or not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastattn.ops.softmax import log_softmax


class Decoder(Protocol):
    """What generation asks of a model: next-token scores, for rows that can be rearranged between steps."""

    def step(self, ids: Tensor) -> Tensor:
        """Logits ``[rows, vocab]`` of the token after ``ids [rows, length]``, which start with ``<bos>``.

        They are the caller's, who writes into them.
        """

    def reorder(self, rows: Tensor, *, same_source: bool) -> None:
        """Row ``i`` goes on from what row ``rows[i]`` was; with ``same_source`` each row keeps its source."""


@dataclass(frozen=True)
class GenerationSettings:
    """How to choose tokens.

    Args:
        strategy: ``"greedy"`` takes the most probable token; ``"beam"`` keeps the ``num_beams`` most probable
            sequences; ``"sample"`` draws.
        max_new_tokens: the most tokens to produce, ``<eos>`` included.
        num_beams: for ``"beam"``.
        length_penalty: beams are ranked by their log-probability over ``length ** length_penalty``; above 0 favours
            longer sequences.  For ``"beam"``.
        temperature: logits are divided by it; for ``"sample"``.
        top_k: draw among the k most probable tokens only; 0 for all.  For ``"sample"``.
        top_p: draw among the fewest tokens whose probabilities sum to at least this; 1 for all.  For ``"sample"``.
        generator: where the draws come from; None for torch's default.

    Raises:
        ValueError: a value outside its range, or one given to a strategy that does not use it.
    """

    strategy: str = "greedy"
    max_new_tokens: int = 128
    num_beams: int = 1
    length_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.strategy not in ("greedy", "beam", "sample"):
            raise ValueError(f'strategy must be "greedy", "beam" or "sample", got {self.strategy!r}')
        for name, valid, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("num_beams", self.num_beams >= 1, "at least 1"),
            ("length_penalty", math.isfinite(self.length_penalty), "finite"),
            ("temperature", self.temperature > 0.0 and math.isfinite(self.temperature), "a positive number"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0.0 < self.top_p <= 1.0, "in (0, 1]"),
        ):
            if not valid:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")
        unused = {"num_beams": "beam", "length_penalty": "beam", "temperature": "sample", "top_k": "sample"}
        unused |= {"top_p": "sample", "generator": "sample"}
        for name, strategy in unused.items():
            default = type(self).__dataclass_fields__[name].default
            if strategy != self.strategy and getattr(self, name) != default:
                raise ValueError(f'{name}={getattr(self, name)!r} is for strategy="{strategy}", got "{self.strategy}"')


@dataclass(frozen=True)
class Special:
    """The token that ends a sequence, and those that are never produced."""

    eos: int
    banned: tuple[int, ...]


@torch.no_grad()
def generate(decoder: Decoder, ids: Tensor, special: Special, settings: GenerationSettings) -> list[list[int]]:
    """Continue every row of ``ids [batch, 1]`` (the ``<bos>`` tokens).

    Returns:
        The new token ids of every row, without ``<eos>``.
    """
    if len(ids) == 0:
        return []
    return (_beam_search if settings.strategy == "beam" else _one_by_one)(decoder, ids, special, settings)


def _one_by_one(decoder: Decoder, ids: Tensor, special: Special, settings: GenerationSettings) -> list[list[int]]:
    """Greedy and sampling: one sequence a row; a row that ends leaves the batch."""
    outputs: list[list[int]] = [[] for _ in range(len(ids))]
    active = list(range(len(ids)))  # which output each row writes
    banned = torch.tensor(special.banned, dtype=torch.int64, device=ids.device)
    for _ in range(settings.max_new_tokens):
        scores = decoder.step(ids).index_fill_(1, banned, -math.inf)
        chosen = scores.argmax(dim=-1) if settings.strategy == "greedy" else _draw(scores, settings)
        tokens = chosen.tolist()
        going = [row for row, token in enumerate(tokens) if token != special.eos]
        for row in going:
            outputs[active[row]].append(tokens[row])
        if not going:
            break
        ids = torch.cat((ids, chosen[:, None]), dim=1)
        if len(going) < len(active):
            rows = torch.tensor(going, device=ids.device)
            ids, active = ids[rows], [active[row] for row in going]
            decoder.reorder(rows, same_source=False)
    return outputs


def _draw(scores: Tensor, settings: GenerationSettings) -> Tensor:
    """One token a row from the tempered, truncated distribution."""
    scores, order = (scores.float() / settings.temperature).sort(dim=-1, descending=True, stable=True)
    if settings.top_k:
        scores[:, settings.top_k :] = -math.inf
    probabilities = scores.softmax(dim=-1)
    if settings.top_p < 1.0:
        # A token stays while the mass before it is short of top_p, so the first always stays.
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= settings.top_p, 0.0)
    rank = torch.multinomial(probabilities, 1, generator=settings.generator)
    return order.gather(1, rank)[:, 0]


class _Finished:
    """The ended sequences of one row of the batch: how many, and the best."""

    def __init__(self) -> None:
        self.count = 0
        self.score = -math.inf
        self.ids: list[int] = []

    def add(self, score: float, ids: list[int]) -> None:
        self.count += 1
        if score > self.score:
            self.score, self.ids = score, ids


def _beam_search(decoder: Decoder, ids: Tensor, special: Special, settings: GenerationSettings) -> list[list[int]]:
    """The best ended sequence of each row, among those that ``num_beams`` live ones lead to.

    Of the continuations of all beams, an end counts only among the ``num_beams`` best, so that one beam is greedy
    search; the best that do not end live on.  A row is done when ``num_beams`` sequences have ended, or when no live
    beam can still beat the best of them.

    Sources: Sutskever et al. 2014, section 3.2 (beam search); Wu et al. 2016, section 7 (length normalisation).
    """
    beams = settings.num_beams
    finished = [_Finished() for _ in range(len(ids))]
    active = list(range(len(ids)))  # which row of the batch each group of beams belongs to
    sums = torch.zeros(len(ids), 1, dtype=torch.float32, device=ids.device)  # log-probability, [groups, live beams]
    banned = torch.tensor(special.banned, dtype=torch.int64, device=ids.device)
    for length in range(1, settings.max_new_tokens + 1):
        scores = log_softmax(decoder.step(ids), dtype=torch.float32).index_fill_(1, banned, -math.inf)
        groups, width, vocab = *sums.shape, scores.shape[-1]
        totals = (sums[:, :, None] + scores.view(groups, width, vocab)).flatten(1)
        # At most one end a beam, so twice the beams always hold enough that go on.
        best, flat = totals.topk(min(2 * beams, width * vocab), dim=1)
        live_rows, live_tokens, live_sums, going = [], [], [], []
        for group, (values, indices) in enumerate(zip(best.tolist(), flat.tolist(), strict=True)):
            result, live = finished[active[group]], []
            for rank, (value, index) in enumerate(zip(values, indices, strict=True)):
                row, token = group * width + index // vocab, index % vocab
                if token != special.eos:
                    live.append((value, row, token))
                elif rank < beams and value > -math.inf:
                    result.add(value / length**settings.length_penalty, ids[row, 1:].tolist())
            live = live[:beams]
            if result.count < beams and not _settled(result, live[0][0], length, settings):
                going.append(group)
                live_sums.append([value for value, _, _ in live])
                live_rows += [row for _, row, _ in live]
                live_tokens += [token for _, _, token in live]
        if not going:
            return [result.ids for result in finished]
        rows = torch.tensor(live_rows, device=ids.device)
        ids = torch.cat((ids[rows], torch.tensor(live_tokens, device=ids.device)[:, None]), dim=1)
        same_source = len(going) == groups and len(live_sums[0]) == width
        active = [active[group] for group in going]
        sums = torch.tensor(live_sums, dtype=torch.float32, device=ids.device)
        decoder.reorder(rows, same_source=same_source)
    for group, output in enumerate(active):
        if not finished[output].count:  # nothing ended in time: the best of what goes on
            finished[output].add(0.0, ids[group * sums.shape[1], 1:].tolist())
    return [result.ids for result in finished]


def _settled(result: _Finished, best_sum: float, length: int, settings: GenerationSettings) -> bool:
    """Whether no live beam can end with a better score than the best ended sequence."""
    # Sums are negative and only fall, so the most a beam can reach is its present sum at the most favourable length.
    most = settings.max_new_tokens if settings.length_penalty > 0 else length + 1
    return result.count > 0 and result.score >= best_sum / most**settings.length_penalty
