"""Two machines, for the tests of this folder."""

from collections.abc import Iterator
from contextlib import closing

import pytest
from machines import NoMachinesError, Pair


@pytest.fixture
def pair(tmp_path) -> Iterator[Pair]:
    """Two machines and a cable; a skip, with the reason, where they cannot be had."""
    try:
        made = Pair(tmp_path)
    except NoMachinesError as error:
        pytest.skip(f"no machines can be made here: {error}")
    with closing(made):
        yield made
