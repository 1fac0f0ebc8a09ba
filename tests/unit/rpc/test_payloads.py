"""Payloads are what protobuf writes and reads."""

from hypothesis import given
from hypothesis import strategies as st

from adaptermesh.api.store.v1.store_pb2 import FetchAdapterResponse
from adaptermesh.rpc.payloads import decode_payload, encode_payload, payload_or, serializer

NUMBER = FetchAdapterResponse.DATA_FIELD_NUMBER
read = payload_or(NUMBER, FetchAdapterResponse.FromString)
write = serializer(FetchAdapterResponse.SerializeToString)

# The length takes one, two, three and four bytes.
SIZES = st.one_of(st.integers(0, 300), st.integers(2**14 - 2, 2**14 + 2), st.integers(2**21 - 2, 2**21 + 2))


@given(SIZES, st.binary(min_size=1, max_size=16))
def test_a_payload_is_what_protobuf_writes(size: int, pattern: bytes) -> None:
    data = (pattern * (size // len(pattern) + 1))[:size]
    message = FetchAdapterResponse(data=data).SerializeToString()
    assert encode_payload(NUMBER, memoryview(data)) == message
    found = decode_payload(NUMBER, message)
    assert found is not None
    assert bytes(found) == data


@given(st.binary(max_size=40))
def test_any_other_bytes_are_protobufs_business(message: bytes) -> None:
    """What is taken for a payload is one to protobuf too, and the rest is given to it."""
    found = decode_payload(NUMBER, message)
    if found is not None:
        assert FetchAdapterResponse.FromString(message) == FetchAdapterResponse(data=bytes(found))


def test_other_messages_pass_through() -> None:
    manifest = FetchAdapterResponse(manifest=b"{}")
    assert read(manifest.SerializeToString()) == manifest
    assert read(b"") == FetchAdapterResponse()
    assert write(manifest) == manifest.SerializeToString()
    assert write(b"as it is") == b"as it is"


def test_a_message_that_goes_on_behind_its_data_is_read_by_protobuf() -> None:
    twice = encode_payload(NUMBER, b"first") + encode_payload(NUMBER, b"second")
    assert read(twice) == FetchAdapterResponse(data=b"second")
