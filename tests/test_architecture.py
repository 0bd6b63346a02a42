"""The house of docs/architecture.md: imports only go down, import is light, and an op's schema is its call."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn.spec.attention import AttentionCall
from fastattn.spec.dropout import DropoutCall
from fastattn.spec.embedding import EmbeddingBackwardCall, EmbeddingCall
from fastattn.spec.feed_forward import FeedForwardCall
from fastattn.spec.linear import LinearCall
from fastattn.spec.linear_cross_entropy import LinearCrossEntropyCall
from fastattn.spec.norm import NormBackwardCall, NormCall
from fastattn.spec.paged_attention import PagedCall
from fastattn.spec.rotary_embedding import RotaryEmbeddingCall
from fastattn.spec.softmax import SoftmaxBackwardCall, SoftmaxCall

PACKAGE = Path(fastattn.__file__).parent
FLOORS = {
    "fastattn.cli": 6,
    "fastattn.__main__": 6,
    "fastattn.tools": 6,
    "fastattn.data": 5,
    "fastattn.models": 5,
    "fastattn.integrations": 5,
    "fastattn.distributed": 5,
    "fastattn.nn": 4,
    "fastattn.ops": 3,
    "fastattn.backends": 2,
    "fastattn.reference": 1,
    "fastattn.kernels": 1,
    "fastattn._cpu": 1,
    "fastattn._cuda": 1,
    "fastattn.spec": 0,
    "fastattn.masks": 0,
    "fastattn.biases": 0,
    "fastattn.errors": 0,
}
# In a checkout the kernels are a link, which rglob() does not follow.
MODULES = {
    ".".join(("fastattn", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in {*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("*.py")}
}
CALLS = {
    "attention": AttentionCall,
    "dropout": DropoutCall,
    "embedding": EmbeddingCall,
    "embedding_backward": EmbeddingBackwardCall,
    "feed_forward": FeedForwardCall,
    "linear": LinearCall,
    "linear_cross_entropy": LinearCrossEntropyCall,
    "norm": NormCall,
    "norm_backward": NormBackwardCall,
    "paged_attention": PagedCall,
    "rotary_embedding": RotaryEmbeddingCall,
    "softmax": SoftmaxCall,
    "softmax_backward": SoftmaxBackwardCall,
}


def floor(module: str) -> int | None:
    """Returns the floor that a module of the package stands on; None for what has none, such as the package itself."""
    return FLOORS.get(".".join(module.split(".")[:2]))


def imported(source: str) -> set[str]:
    """Returns the modules of the package that a source names in its imports, wherever in the file they stand."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            assert node.module is not None
            # "from fastattn import masks" names a module, "from fastattn.masks import Causal" a value.
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "fastattn" else {node.module}
            )
    return {name for name in found if name.split(".")[0] == "fastattn"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_only_go_down(module):
    at = floor(module)
    if module == "fastattn":
        return
    assert at is not None, f"{module} stands on no floor: give it one in docs/architecture.md and here"
    for name in sorted(imported(MODULES[module].read_text())):
        below = floor(name)
        # The package's own names come from anywhere, so only the top floor may use them.
        assert at == 6 if below is None else below <= at, f"{module} (floor {at}) imports {name} (floor {below})"


def test_the_check_sees_an_import_that_goes_up():
    names = imported(
        "def f():\n    from fastattn.nn import Softmax\n    from fastattn import ops, masks\n    import torch"
    )
    assert names == {"fastattn.nn", "fastattn.ops", "fastattn.masks"}
    assert [floor(name) for name in sorted(names)] == [0, 4, 3]


def test_import_in_a_fresh_process_is_light():
    heavy = ("matplotlib", "triton", "tokenizers", "safetensors", "transformers", "tqdm", "IPython")
    code = (
        "import sys, torch; before = set(sys.modules); import fastattn\n"
        f"print(sorted(m for m in set(sys.modules) - before if m.split('.')[0] in {heavy}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", CALLS)
def test_the_schema_of_an_op_is_its_call(name):
    arguments = [a.name for a in getattr(torch.ops.fastattn, name).default._schema.arguments]
    assert arguments == list(CALLS[name]._fields)


@pytest.mark.parametrize(
    "name", sorted({op.split("::")[1] for op in torch._C._dispatch_get_all_op_names() if op.startswith("fastattn::")})
)
def test_every_op_starts_with_a_call(name):
    """An op without a call of its own, such as a backward, takes another's fields first."""
    arguments = [a.name for a in getattr(torch.ops.fastattn, name.split(".")[0]).default._schema.arguments]
    assert any(arguments[: len(call._fields)] == list(call._fields) for call in CALLS.values())
