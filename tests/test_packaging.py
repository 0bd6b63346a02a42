"""Packaging: a source distribution holds the kernels' sources and the data, and setuptools has nothing to warn of."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a checkout")
def test_source_distribution_and_data(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("fastattn", "csrc", "kernels"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignored)
    command = [sys.executable, "setup.py", "build_py", "sdist"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "fastattn.data.g2p" not in result.stderr  # "is absent from the `packages` configuration"

    with tarfile.open(next((tmp_path / "dist").glob("*.tar.gz"))) as archive:
        shipped = {name.split("/", 1)[-1] for name in archive.getnames()}
    sources = {p.relative_to(tmp_path).as_posix() for p in (tmp_path / "csrc").rglob("*") if p.is_file()}
    triton = {p.name for p in (tmp_path / "kernels").glob("*.py")}
    data = {p.relative_to(tmp_path).as_posix() for p in (tmp_path / "fastattn" / "data").rglob("*") if p.is_file()}
    assert sources | data | {"fastattn/tools/bench/grid.toml", "fastattn/py.typed"} <= shipped
    assert {f"kernels/{name}" for name in triton} <= shipped
    (library,) = (tmp_path / "build").glob("lib*")
    assert triton == {p.name for p in (library / "fastattn" / "kernels").iterdir()}
    assert data <= {p.relative_to(library).as_posix() for p in library.rglob("*")}
