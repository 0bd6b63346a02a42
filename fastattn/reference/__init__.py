"""The formulas in plain PyTorch: exact in float64, differentiable to any order; what every backend is tested against."""
