import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptermesh.core.errors import MeshError, Reason
from adaptermesh.worker.models.names import check_model_id, is_repository, model_id_of


@pytest.mark.parametrize(
    ("name", "model_id"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "huggingfacetb--smollm2-135m-instruct"),
        ("My Model (final)", "my-model-final"),
        ("qwen2.5", "qwen2.5"),
    ],
)
def test_a_name_becomes_a_lower_case_folder_name(name: str, model_id: str) -> None:
    assert model_id_of(name) == model_id


@pytest.mark.parametrize(
    "model_id", ["", ".", "..", "../x", "a/b", "a\\b", ".hidden", "UPPER", "a..b", "a" * 97, "a\0b"]
)
def test_an_id_that_could_leave_the_cache_is_refused(model_id: str) -> None:
    with pytest.raises(MeshError) as caught:
        check_model_id(model_id)
    assert caught.value.reason is Reason.INVALID_NAME


@given(st.text(max_size=120))
def test_every_name_gives_a_safe_id_or_an_error(name: str) -> None:
    try:
        model_id = model_id_of(name)
    except MeshError as error:
        assert error.reason is Reason.INVALID_NAME
    else:
        assert check_model_id(model_id) == model_id
        assert "/" not in model_id
        assert ".." not in model_id


@pytest.mark.parametrize("name", ["a", "a/b/c", "../b", "a/..", "/a", "a/", "a/b..c"])
def test_only_org_and_name_are_a_hub_repository(name: str) -> None:
    assert not is_repository(name)


def test_a_hub_repository_is_recognised() -> None:
    assert is_repository("HuggingFaceTB/SmolLM2-135M-Instruct")
