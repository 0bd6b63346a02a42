"""Everything about this GPU in one command: ``python benchmarks/gpu.py --out DIR [--quick]``.

It runs from a plain checkout, needs no network, and stops at no failure; ``benchmarks/README.md`` says what it does.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastattn.tools.bench.gpu.command import main

if __name__ == "__main__":
    sys.exit(main())
