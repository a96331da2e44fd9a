"""Imported before the project's modules by test files that are nothing without the extra `detection`: skips them."""

from __future__ import annotations

import pytest

from tests.detection_extra import INSTALLED, REASON

if not INSTALLED:
    pytest.skip(REASON, allow_module_level=True)
