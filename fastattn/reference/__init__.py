"""The formulas in plain PyTorch: exact in float64, differentiable to any order; the test of every backend."""
