"""Triton kernels; installed as ``fastattn.kernels``, launched by ``fastattn.backends.triton`` alone."""
