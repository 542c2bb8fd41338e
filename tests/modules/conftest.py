"""The tests of modules import their oracles by name, wherever pytest was started."""

import sys
from pathlib import Path

FOLDER = Path(__file__).parent.parent
if str(FOLDER) not in sys.path:
    sys.path.insert(0, str(FOLDER))
