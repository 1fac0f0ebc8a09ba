"""A version's state on the wire: the same for store, router and client."""

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.core.version_state import VersionState

_MESSAGES = {
    VersionState.ACTIVE: adapter_pb2.VERSION_STATE_ACTIVE,
    VersionState.DEPRECATED: adapter_pb2.VERSION_STATE_DEPRECATED,
    VersionState.REVOKED: adapter_pb2.VERSION_STATE_REVOKED,
}
_STATES: dict[int, VersionState] = {number: state for state, number in _MESSAGES.items()}
# From a store that knows no states.
_STATES[adapter_pb2.VERSION_STATE_UNSPECIFIED] = VersionState.ACTIVE


def state_message(state: VersionState) -> adapter_pb2.VersionState.ValueType:
    return _MESSAGES[state]


def state_of(number: int) -> VersionState:
    """The state behind a number; one that only a newer store knows is taken for the strictest."""
    return _STATES.get(number, VersionState.REVOKED)
