import pytest

from adaptermesh.core.choices import check_choices
from adaptermesh.core.errors import Code, MeshError


def test_one_to_eight_answers_may_be_asked_for() -> None:
    assert [check_choices(n) for n in (1, 8)] == [1, 8]


@pytest.mark.parametrize("n", [-1, 0, 9])
def test_any_other_number_is_refused_with_its_field(n: int) -> None:
    with pytest.raises(MeshError) as raised:
        check_choices(n)
    assert raised.value.code is Code.INVALID_ARGUMENT
    assert raised.value.metadata["field"] == "n"
