import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from adaptermesh.core.errors import Code, MeshError, Reason, base_mismatch
from adaptermesh.rpc.status import from_status, to_status


@given(
    st.sampled_from(Code),
    st.sampled_from(Reason),
    st.text(max_size=100),
    st.dictionaries(st.text("abc_", min_size=1), st.text(max_size=20), max_size=3),
    st.none() | st.floats(0, 3600),
)
def test_an_error_survives_the_wire(
    code: Code, reason: Reason, message: str, metadata: dict[str, str], retry_after: float | None
) -> None:
    error = MeshError(code, reason, message, metadata=metadata, retry_after=retry_after)
    wire = status_pb2.Status.FromString(to_status(error).SerializeToString())
    back = from_status(wire)
    assert (back.code, back.reason, back.message, back.metadata) == (code, reason, message, metadata)
    assert back.retry_after == (None if retry_after is None else pytest.approx(retry_after, abs=1e-8))


def test_a_status_has_exactly_one_error_info_and_retry_info_only_if_transient() -> None:
    permanent = to_status(base_mismatch("a/b@prod", "sha256:1", "sha256:2"))
    transient = to_status(MeshError(Code.UNAVAILABLE, Reason.DRAINING, "x", retry_after=1.5))
    info, retry = error_details_pb2.ErrorInfo.DESCRIPTOR, error_details_pb2.RetryInfo.DESCRIPTOR
    assert [detail.Is(info) for detail in permanent.details] == [True]
    assert [(detail.Is(info), detail.Is(retry)) for detail in transient.details] == [
        (True, False),
        (False, True),
    ]


def test_a_status_of_somebody_else_is_not_taken_for_ours() -> None:
    status = status_pb2.Status(code=14, message="proxy says no")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="TASK_NOT_FOUND", domain="example.com"))
    error = from_status(status)
    assert error.code is Code.UNAVAILABLE
    assert error.reason is Reason.INTERNAL
    assert from_status(status_pb2.Status(code=99)).code is Code.INTERNAL
