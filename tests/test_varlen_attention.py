"""Packed sequences, against each sequence by itself."""

from itertools import pairwise

import pytest
import torch
from conftest import TRITON, backend_or_triton

import fastattn
from fastattn.biases import Alibi, RelativeBias, RelativePosition
from fastattn.masks import Causal, KeyLengths, Window
from fastattn.ops import _dispatch
from fastattn.reference.philox import keep_mask
from fastattn.spec.varlen_attention import sequences, varlen_call

backend = backend_or_triton

LENGTHS_Q = [3, 0, 35, 1, 2]
LENGTHS_K = [4, 2, 67, 0, 1]


def cumulative(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


BOUNDS = cumulative(LENGTHS_Q), cumulative(LENGTHS_K, torch.int64)


# So few queries of so many keys that the keys are shared out among programs.
FEW_Q, FEW_K = [1, 0, 3, 2, 1, 1], [300, 5, 0, 275, 17, 0]
FEW_BOUNDS = cumulative(FEW_Q), cumulative(FEW_K)


def packed(seed=0, dtype=torch.float64, heads=(4, 2), lengths=(LENGTHS_Q, LENGTHS_K)):
    generator = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    tokens_q, tokens_k = map(sum, lengths)
    return make(tokens_q, heads[0], 8), make(tokens_k, heads[1], 8), make(tokens_k, heads[1], 6)


def one_by_one(query, key, value, lengths=(LENGTHS_Q, LENGTHS_K), **options):
    """Returns what ``attention`` gives for each sequence, put together."""
    outs, lses = [], []
    for q, k, v in zip(query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True):
        one = [t.transpose(0, 1)[None] for t in (q, k, v)]
        out, lse = fastattn.attention(*one, **options, return_lse=True, backend="reference")
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


def alibi():
    slopes = Alibi.geometric(4, dtype=torch.float64).slopes.requires_grad_()
    return Alibi(slopes), slopes


def learned():
    table = torch.linspace(-1, 1, 32, dtype=torch.float64).sin().view(8, 4).requires_grad_()
    return RelativePosition(table, max_distance=20), table


MASKS = [None, Causal(), Causal("top_left"), Window(1, 1), Window(30, None)]


@pytest.mark.parametrize("mask", MASKS, ids=repr)
@pytest.mark.parametrize("biased", [lambda: (None, None), alibi, learned], ids=["no-bias", "alibi", "relative"])
def test_each_sequence_by_itself(mask, biased, backend):
    q, k, v = packed()
    bias, parameter = biased()
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64).requires_grad_()
    leaves = [q, k, v, sinks] + ([] if parameter is None else [parameter])
    options = {"mask": mask, "bias": bias, "softcap": 4.0, "sinks": sinks}
    out, lse = fastattn.varlen_attention(q, k, v, *BOUNDS, **options, return_lse=True, backend=backend)
    expected, expected_lse = one_by_one(q, k, v, **options)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    generator = torch.Generator().manual_seed(1)
    dout, dlse = (torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in (out, lse))
    found = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    right = torch.autograd.grad((expected, expected_lse), leaves, (dout, dlse))
    for got, want in zip(found, right, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_exact_as_each_by_itself(dtype, backend):
    """Empty rows are 0 and -inf, and the error is that of the same backend's attention."""
    q, k, v = packed(dtype=dtype)
    out, lse = fastattn.varlen_attention(q, k, v, *BOUNDS, mask=Causal(), return_lse=True, backend=backend)
    exact, exact_lse = one_by_one(*(t.double() for t in (q, k, v)), mask=Causal())
    assert (out - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()
    assert torch.equal(lse.isneginf(), exact_lse.isneginf())
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    assert not out[38].any()
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert all(g.isfinite().all() for g in grads)
    again = fastattn.varlen_attention(q, k, v, *BOUNDS, mask=Causal(), backend=backend)
    assert all(
        torch.equal(a, b)
        for a, b in zip(grads, torch.autograd.grad(again, (q, k, v), torch.ones_like(out)), strict=True)
    )


def test_poison_stays_in_its_sequence(backend):
    q, k, v = (t.detach() for t in packed(dtype=torch.float32))
    k[5], v[5] = float("nan"), float("inf")  # of the second sequence, which has no queries
    v[8] = float("nan")  # of the third
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    out = fastattn.varlen_attention(q, k, v, *BOUNDS, mask=Causal("top_left"), backend=backend)
    hit = out.isnan().any(dim=-1).any(dim=-1).nonzero().flatten().tolist()
    assert hit == list(range(5, 38))
    clean = torch.ones_like(out)
    clean[3:38] = 0.0
    grads = torch.autograd.grad(out, (q, k, v), clean)
    for grad, own in zip(grads, (slice(0, 3), slice(0, 4), slice(0, 4)), strict=True):
        assert grad[own].isfinite().all()


def test_dropout_is_that_of_each_sequence(backend):
    """Sequence s is dropped by the drawn offset plus s, counted within it."""
    q, v = torch.zeros(45, 2, 16), torch.zeros(45, 2, 16).requires_grad_()
    bounds = torch.tensor([0, 8, 40, 45])
    generator = torch.Generator().manual_seed(5)
    call = varlen_call(q, q, v, bounds, bounds, dropout_p=0.5, generator=generator, backend=backend)
    out = fastattn.varlen_attention(
        q, q, v, bounds, bounds, dropout_p=0.5, generator=torch.Generator().manual_seed(5), backend=backend
    )
    dout = torch.linspace(-1, 1, out.numel()).sin().view(out.shape)
    (dv,) = torch.autograd.grad(out, v, dout)
    for s, (begin, end) in enumerate(pairwise(bounds.tolist())):
        size = end - begin
        keep = keep_mask(call.dropout_state + torch.tensor([0, s]), 0.5, 2, size, size).view(2, size, size)
        expected = torch.einsum("hij,ihd->jhd", keep / (0.5 * size), dout[begin:end])
        torch.testing.assert_close(dv[begin:end], expected)


@pytest.mark.parametrize("mask", [Causal(), Window(150, None, "top_left")], ids=repr)
def test_few_queries_of_each(mask, backend):
    """Against each by itself, with all that packed calls have; empty sequences, and queries without keys. The backward
    knows nothing of how out and lse came about."""
    q, k, v = (t.detach() for t in packed(lengths=(FEW_Q, FEW_K)))
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    options = {"mask": mask, "bias": Alibi(alibi()[1].detach()), "softcap": 4.0, "sinks": sinks}
    out, lse = fastattn.varlen_attention(q, k, v, *FEW_BOUNDS, **options, return_lse=True, backend=backend)
    expected, expected_lse = one_by_one(q, k, v, (FEW_Q, FEW_K), **options)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_few_queries_beside_poison(backend):
    """Exact, the same bits again, and NaN and infinity of a neighbour, or behind the mask, are nowhere."""
    clean = [t.detach() for t in packed(dtype=torch.bfloat16, lengths=(FEW_Q, FEW_K))]
    q, k, v = (t.clone() for t in clean)
    k[300:305], v[300:305] = float("nan"), float("inf")  # of the second sequence, which has no queries
    v[305 + 270 :] = float("nan")  # of the fourth's keys, those after what its window shows; of the fifth
    mask = Window(200, 0, "top_left")
    out, lse = fastattn.varlen_attention(q, k, v, *FEW_BOUNDS, mask=mask, return_lse=True, backend=backend)
    exact, exact_lse = one_by_one(*(t.double() for t in clean), (FEW_Q, FEW_K), mask=mask)
    assert out[6].isnan().all()
    assert not out[7].any()
    assert (out[:6] - exact[:6]).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert torch.equal(lse.isneginf(), exact_lse.isneginf())
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    again = fastattn.varlen_attention(q, k, v, *FEW_BOUNDS, mask=mask, backend=backend)
    assert torch.equal(again[:6], out[:6])


@pytest.mark.skipif(not TRITON or torch.cuda.is_available(), reason="is about Triton's interpreter")
def test_few_queries_share_out_their_keys_and_drop_as_others_do(monkeypatch):
    from fastattn.kernels import decode

    launched = []
    start = decode.start
    monkeypatch.setattr(decode, "start", lambda one: (launched.append(one[0].fn.__name__), start(one)))
    q, k, v = (t.detach() for t in packed(dtype=torch.float32, heads=(6, 2), lengths=(FEW_Q, FEW_K)))
    found, right = (
        fastattn.varlen_attention(
            q, k, v, *FEW_BOUNDS, dropout_p=0.4, generator=torch.Generator().manual_seed(3), backend=backend
        )
        for backend in ("triton", "reference")
    )
    assert launched == ["_decode_kernel", "_add_splits_kernel"]
    torch.testing.assert_close(found, right)


def test_the_sequences_of_a_call_are_what_attention_would_get():
    q, k, v = packed()
    call = varlen_call(q, k, v, *BOUNDS, mask=Causal(), bias=alibi()[0], backend="")
    assert [(rows.start, rows.stop) for rows, _, _ in sequences(call)] == list(pairwise(BOUNDS[0].tolist()))
    for (_, _, one), len_q, len_k in zip(sequences(call), LENGTHS_Q, LENGTHS_K, strict=True):
        assert (one.diag_lo < -1000, one.diag_hi) == (True, len_k - len_q)
        torch.testing.assert_close(one.relative_bias, alibi()[0].diagonals(4, len_q, len_k))


def test_opcheck():
    q, k, v = packed(dtype=torch.float32)
    given = varlen_call(q, k, v, *BOUNDS, mask=Causal(), bias=alibi()[0], sinks=torch.zeros(4), backend="")
    plain = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in given)
    leaves = (t.clone().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in plain)
    torch.library.opcheck(torch.ops.fastattn.attention.default, tuple(leaves))
    out, lse = torch.ops.fastattn.attention(*plain)
    needed = [t is not None for t in plain[:6]]
    torch.library.opcheck(
        torch.ops.fastattn.attention_backward.default, (*plain, out, lse, torch.randn_like(out), None, needed)
    )


def test_second_derivatives():
    q, k, v = (t[:5] for t in packed())
    bounds = torch.tensor([0, 2, 5])
    assert torch.autograd.gradgradcheck(
        lambda *t: fastattn.varlen_attention(*t, bounds, bounds, mask=Causal()), (q, k, v), atol=1e-4
    )


@pytest.mark.skipif(not TRITON or torch.cuda.is_available(), reason="is about Triton's interpreter")
def test_one_launch_for_all(monkeypatch):
    from fastattn.kernels import attention_forward

    launched = []
    start = attention_forward.launch
    monkeypatch.setattr(attention_forward, "launch", lambda op, *rest: (launched.append(op), start(op, *rest)))
    q, k, v = (t.detach() for t in packed())
    fastattn.varlen_attention(q, k, v, *BOUNDS, backend="triton")
    assert launched == ["attention"]


BAD_BOUNDS = [[0, 3, 3, 2**40, 5, -1], [-7, -3, 4, 2, 1, 0], [5, 50, 60, 70, -1, -(2**40)], [39, 20, 10, 5, 1, 0]]


@pytest.mark.parametrize("bounds", BAD_BOUNDS, ids=str)
def test_bounds_that_change_after_they_were_checked_lead_nowhere(bounds, backend):
    """Rule 8: whatever they hold, nothing outside of the tensors is read or written."""
    q, k, v = (t.detach() for t in packed(dtype=torch.float32))
    fence = [torch.full((200, t.shape[1], t.shape[2]), float("nan")) for t in (q, k, v)]
    placed = []
    for room, tensor in zip(fence, (q, k, v), strict=True):
        room[80 : 80 + len(tensor)] = tensor
        placed.append(room[80 : 80 + len(tensor)])
    call = varlen_call(*placed, *BOUNDS, mask=Window(3, 3), backend=backend)
    call = call._replace(starts_q=torch.tensor(bounds), starts_k=torch.tensor(bounds))
    found = _dispatch.choose("attention", call)
    if backend == "reference":
        # It puts sequences together, which then are not as many tokens as the fake promises.
        assert sum(one.query.shape[2] for _, _, one in sequences(call)) <= 41 * 5
        return
    out, lse = found.attention(call)
    assert out.shape == (1, 4, 41, 6)
    covered = torch.zeros(41, dtype=torch.bool)
    for rows, _, _ in sequences(call):
        covered[rows] = True
    assert not out[0][:, covered].isnan().any()
    # Bounds that fall leave no row to two sequences, whose programs would race for it.
    assert sum(rows.stop - rows.start for rows, _, _ in sequences(call)) == covered.sum()
    assert torch.equal(found.attention(call)[0][:, :, covered], out[:, :, covered])
    gradients = found.attention_backward(
        call, out.zero_(), lse.zero_(), torch.ones_like(out), None, [True] * 3 + [False] * 3
    )
    assert not gradients[0][0][:, covered].isnan().any()
    for room, tensor in zip(fence, (q, k, v), strict=True):
        assert room[:80].isnan().all()
        assert room[80 + len(tensor) :].isnan().all()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"starts_k": None}, TypeError),
        ({"starts_k": torch.tensor([0, 67, 74])}, ValueError),
        ({"starts_q": torch.tensor([0, 3, 3, 38, 39, 41]).int()}, TypeError),
        ({"starts_q": torch.tensor([[0], [3], [3], [38], [39], [41]])}, ValueError),
        ({"longest_q": 42}, ValueError),
        ({"longest_k": -1}, ValueError),
        ({"longest_k": 70}, ValueError),  # and so other diagonals
        ({"query": torch.zeros(2, 4, 41, 8)}, ValueError),
    ],
    ids=str,
)
def test_the_op_itself_refuses_what_would_lead_out_of_tensors(change, error):
    q, k, v = (t.detach() for t in packed(dtype=torch.float32))
    call = varlen_call(q, k, v, *BOUNDS, bias=Alibi(alibi()[1].detach()), backend="")
    torch.ops.fastattn.attention(*call)
    with pytest.raises(error):
        torch.ops.fastattn.attention(*call._replace(**change))


class Odd(RelativeBias):
    """Not one of those that end at the last key."""


@pytest.mark.parametrize(
    ("bounds", "options", "error", "message"),
    [
        ([0, 4, 8], {}, ValueError, "end with the number of tokens 9"),
        ([0, 5, 4, 9], {}, ValueError, "never fall"),
        ([1, 9], {}, ValueError, "start with 0"),
        ([9], {}, ValueError, "at least 2 elements"),
        ([0.0, 9.0], {}, TypeError, "int32 or int64"),
        ([0, 3, 9], {}, ValueError, "one length"),
        ([0, 9], {"mask": KeyLengths(torch.ones(1).int())}, TypeError, "Causal or Window"),
        ([0, 9], {"bias": torch.zeros(9, 9)}, TypeError, "Alibi or RelativePosition"),
        ([0, 9], {"bias": Odd()}, TypeError, "Alibi or RelativePosition"),
    ],
)
def test_wrong_bounds_and_options(bounds, options, error, message):
    q = torch.randn(9, 1, 4)
    with pytest.raises(error, match=message):
        fastattn.varlen_attention(q, q, q, torch.tensor(bounds), torch.tensor([0, 9]), **options)
