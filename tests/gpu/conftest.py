"""These tests take their oracles and inputs from those of the operators."""

import sys
from pathlib import Path

folder = str(Path(__file__).parent.parent / "ops")
if folder not in sys.path:
    sys.path.insert(0, folder)
