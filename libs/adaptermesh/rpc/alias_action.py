"""What a change of an alias did, on the wire: the same for store and client."""

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.core.alias_action import AliasAction

_MESSAGES = {
    AliasAction.SET: adapter_pb2.ALIAS_ACTION_SET,
    AliasAction.PROTECTED: adapter_pb2.ALIAS_ACTION_PROTECTED,
    AliasAction.UNPROTECTED: adapter_pb2.ALIAS_ACTION_UNPROTECTED,
    AliasAction.DELETED: adapter_pb2.ALIAS_ACTION_DELETED,
}
_ACTIONS: dict[int, AliasAction] = {number: action for action, number in _MESSAGES.items()}


def action_message(action: AliasAction) -> adapter_pb2.AliasAction.ValueType:
    return _MESSAGES[action]


def action_of(number: int) -> AliasAction:
    """The action behind a number; a store that knew no actions knew only settings."""
    return _ACTIONS.get(number, AliasAction.SET)
