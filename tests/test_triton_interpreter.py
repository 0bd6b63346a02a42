"""What is done to Triton's interpreter: nothing that a kernel computes depends on how quickly, and all is undone."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Case, inputs, run
from conftest import TRITON

import fastattn

pytestmark = pytest.mark.skipif(not TRITON or torch.cuda.is_available(), reason="is about Triton's interpreter")
# Masks, a bias and dropout; half precision, whose products are widened, and diagonals.
CASES = {
    "float32": Case(heads=(1, 1), seq_len=(9, 70), mask="lengths+segments+dense", bias=(True,) * 4, dropout_p=0.2),
    "bfloat16": Case(batch=1, heads=(2, 1), seq_len=(70, 9), relative="alibi", softcap=2.0, sinks=True),
}


def results(dtype):
    found = run(inputs(CASES[dtype]).to(getattr(torch, dtype)), "triton").named()
    query, key = (torch.linspace(-3, 3, n * 8).sin().view(1, 1, n, 8) for n in (3, 40))
    found["values"], found["keys"] = fastattn.attention_weights(query, key, reduce="top_k", top_k=5, backend="triton")
    weight = torch.linspace(-1, 1, 48).cos().view(3, 16).to(getattr(torch, dtype))
    found["gelu"] = fastattn.feed_forward(weight, weight, None, weight.t(), None, activation="gelu", backend="triton")
    return found


@pytest.mark.parametrize("dtype", CASES)
def test_quickly_interpreted_are_the_same_bits(dtype, monkeypatch):
    from fastattn.kernels import quick_interpreter

    quick = results(dtype)
    monkeypatch.setattr(quick_interpreter, "_KNOWN", False)
    slow = results(dtype)
    assert slow.keys() == quick.keys()
    for name, expected in slow.items():
        assert torch.equal(quick[name], expected), name


def test_outside_of_launches_it_is_as_triton_made_it():
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    places = (tl, tl.core, tl.tensor, tl.block_type, tl.math, interpreter, interpreter.ReduceOps, TritonSemantic)

    def held():
        return [dict(vars(place)) for place in places], interpreter.interpreter_builder.options

    x = torch.ones(2, 3)
    fastattn.softmax(x, backend="triton")
    before = held()
    fastattn.softmax(x, backend="triton")
    assert held() == before
