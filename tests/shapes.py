"""A fixture for tests of conversations whose batches may have any size."""

from collections.abc import Iterator

import pytest

from simrl.rollouts import compaction, context


@pytest.fixture(autouse=True, scope='module')
def one_shape() -> Iterator[None]:
    """Conversations in batches and caches of one size, so that a message is one program for each role.

    Tests of `rollouts` show that sizes decide no token.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compaction, 'MIN_ROWS', 2**20)
        patch.setattr(context, 'SMALLEST_CACHE', 2**20)
        yield
