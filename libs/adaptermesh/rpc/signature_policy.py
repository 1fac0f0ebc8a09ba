"""A namespace's signature policy on the wire: the same for store, router and client."""

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.core.signature_policy import SignaturePolicy

_MESSAGES = {
    SignaturePolicy.NONE: adapter_pb2.SIGNATURE_POLICY_NONE,
    SignaturePolicy.REQUIRED: adapter_pb2.SIGNATURE_POLICY_REQUIRED,
}
_POLICIES: dict[int, SignaturePolicy] = {number: policy for policy, number in _MESSAGES.items()}


def policy_message(policy: SignaturePolicy) -> adapter_pb2.SignaturePolicy.ValueType:
    return _MESSAGES[policy]


def policy_of(number: int) -> SignaturePolicy:
    """The policy behind a number; one that only a newer store knows is taken for the strictest."""
    return _POLICIES.get(number, SignaturePolicy.REQUIRED)
