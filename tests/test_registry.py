"""A plain eager call goes around the dispatcher; whoever would watch or change the op there must still meet it."""

from typing import ClassVar

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn

OP = "fastattn.attention.default"


def _call(*, requires_grad=False):
    query = torch.ones(1, 1, 2, 4, requires_grad=requires_grad)
    return fastattn.attention(query, query, query)


class _Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


class _Logging(torch.Tensor):
    seen: ClassVar[list[str]] = []

    @staticmethod
    def __new__(cls, inner):
        result = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        result.inner = inner
        return result

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        return func(*(a.inner if isinstance(a, cls) else a for a in args), **(kwargs or {}))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_dispatch_mode_sees_the_op(requires_grad):
    with _Seen() as mode:
        _call(requires_grad=requires_grad)
    assert OP in mode.ops


def test_function_mode_sees_the_op():
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Mode():
        _call()
    assert any(OP in name for name in seen)


def test_subclass_sees_the_op():
    _Logging.seen.clear()
    query = _Logging(torch.ones(1, 1, 2, 4))
    fastattn.attention(query, query, query)
    assert OP in _Logging.seen


def test_fake_tensors_stay_fake():
    with FakeTensorMode() as mode:
        query = torch.ones(1, 1, 2, 4)
    assert isinstance(fastattn.attention(query, query, query), FakeTensor)
    with mode:
        assert isinstance(_call(), FakeTensor)


def test_meta_tensors_compute_nothing():
    query = torch.ones(1, 1, 2, 4, device="meta")
    assert fastattn.attention(query, query, query).device.type == "meta"


def test_profiler_sees_the_op():
    with torch.profiler.profile(acc_events=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _call()
    assert any(event.key == "fastattn::attention" for event in profile.key_averages())


def test_autocast_casts():
    with torch.autocast("cpu", torch.bfloat16):
        assert _call().dtype == torch.bfloat16


def test_make_fx_records_the_op():
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda q: fastattn.attention(q, q, q))(torch.ones(1, 1, 2, 4))
    assert any(str(node.target) == OP for node in graph.graph.nodes)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_records_the_op():
    trace = torch.jit.trace(lambda q: fastattn.attention(q, q, q), torch.ones(1, 1, 2, 4))
    assert "fastattn::attention" in str(trace.graph)


@pytest.mark.parametrize("grad_enabled", [False, True])
def test_plain_call_has_a_gradient_exactly_when_asked(grad_enabled):
    with torch.set_grad_enabled(grad_enabled):
        assert _call(requires_grad=True).requires_grad == grad_enabled
    with torch.inference_mode():
        assert _call().is_inference()
