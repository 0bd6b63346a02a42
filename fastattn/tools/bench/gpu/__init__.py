"""``benchmarks/gpu.py``: everything that is to be known of the kernels on a GPU, in one command.

``command`` plans jobs (``plan``), runs them in child processes (``lanes``, ``child``) and writes what they say:
``environment``, ``numerics``, ``speed`` and ``search`` each hold the jobs of a section; ``targets``, ``summary`` and
``pictures`` are functions of the results' lines alone.
"""
