"""The calls about aliases: point, roll back, protect, remove, look at the history."""

from collections.abc import Callable
from typing import Any

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.client import wire
from adaptermesh.client.calls import PAGE_SIZE, all_pages
from adaptermesh.client.records import Alias, AliasMove
from adaptermesh.client.store_connection import StoreConnection, invalid_ref
from adaptermesh.core.refs import AdapterName, parse_ref


class AliasCalls(StoreConnection):
    """The part of the store's client that is about aliases."""

    async def set_alias(
        self,
        alias: str,
        version: str | int,
        *,
        expected_generation: int | None = None,
        actor: str = "",
        comment: str = "",
        acknowledge_protection: bool = False,
    ) -> AliasMove:
        """Points `namespace/name@alias` at a version: a number, "v2", or a ref of the same adapter.

        With `expected_generation` (0: it must not exist yet) it moves only if nobody moved it meanwhile;
        otherwise ABORTED (ALIAS_CONFLICT). One that is protected moves only with `acknowledge_protection`.
        """
        return await self._change(
            self._stub.SetAlias,
            store_pb2.SetAliasRequest,
            alias,
            version_number=await self._version_number(_alias(alias)[0], version),
            expected_generation=expected_generation,
            actor=actor,
            comment=comment,
            acknowledge_protection=acknowledge_protection,
        )

    async def roll_back(
        self,
        alias: str,
        *,
        expected_generation: int | None = None,
        actor: str = "",
        comment: str = "",
        acknowledge_protection: bool = False,
    ) -> AliasMove:
        """Points `namespace/name@alias` at the version it pointed to before its last move."""
        return await self._change(
            self._stub.RollBackAlias,
            store_pb2.RollBackAliasRequest,
            alias,
            expected_generation=expected_generation,
            actor=actor,
            comment=comment,
            acknowledge_protection=acknowledge_protection,
        )

    async def protect_alias(
        self,
        alias: str,
        *,
        protected: bool = True,
        expected_generation: int | None = None,
        actor: str = "",
        comment: str = "",
    ) -> AliasMove:
        """Protects `namespace/name@alias`, or takes its protection away."""
        return await self._change(
            self._stub.SetAliasProtection,
            store_pb2.SetAliasProtectionRequest,
            alias,
            protected=protected,
            expected_generation=expected_generation,
            actor=actor,
            comment=comment,
        )

    async def delete_alias(
        self,
        alias: str,
        *,
        expected_generation: int | None = None,
        actor: str = "",
        comment: str = "",
        acknowledge_protection: bool = False,
    ) -> AliasMove:
        """Removes `namespace/name@alias`; its history stays. One that a route uses can't be removed."""
        return await self._change(
            self._stub.DeleteAlias,
            store_pb2.DeleteAliasRequest,
            alias,
            expected_generation=expected_generation,
            actor=actor,
            comment=comment,
            acknowledge_protection=acknowledge_protection,
        )

    async def alias_history(self, alias: str) -> list[Alias]:
        """Every change of `namespace/name@alias`, newest first."""
        adapter, name = _alias(alias)

        async def page(token: str) -> tuple[list[Alias], str]:
            request = store_pb2.ListAliasHistoryRequest(
                namespace=adapter.namespace,
                name=adapter.name,
                alias=name,
                page_size=PAGE_SIZE,
                page_token=token,
            )
            response = await self._call(self._stub.ListAliasHistory, request)
            return [wire.alias_of(move) for move in response.moves], response.next_page_token

        return await all_pages(page)

    async def _change(
        self, call: Callable[..., Any], request: Callable[..., Any], alias: str, **fields: Any
    ) -> AliasMove:
        """One call that changes an alias; `fields` are those of its request beside the alias' name."""
        adapter, name = _alias(alias)
        named = request(namespace=adapter.namespace, name=adapter.name, alias=name, **fields)
        response = await self._call(call, named)
        return AliasMove(wire.alias_of(response.alias), response.feed_position)


def _alias(text: str) -> tuple[AdapterName, str]:
    """The adapter and the alias that a ref names."""
    ref = parse_ref(text)
    if ref.alias is None or "@" not in text:
        raise invalid_ref(f"'{text}' names no alias: use namespace/name@alias", text)
    return ref.adapter, ref.alias
