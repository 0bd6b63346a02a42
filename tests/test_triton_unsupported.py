"""What the Triton backend does where it cannot serve: its reasons, the next backend, and the next tile."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from contextlib import contextmanager
from importlib.machinery import ModuleSpec

import pytest
import torch
from conftest import TRITON

import fastattn
from fastattn.backends import BY_NAME, triton
from fastattn.errors import FallbackWarning, UnsupportedError
from fastattn.ops import _dispatch
from fastattn.spec.attention import attention_call
from fastattn.spec.linear_cross_entropy import LinearCrossEntropyCall

pytestmark = pytest.mark.skipif(not TRITON or torch.cuda.is_available(), reason="is about Triton's interpreter")


def call(head_dim=8, head_dim_v=8, backend="triton"):
    query = torch.linspace(-2, 2, 80).sin().view(1, 2, 5, 8)[..., :1].expand(1, 2, 5, head_dim).contiguous()
    return attention_call(query, query, query[..., :1].expand(1, 2, 5, head_dim_v).contiguous(), backend=backend)


@pytest.fixture
def fresh(monkeypatch):
    """Lets what is known of the installation and of failures be found out anew, before and after."""
    importlib.import_module("triton")  # in the mode of all tests of this process, before one changes the environment
    known = (triton.missing, triton.broken, triton.too_old)
    for found in known:
        found.cache_clear()
    monkeypatch.setattr(_dispatch, "_failed", {})
    monkeypatch.setattr(_dispatch, "_warned", set())
    yield monkeypatch
    monkeypatch.undo()
    for found in known:
        found.cache_clear()


@pytest.fixture
def launcher(fresh):
    from fastattn.kernels import launch

    fresh.setattr(launch, "_failed", {})
    return launch


def test_without_the_interpreter_there_is_no_gpu(fresh):
    fresh.delenv("TRITON_INTERPRET")
    status = fastattn.backends()["triton"]
    assert not status.available
    assert "no GPU" in status.reason
    with pytest.raises(UnsupportedError, match=r"no GPU(.|\n)*runs on cuda, got tensors on cpu"):
        fastattn.attention(*call()[:3], backend="triton")


@pytest.mark.parametrize("spec", [None, ModuleSpec("triton", None)], ids=["nothing", "a folder of that name"])
def test_without_triton(spec, fresh):
    fresh.setattr(importlib.util, "find_spec", lambda name: spec)
    assert fastattn.backends()["triton"].reason.startswith("triton is not installed: pip install")


def test_no_triton_in_a_fresh_process():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fastattn\n"
        "q = torch.ones(1, 1, 3, 8); fastattn.attention(q, q, q)\n"
        "print(fastattn.backends()['triton'])\n"
        "try: fastattn.softmax(q, backend='triton')\n"
        "except fastattn.UnsupportedError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("triton is not installed: pip install") == 2


@pytest.mark.parametrize(
    ("version", "fits"),
    [("3.5.1", False), ("2.3.0", False), ("3.6.0", True), ("3.6rc1", True), ("3.10", True), ("4.0.0+git1", True)],
)
def test_a_triton_that_is_too_old(version, fits, fresh):
    fresh.setattr(importlib.metadata, "version", lambda name: version)
    status = fastattn.backends()["triton"]
    assert status.available == fits
    assert fits or f"triton {version} is too old" in status.reason


def test_a_triton_that_does_not_work(fresh):
    """For want of a driver, as here, or of a C compiler: the first call finds out, and then ``backends()`` says so."""
    fresh.delenv("TRITON_INTERPRET")
    fresh.setattr(torch.cuda, "is_available", lambda: True)
    fresh.setattr(torch.cuda, "device_count", lambda: 1)
    fresh.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert fastattn.backends()["triton"].available
    why = triton.broken()
    assert why is not None
    assert why.startswith("triton is installed, but does not work here: ")
    assert fastattn.backends()["triton"] == (False, why)


def test_the_interpreter_asked_for_too_late():
    """Triton decides when it is imported whether it interprets."""
    code = (
        "import os; os.environ.pop('TRITON_INTERPRET', None)\n"
        "import triton; os.environ['TRITON_INTERPRET'] = '1'\n"
        "import torch, fastattn\n"
        "try: fastattn.softmax(torch.ones(3), backend='triton')\n"
        "except fastattn.UnsupportedError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "TRITON_INTERPRET has changed since triton was imported" in done.stdout, done.stderr


def test_a_gpu_that_is_too_old(fresh):
    fresh.delenv("TRITON_INTERPRET")
    fresh.setattr(torch.cuda, "is_available", lambda: True)
    fresh.setattr(torch.cuda, "device_count", lambda: 1)
    fresh.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    for capability, reason in [((7, 5), "Tesla T4 has compute capability 7.5, kernels need 8.0"), ((9, 0), None)]:
        triton.too_old.cache_clear()
        fresh.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert fastattn.backends()["triton"].reason == reason


@pytest.mark.parametrize("dims", [(300, 8), (8, 300)])
def test_what_it_has_no_kernel_for(dims):
    reasons = BY_NAME["triton"].refuses("crochet", call(*dims))
    assert reasons == ["has no kernel for crochet", "takes a head_dim of at most 256"]
    for op in (fastattn.attention, lambda q, k, v, **options: fastattn.attention_weights(q, k, **options)):
        given = call(*sorted(dims, reverse=op is not fastattn.attention))[:3]
        with pytest.raises(UnsupportedError, match="head_dim of at most 256"):
            op(*given, backend="triton")


def test_lengths_whose_sums_do_not_fit_in_32_bits():
    one = torch.ones(1, 1, 1, 8)
    long = one.expand(1, 1, 2**30 + 1, 8)
    for query, key in ((long, one), (one, long)):
        with pytest.raises(UnsupportedError, match="takes at most 1073741824 queries and keys"):
            fastattn.attention(query, key, key, backend="triton")
    target = torch.zeros(1, dtype=torch.int64).expand(2**30 + 1)
    loss = LinearCrossEntropyCall(long[0, 0], one[0, 0], target, None, -100, 0.0, "mean", "triton")
    with pytest.raises(UnsupportedError, match="takes at most 1073741824 tokens"):
        _dispatch.choose("linear_cross_entropy", loss)


def refusing(launcher, error, times=1000):
    """Lets the first launches fail as on a GPU that is too small."""
    begun = []

    @contextmanager
    def small_gpu():
        begun.append(1)
        if len(begun) <= times:
            raise error
        yield

    return small_gpu, begun


def out_of_shared_memory():
    from triton.runtime.errors import OutOfResources

    return OutOfResources(300000, 101376, "shared memory")


def test_the_next_tile_where_one_does_not_fit(launcher, fresh):
    small_gpu, begun = refusing(launcher, out_of_shared_memory(), times=2)
    fresh.setattr(launcher, "as_on_a_gpu", small_gpu)
    started = []
    for _ in range(2):
        launcher.launch("crochet", [(64, 4), (32, 4), (16, 4)], started.append)
    assert started == [(16, 4), (16, 4)]
    assert len(begun) == 4  # what did not fit is not tried again
    launcher.launch("knitting", [(64, 4), (32, 4)], started.append)
    assert started[-1] == (64, 4)


def test_no_tile_fits(launcher, fresh):
    small_gpu, begun = refusing(launcher, out_of_shared_memory())
    fresh.setattr(launcher, "as_on_a_gpu", small_gpu)
    message = r"smallest tile \(16, 4\) needs 300000 of shared memory, and this GPU has 101376"
    for _ in range(2):
        with pytest.raises(UnsupportedError, match=message):
            launcher.launch("crochet", [(64, 4), (16, 4)], lambda tile: None)
    assert len(begun) == 2


def test_an_architecture_that_the_assembler_does_not_know(launcher, fresh):
    from triton.runtime.errors import PTXASError

    small_gpu, _ = refusing(launcher, PTXASError("Value 'sm_130' is not defined"))
    fresh.setattr(launcher, "as_on_a_gpu", small_gpu)
    for op in (
        lambda x: fastattn.softmax(x, backend="triton"),
        lambda x: fastattn.attention(x, x, x, backend="triton"),
    ):
        with pytest.raises(UnsupportedError, match="no code for this GPU: PTXAS error: Value 'sm_130'"):
            op(torch.ones(1, 1, 3, 8))
    assert "sm_130" in fastattn.backends()["triton"].reason


def test_more_programs_than_a_launch_takes(launcher, fresh):
    small_gpu, _ = refusing(launcher, OverflowError("signed integer is greater than maximum"))
    fresh.setattr(launcher, "as_on_a_gpu", small_gpu)
    with pytest.raises(UnsupportedError, match="too large: signed integer"):
        launcher.launch("crochet", [(64, 4), (16, 4)], lambda tile: None)


def test_the_next_backend_where_no_tile_fits(launcher, fresh):
    """As on a GPU: the automatic choice asks Triton, which finds that it cannot, and takes the reference."""
    small_gpu, begun = refusing(launcher, out_of_shared_memory())
    fresh.setattr(launcher, "as_on_a_gpu", small_gpu)
    fresh.setattr(BY_NAME["cpu"], "refuses", lambda op, call: ["it is asleep"], raising=False)
    fresh.setattr(BY_NAME["triton"], "refuses", lambda op, call: [], raising=False)
    assert fastattn.backends()["triton"] == (True, None)
    query, key, value = (t.clone().requires_grad_() for t in call()[:3])
    chosen = []
    with _dispatch.observe(lambda op, call, backend: chosen.append(backend.name)):
        with pytest.warns(FallbackWarning, match="triton: the smallest tile .* needs 300000 of shared memory"):
            out, lse = fastattn.attention(query, key, value, return_lse=True)
        with pytest.warns(FallbackWarning, match="attention_backward"):
            (grad,) = torch.autograd.grad(out.sum() + lse.sum(), query)
    assert chosen == ["triton", "reference"] * 2
    right, _ = fastattn.attention(query, key, value, return_lse=True, backend="reference")
    assert torch.equal(out, right)
    assert grad.isfinite().all()
    assert len(begun) > 1
    status = fastattn.backends()["triton"]
    assert status.available
    assert status.reason.startswith("attention: the smallest tile")
    assert "attention_backward, rows: the smallest tile" in status.reason


def test_a_gpu_that_is_not_the_current_one(fresh):
    """Triton launches on the current GPU."""
    entered = []
    fresh.setattr(torch.cuda, "current_device", lambda: 0)
    fresh.setattr(torch.cuda, "device", lambda device: entered.append(device.index))
    for index in (0, 1):
        tensor = type("Far", (), {"device": torch.device("cuda", index)})()
        BY_NAME["triton"].on_device_of((tensor,))
    assert entered == [1]
