"""Whatever a file holds or is called, it is set aside with a reason and the rest of the corpus goes on."""

from pathlib import Path

import pytest

from tests.faults import hostile
from tests.faults.test_faults import SEED, assert_nothing_lost

pytestmark = pytest.mark.slow


def test_every_kind_of_hostile_file_beside_all_others_leaves_the_corpus_whole(tmp_path: Path) -> None:
    assert_nothing_lost(hostile.feed(tmp_path, 24 << 20, SEED, 50, together=True))
