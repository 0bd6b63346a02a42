"""The formulas in plain PyTorch: exact in float64, differentiable to any order.  Every other backend is tested against them."""
