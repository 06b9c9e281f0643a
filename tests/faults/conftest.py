"""The undisturbed run that disturbed ones are compared with."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

pytest.register_assert_rewrite("small_world")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """With one thread for each process: what is bitwise equal is so at the same number of threads."""
    from small_world import SmallWorld  # whose assertions say more from here on

    patch = pytest.MonkeyPatch()
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.delenv("FLEXREC_DEBUG", raising=False)
    yield SmallWorld(tmp_path_factory.mktemp("undisturbed"))
    patch.undo()
