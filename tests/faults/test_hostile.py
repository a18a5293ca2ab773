"""A hostile file or file name is skipped with a reason, and the rest of the corpus is prepared."""

from pathlib import Path

import pytest

from tests.faults import hostile
from tests.faults.test_faults import SEED, assert_nothing_lost

pytestmark = pytest.mark.slow


def test_hostile_files_of_every_kind_together_leave_the_corpus_intact(tmp_path: Path) -> None:
    assert_nothing_lost(hostile.feed(tmp_path, 24 << 20, SEED, 50, together=True))
