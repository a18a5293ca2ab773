"""Finding the other ranks."""

import pytest

from llm_core.distributed import interface_towards
from llm_core.errors import UserError


def test_the_interface_is_the_one_whose_route_leads_to_the_host() -> None:
    assert interface_towards("127.0.0.1") in ("lo", "lo0")


def test_a_first_machine_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(UserError, match=r"MASTER_ADDR nowhere\.invalid: cannot be reached .* --master_addr"):
        interface_towards("nowhere.invalid")
