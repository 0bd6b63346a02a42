"""fastattn.nn.Softmax against torch.nn.Softmax."""

import pytest
import torch
from torch import nn

import fastattn


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_as_pytorch(dim):
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    ours = fastattn.nn.Softmax(dim)
    assert isinstance(ours, nn.Softmax)
    assert repr(ours) == repr(nn.Softmax(dim))
    assert ours.state_dict() == {}
    torch.testing.assert_close(ours(x), nn.Softmax(dim)(x))


@pytest.mark.parametrize("shape", [(3,), (3, 4), (2, 3, 4), (2, 3, 4, 5)], ids=str)
def test_implicit_dim_warns_and_chooses_as_pytorch(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="Implicit dimension choice"):
        expected = nn.Softmax()(x)
    with pytest.warns(UserWarning, match="Implicit dimension choice"):
        torch.testing.assert_close(fastattn.nn.Softmax()(x), expected)


def test_mask():
    mask = torch.tensor([[True, False, True], [False, False, False]])
    out = fastattn.nn.Softmax(-1)(torch.zeros(2, 3), mask)
    assert torch.equal(out, torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.0, 0.0]]))
