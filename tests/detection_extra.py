"""Whether the extra `detection` is installed: tests that need it are skipped where it is not, and say so."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from trainables.detectors import NEEDED

INSTALLED = all(find_spec(name) is not None for name in NEEDED)
REASON = "needs the extra `detection`: make setup EXTRAS=dev,detection"
needs_detection = pytest.mark.skipif(not INSTALLED, reason=REASON)
