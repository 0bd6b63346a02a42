"""PyTorch's own sample databases: its ops and modules against ours, values and every gradient.

The truth is PyTorch's result in float64 with the same weights; ours may be twice as far from it as PyTorch's own result
in the same dtype, and some units in the last place more, because the largest of a handful of rounding errors is luck.
Where we differ on purpose, ``EXCEPTIONS`` says so, and the test that skips a sample for one asserts that PyTorch still
differs there.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

import fastattn
import fastattn.nn as fnn

pytestmark = [
    pytest.mark.filterwarnings("ignore::fastattn.FallbackWarning"),
    # PyTorch's modules about their own paths.
    pytest.mark.filterwarnings("ignore:.*(nested|mismatched|enable_nested_tensor).*:UserWarning"),
]

# Units in the last place of a sample's largest result.  The samples' scores reach 400: a score that is off by half a
# unit in its last place makes an exponential off by hundreds.  Half precision rounds at the store, which costs more
# than that.
SLACK = {torch.float64: 1000, torch.float32: 1000, torch.bfloat16: 6, torch.float16: 6}
FLOATS = [torch.float64, torch.float32, torch.bfloat16]


class Sample(NamedTuple):
    """One call: PyTorch's function, ours, and the inputs and parameters that both take."""

    name: str
    theirs: Callable[..., Any]
    ours: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    theirs_wide: Callable[..., Any] | None = None  # PyTorch's in float64; a module needs a copy of its own


class Difference(NamedTuple):
    """Something that we do otherwise on purpose."""

    reason: str
    applies: Callable[[Sample, bool], bool]  # (sample, whether gradients are recorded)


def _takes_nested_path(sample: Sample, grad: bool) -> bool:
    model, kwargs = sample.theirs, sample.kwargs
    return (
        not grad
        and isinstance(model, nn.Transformer)
        and not model.training
        and model.encoder.use_nested_tensor
        and sample.args[0].dim() == 3
        and kwargs.get("src_key_padding_mask") is not None
        and kwargs.get("src_mask") is None
    )


def _masks_a_whole_row(sample: Sample, grad: bool) -> bool:
    mask = sample.kwargs.get("mask")
    if not sample.name.startswith("masked.") or mask is None:
        return False
    input, dim = sample.args[:2]
    return not mask.expand(input.shape).any(dim).all()


EXCEPTIONS = {
    "empty rows": Difference(
        "where a mask hides a whole row PyTorch's softmax is NaN; ours is 0, and its logarithm -inf", _masks_a_whole_row
    ),
    "padded outputs": Difference(
        "in evaluation without gradients, and only there, PyTorch's encoder writes 0 at padded positions",
        _takes_nested_path,
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# The comparison
# ---------------------------------------------------------------------------------------------------------------------


def wide(value: Any) -> Any:
    """Floating tensors in float64, as fresh leaves."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def fresh(value: Any) -> Any:
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def run(function: Callable[..., Any], args: Any, kwargs: Any, grad: bool) -> list[Tensor]:
    """Outputs, then the gradients of inputs and parameters to one fixed direction."""
    leaves = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor) and t.requires_grad]
    if isinstance(function, nn.Module):
        leaves += list(function.parameters())
    with torch.set_grad_enabled(grad):
        outputs = [o for o in tree_flatten(function(*args, **kwargs))[0] if isinstance(o, Tensor)]
    if not grad:
        return outputs
    kept = [o for o in outputs if o.requires_grad]
    generator = torch.Generator().manual_seed(7)
    directions = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in kept]
    # A masked logarithm is -inf whatever the input: nothing flows back from there.
    directions = [torch.where(o.isneginf(), 0.0, d) for o, d in zip(kept, directions, strict=True)]
    grads = torch.autograd.grad(kept, leaves, directions, allow_unused=True) if kept else [None] * len(leaves)
    return outputs + [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)]


def disagreements(sample: Sample, grad: bool) -> list[str]:
    """Returns what is wrong with ours."""
    truth = run(sample.theirs_wide or sample.theirs, *tree_map(wide, (sample.args, sample.kwargs)), grad)
    theirs = run(sample.theirs, *tree_map(fresh, (sample.args, sample.kwargs)), grad)
    ours = run(sample.ours, *tree_map(fresh, (sample.args, sample.kwargs)), grad)
    if [t.shape for t in ours] != [t.shape for t in truth]:
        return [f"{sample.name}: shapes {[tuple(t.shape) for t in ours]}, expected {[tuple(t.shape) for t in truth]}"]
    found = []
    # Gradients of one call share a scale: a small one is the rounded difference of large ones.
    scale = max((torch.where(t.isinf(), 0.0, t).abs().max().item() for t in truth if t.numel()), default=0.0)
    for at, (mine, their, true) in enumerate(zip(ours, theirs, truth, strict=True)):
        if mine.dtype != their.dtype:
            found.append(f"{sample.name} [{at}]: dtype {mine.dtype}, expected {their.dtype}")
        if not true.numel():
            continue
        # Equal infinities are equal.
        error, theirs_error = (torch.where(t == true, 0.0, t.double() - true).abs().max().item() for t in (mine, their))
        allowed = 2 * theirs_error + SLACK[their.dtype] * torch.finfo(their.dtype).eps * scale
        # "not <=": a NaN disagrees too.
        if not error <= allowed:
            found.append(f"{sample.name} [{at}]: error {error:.2e}, allowed {allowed:.2e}")
    return found


def check(samples: Iterator[Sample], at_least: int, grads: tuple[bool, ...] = (True,)) -> None:
    found, count = [], 0
    for sample in samples:
        for grad in grads:
            count += 1
            excepted = [name for name, e in EXCEPTIONS.items() if e.applies(sample, grad)]
            different = disagreements(sample, grad)
            if excepted and not different:
                found.append(f"{sample.name}: exception {excepted} is not needed any more")
            if not excepted:
                found += different
    assert not found, f"{len(found)} of {count}:\n" + "\n".join(found)
    assert count >= at_least, f"PyTorch's database shrank to {count} samples"


# ---------------------------------------------------------------------------------------------------------------------
# The databases
# ---------------------------------------------------------------------------------------------------------------------


@cache
def databases() -> tuple[dict[str, Any], dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
        from torch.testing._internal.common_modules import module_db
    return {o.name: o for o in op_db if not o.variant_test_name}, {m.name: m for m in module_db}


def op_samples(name: str, dtype: torch.dtype, ours: Callable[..., Any], grad: bool = True) -> Iterator[Sample]:
    torch.manual_seed(0)
    op = databases()[0][name]
    for at, s in enumerate(op.sample_inputs("cpu", dtype, requires_grad=grad)):
        yield Sample(f"{name} {at}", op.op, ours, (s.input, *s.args), s.kwargs)


def module_samples(name: str, dtype: torch.dtype, training: bool) -> Iterator[Sample]:
    info = databases()[1][f"nn.{name}"]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)
    for at, s in enumerate(samples):
        args, kwargs = s.constructor_input.args, s.constructor_input.kwargs
        if name != "TransformerEncoder":
            kwargs = {**kwargs, "device": "cpu", "dtype": dtype}
        theirs = getattr(nn, name)(*args, **kwargs).train(training)
        ours = getattr(fnn, name)(*tree_map(as_ours, args), **kwargs).train(training)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        forward = s.forward_input
        theirs_wide = copy.deepcopy(theirs).double()
        yield Sample(f"{name} {at} {s.desc}", theirs, ours, forward.args, forward.kwargs, theirs_wide)


def as_ours(value: Any) -> Any:
    """A torch.nn encoder layer as one of ours, as TransformerEncoder's samples need it."""
    if isinstance(value, nn.TransformerEncoderLayer):
        value = copy.deepcopy(value)
        value.__class__, value.self_attn.__class__ = fnn.TransformerEncoderLayer, fnn.MultiheadAttention
    return value


def multi_head_attention_forward(query, key, value, *args, **kwargs):
    """PyTorch's function by way of our module."""
    names = "embed_dim num_heads in_proj_weight in_proj_bias bias_k bias_v add_zero_attn dropout_p out_weight out_bias"
    a = dict(zip(names.split(), args, strict=True))
    module = fnn.MultiheadAttention(a["embed_dim"], a["num_heads"], a["dropout_p"], add_zero_attn=a["add_zero_attn"])
    if kwargs.pop("use_separate_proj_weight"):
        module._qkv_same_embed_dim = False
    parameters = {k: a[k] for k in ("in_proj_weight", "in_proj_bias", "bias_k", "bias_v")}
    parameters |= {k: kwargs.pop(k) for k in ("q_proj_weight", "k_proj_weight", "v_proj_weight")}
    for name, tensor in parameters.items():
        module._parameters.pop(name, None)
        module.__dict__.pop(name, None)
        setattr(module, name, tensor)
    module.out_proj.forward = lambda x: nn.functional.linear(x, a["out_weight"], a["out_bias"])
    return module.train(kwargs.pop("training"))(query, key, value, **kwargs)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float16], ids=str)
def test_scaled_dot_product_attention(dtype):
    ours = fastattn.scaled_dot_product_attention
    # Dropout draws other numbers than PyTorch's: test_attention covers it.
    samples = (
        s
        for s in op_samples("nn.functional.scaled_dot_product_attention", dtype, ours)
        if not s.kwargs.get("dropout_p")
    )
    check(samples, at_least=12)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_multi_head_attention_forward(dtype, grad):
    def without_dropout() -> Iterator[Sample]:
        for s in op_samples("nn.functional.multi_head_attention_forward", dtype, multi_head_attention_forward, False):
            args, kwargs = tree_map(scaled, (s.args, s.kwargs))
            args = tuple(0.0 if at == 10 else a for at, a in enumerate(args))
            yield s._replace(args=args, kwargs=kwargs)

    # PyTorch makes only one sample that requires gradients: require them of all.  A quarter, because the elements reach
    # 9 and so the scores 10^4, where a softmax is one-hot and its gradients are rounding errors.
    def scaled(value: Any) -> Any:
        return (value / 4).requires_grad_(grad) if isinstance(value, Tensor) else value

    check(without_dropout(), at_least=192, grads=(grad,))


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("MultiheadAttention", 64),
        ("TransformerEncoderLayer", 35),
        ("TransformerDecoderLayer", 67),
        ("TransformerEncoder", 35),
        ("Transformer", 64),
        ("LayerNorm", 7),
        ("RMSNorm", 6),
    ],
)
def test_module(name, count, training, dtype):
    check(module_samples(name, dtype, training), at_least=count, grads=(True,) if training else (True, False))


def masked(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Our softmax with the signature of torch.masked's."""
    return lambda input, dim, *, dtype=None, mask=None: op(input, dim, dtype=dtype, mask=mask)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("name", "ours", "count"),
    [
        ("softmax", fastattn.softmax, 7),
        ("log_softmax", fastattn.log_softmax, 7),
        ("masked.softmax", masked(fastattn.softmax), 24),
        ("masked.log_softmax", masked(fastattn.log_softmax), 24),
    ],
)
def test_softmax(name, ours, count, dtype):
    check(op_samples(name, dtype, ours), at_least=count)
