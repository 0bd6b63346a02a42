"""A forked child has none of its parent's OpenMP threads: the kernels must neither wait for them nor answer otherwise.

Each test runs in a process of its own, and a child that hangs is killed.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("fastattn._cpu")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

PRELUDE = """
import os, signal, torch, fastattn

torch.manual_seed(0)
torch.set_num_threads(4)
query, key, value = (torch.randn(2, 4, 300, 32, requires_grad=True) for _ in range(3))
tokens, weight_in, weight_out = torch.randn(500, 32), torch.randn(256, 32), torch.randn(32, 256)
zeros = torch.zeros(256), torch.zeros(32)
ones = torch.ones_like(query)

def results():
    out = fastattn.attention(query, key, value)
    found = [
        out,
        *torch.autograd.grad(out, (query, key, value), ones),
        fastattn.softmax(query),
        fastattn.layer_norm(query, ones[0, 0, 0].detach(), None),
        fastattn.feed_forward(tokens, weight_in, zeros[0], weight_out, zeros[1]),
        fastattn.attention_weights(query, key),
        fastattn.attention_weights(query, key, reduce="key_sum"),
        *fastattn.attention_weights(query, key, reduce="top_k", top_k=3),
    ]
    # Bytes, because PyTorch's own kernels hang in a forked child, torch.equal among them.
    return [t.detach().numpy().tobytes() for t in found]

expected = results()  # starts the pool
"""

FORK = """
child = os.fork()
if child == 0:
    signal.alarm(30)
    os._exit(0 if results() == expected else 3)
_, status = os.waitpid(child, 0)
assert not os.WIFSIGNALED(status), "the child hung"
assert os.WEXITSTATUS(status) == 0, "the child answers otherwise"
assert results() == expected  # the parent still has its threads
"""

DATA_LOADER = """
class Answers(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return results() == expected

loader = torch.utils.data.DataLoader(Answers(), num_workers=2, timeout=30, multiprocessing_context="fork")
assert [bool(same) for same in loader] == [True, True]
"""


@pytest.mark.parametrize("code", [FORK, DATA_LOADER], ids=["fork", "data loader"])
def test_kernels_in_a_forked_child(code):
    result = subprocess.run(
        [sys.executable, "-c", PRELUDE + code], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
