"""The suites import their siblings (cases) by name; the repository's root stays off sys.path, as in the tests."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE), *(entry for entry in sys.path if Path(entry or ".").resolve() != HERE.parent)]
