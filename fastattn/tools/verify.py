"""Checks a whole model: its outputs and gradients on fastattn and on stock PyTorch, both against a float64 copy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fastattn.nn
from fastattn.ops._dispatch import use_backend
from fastattn.tools.exchange import THEIRS, exchange, unswap
from fastattn.tools.measure import Timing, peak_memory, time_in_turns
from fastattn.tools.numerics import Figure, figure, with_typical_errors
from fastattn.tools.table import collapse, error, heading, megabytes, seconds, table, verdict

_PROJECTION_SEED = 7


class Row(NamedTuple):
    """The figures of one tensor, and what it is."""

    kind: str  # "layer" | "output" | "gradient"
    figure: Figure


class ModelReport(NamedTuple):
    """What :func:`verify` found.

    ``peer`` says what ``Figure.eager`` is here: "PyTorch" (the same weights in torch.nn's modules) or "reference"
    (where the model is written for fastattn and has no such twin).
    """

    model_name: str
    peer: str
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        return all(row.figure.ok for row in self.rows)

    def worst(self, kind: str) -> Figure | None:
        """Returns the figure with the largest error among the rows of a kind; None if there is none."""
        return max((r.figure for r in self.rows if r.kind == kind), key=lambda f: f.ours.max, default=None)

    def __str__(self) -> str:
        return f"{self.headline()}\n\n{self.table()}"

    def headline(self) -> str:
        return heading(f"{self.model_name} against a float64 copy of itself: {verdict(self.ok)}")

    def table(self, all_gradients: bool = True) -> str:
        """Returns a row for each group of tensors whose names differ only in numbers, showing the worst of the group.

        Args:
            all_gradients: False shows the worst gradient of all in one row.
        """
        headers = ("kind", "tensor", "max err", f"{self.peer}'s", "bound", "mean err", f"{self.peer}'s", "bound", "")
        rows = []
        for kind in ("layer", "output", "gradient"):
            figures = [r.figure for r in self.rows if r.kind == kind]
            if kind == "gradient" and figures and not all_gradients:
                worst = _worst(figures)
                rows.append(_row(kind, f"{worst.name}, the worst of {len(figures)}", figures))
            else:
                rows += [_row(kind, *group) for group in _grouped(figures)]
        return table(headers, rows, left=(0, 1))


class Certificate(NamedTuple):
    """Errors, speed and memory of a model before and after a swap."""

    report: ModelReport
    costs: tuple[Cost, ...]

    @property
    def ok(self) -> bool:
        return self.report.ok

    def __str__(self) -> str:
        return f"{self.report.headline()}\n\n{self.report.table(False)}\n\n{costs_table(self.costs)}"


@dataclass(frozen=True)
class Cost:
    """Time and peak memory of one thing that a model does, before and after.

    ``before`` and ``after`` are measured in turns; memory is in bytes and None where it cannot be measured.
    """

    what: str
    before: Timing
    after: Timing
    memory_before: int | None
    memory_after: int | None

    @property
    def speedup(self) -> float:
        return self.before.median / self.after.median


def verify(model: nn.Module, *inputs: Any, gradients: bool = True, **kwargs: Any) -> ModelReport:
    """Compares ``model`` on fastattn, and on stock PyTorch, with a float64 copy of it.

    The rule is that of every kernel (``fastattn.tools.numerics``): an error may be at most twice PyTorch's own, on that
    tensor or as it typically is relative to the largest element.  It is applied to what each swapped layer gives, to
    each output of the model and to the gradient of each parameter.  All of it runs on copies in evaluation mode, so
    that dropout plays no part; ``model`` is not touched.  Where PyTorch's own answer is NaN there is nothing to compare
    with.

    Args:
        model: as it is before :func:`fastattn.swap`, or after.
        *inputs: what it is called with.
        gradients: also compares gradients, of the parameters and of the inputs that require them.
        **kwargs: keywords that it is called with.

    Returns:
        A report; ``print(report)`` shows the figures, ``report.ok`` says whether all keep the rule.

    Raises:
        Whatever the model raises; a note says in which of the three copies.
    """
    ours, peer, exact = copies(model)
    peer_name = "PyTorch" if _has_torch_twin(model) else "reference"
    names = [name for name, module in ours.named_modules() if name and type(module) in THEIRS]
    peers = [] if peer_name == "PyTorch" else [use_backend("reference")]
    with _said("of the model on fastattn"):
        run_ours = _run(ours, names, inputs, kwargs, gradients, None)
    with _said(f"of the model on {peer_name}"), ExitStack() as stack:
        for context in peers:
            stack.enter_context(context)
        run_peer = _run(peer, names, inputs, kwargs, gradients, None)
    with _said("of the model in float64"), use_backend("reference"):
        run_exact = _run(exact, names, inputs, kwargs, gradients, torch.float64)
    found: dict[str, list[Figure]] = {}
    for (kind, name), tensor in run_ours.items():
        compared = figure(name, tensor, run_peer[kind, name].to(tensor.dtype), run_exact[kind, name])
        found.setdefault(kind, []).append(compared)
    rows = (Row(kind, f) for kind, figures in found.items() for f in with_typical_errors(figures))
    return ModelReport(type(model).__name__, peer_name, tuple(rows))


def certify(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Certificate:
    """Returns the certificate of a swap of ``model``, which is not touched."""
    report = verify(model, *args, **kwargs)
    return Certificate(report, tuple(costs(model, args, kwargs)))


def costs(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], budget: float = 2.0) -> Iterator[Cost]:
    """Yields the cost of a forward in evaluation mode and, if it can be trained, of a training step, on copies of
    ``model``.

    Args:
        model: on torch.nn's modules or on fastattn's; "before" is the former.
        args: what it is called with.
        kwargs: keywords that it is called with.
        budget: about how long each of the two may be timed, in seconds.
    """
    after, before, _ = copies(model, exact=False)

    def forward(copied: nn.Module) -> Callable[[], Any]:
        def call() -> Any:
            with torch.no_grad():
                return copied(*args, **kwargs)

        return call

    def step(copied: nn.Module) -> Callable[[], Any]:
        parameters = [p for p in copied.parameters() if p.requires_grad]

        def call() -> Any:
            outputs = _tensors(copied(*args, **kwargs))
            return torch.autograd.grad(
                [o.float().sum() for _, o in outputs if o.requires_grad], parameters, allow_unused=True
            )

        return call

    # Dropout and batch statistics draw and move: neither the caller's random stream nor its model may notice.
    with torch.random.fork_rng(devices=[]):
        yield _cost("forward", forward(before.eval()), forward(after.eval()), budget)
        if any(p.requires_grad for p in model.parameters()):
            yield _cost("training step", step(before.train()), step(after.train()), budget)


def costs_table(costs: Sequence[Cost], before: str = "PyTorch", after: str = "fastattn") -> str:
    """Returns the costs as a table, in time and in memory beyond the model and its inputs."""
    rows = [
        [
            c.what,
            seconds(c.before.median),
            seconds(c.after.median),
            f"{c.speedup:.2f} x",
            megabytes(c.memory_before),
            megabytes(c.memory_after),
        ]
        for c in costs
    ]
    headers = ("", f"time, {before}", after, "faster", f"peak memory, {before}", after)
    return table(headers, rows)


def copies(model: nn.Module, exact: bool = True) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Returns three copies of ``model`` in evaluation mode: on fastattn, on its peer, and the peer in float64.

    The peer has torch.nn's modules; a model written for fastattn keeps its own, and runs on the reference backend
    instead.
    """
    ours = copy.deepcopy(model).eval()
    peer = copy.deepcopy(model).eval()
    if _has_torch_twin(model):
        unswap(peer)
    exchange(ours)
    return ours, peer, copy.deepcopy(peer).double() if exact else peer


def _has_torch_twin(model: nn.Module) -> bool:
    """Whether torch.nn's modules can stand in for all modules of ``model`` that have kernels."""
    ours: tuple[type[nn.Module], ...] = (fastattn.nn.FeedForward, *THEIRS)
    return all(type(m) in THEIRS for m in model.modules() if isinstance(m, ours))


def _cost(what: str, before: Callable[[], Any], after: Callable[[], Any], budget: float) -> Cost:
    # Memory first: what a kernel keeps for good from its first call on then counts.  Time last, warmed up.
    memory_before, memory_after = peak_memory(before), peak_memory(after)
    timings = time_in_turns([before, after], budget=budget, min_repeats=3)
    return Cost(what, timings[0], timings[1], memory_before, memory_after)


def _run(
    model: nn.Module,
    names: Sequence[str],
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    gradients: bool,
    dtype: torch.dtype | None,
) -> dict[tuple[str, str], Tensor]:
    """Returns what the layers ``names`` and the model itself give, and the gradients of a fixed combination of the
    latter."""
    found: dict[tuple[str, str], Tensor] = {}
    given, structure = pytree.tree_flatten((tuple(inputs), dict(kwargs)))
    given = [_prepared(x, dtype) for x in given]
    args, keywords = pytree.tree_unflatten(given, structure)
    with _recording(model, names, found), torch.set_grad_enabled(gradients):
        outputs = _tensors(model(*args, **keywords))
    for path, out in outputs:
        found["output", path] = out.detach()
    leaves = {f"input {k}": x for k, x in enumerate(given) if isinstance(x, Tensor) and x.requires_grad}
    leaves |= {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not gradients or not leaves:
        return found
    total = _combined([out for _, out in outputs if out.requires_grad])
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    for name, grad in zip(leaves, grads, strict=True):
        found["gradient", name] = grad
    return found


def _prepared(value: Any, dtype: torch.dtype | None) -> Any:
    """Returns a leaf of its own for a tensor that requires a gradient; a floating one in ``dtype`` if that is given."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    prepared = value.detach() if dtype is None else value.detach().to(dtype)
    return prepared.clone().requires_grad_() if value.requires_grad else prepared


def _combined(outputs: Sequence[Tensor]) -> Tensor:
    if not outputs:
        raise ValueError("no output of the model requires a gradient: pass gradients=False to compare outputs alone")
    generator = torch.Generator().manual_seed(_PROJECTION_SEED)
    total = outputs[0].new_zeros(())
    for out in outputs:
        # Numbers that every dtype holds exactly, so that all three copies are asked for the same gradient.
        weight = torch.randn(out.shape, generator=generator).bfloat16().to(out)
        total = total + (out * weight).sum()
    return total


@contextmanager
def _recording(model: nn.Module, names: Sequence[str], found: dict[tuple[str, str], Tensor]) -> Iterator[None]:
    """Keeps the floating outputs of the modules ``names`` in ``found``, each call of each."""
    calls: dict[str, int] = {}

    def hook_for(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            call = calls[name] = calls.get(name, -1) + 1
            for path, tensor in _tensors(output):
                label = f"{name}{path.removeprefix('output')}" + (f" (call {call})" if call else "")
                found["layer", label] = tensor.detach()

        return hook

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(hook_for(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> list[tuple[str, Tensor]]:
    """Returns the floating tensors in whatever a model returns, named by where they are."""
    found, _ = pytree.tree_flatten_with_path(output)
    return [
        ("output" + pytree.keystr(path), leaf)
        for path, leaf in found
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]


@contextmanager
def _said(which: str) -> Iterator[None]:
    try:
        yield
    except Exception as failure:
        failure.add_note(f"raised by the copy {which}")
        raise


def _grouped(figures: Sequence[Figure]) -> Iterator[tuple[str, list[Figure]]]:
    """Yields figures whose names differ only in their numbers together, with a name for all."""
    groups: dict[str, list[Figure]] = {}
    for f in figures:
        groups.setdefault("".join("#" if c.isdigit() else c for c in f.name), []).append(f)
    for found in groups.values():
        yield collapse([f.name for f in found]), found


def _row(kind: str, name: str, figures: Sequence[Figure]) -> list[str]:
    worst = _worst(figures)
    numbers = (worst.ours.max, worst.eager.max, worst.max_bound, worst.ours.mean, worst.eager.mean, worst.mean_bound)
    return [kind, name, *map(error, numbers), verdict(worst.ok)]


def _worst(figures: Sequence[Figure]) -> Figure:
    """Returns a figure that fails if one does, and among those the one with the largest error."""
    return max(figures, key=lambda f: (not f.ok, f.ours.max))
