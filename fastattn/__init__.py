"""Fused, exact attention for PyTorch."""
