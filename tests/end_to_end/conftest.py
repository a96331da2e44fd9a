"""What the fault tests compare with: the same study, undisturbed."""

from __future__ import annotations

import pytest

from tests.studies_for_tests import Ran, run_study


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The smallest ablation, run in this process to its end."""
    return run_study(tmp_path_factory.mktemp("undisturbed"))
