import pytest

from adaptermesh.core.errors import Code, MeshError
from adaptermesh.core.priority import check_priority


@pytest.mark.parametrize("priority", [-100, 0, 100])
def test_the_edges_are_legal(priority: int) -> None:
    assert check_priority(priority) == priority


@pytest.mark.parametrize("priority", [-101, 101])
def test_a_priority_out_of_range_is_refused_with_its_field(priority: int) -> None:
    with pytest.raises(MeshError) as raised:
        check_priority(priority)
    assert raised.value.code is Code.INVALID_ARGUMENT
    assert raised.value.metadata["field"] == "priority"
