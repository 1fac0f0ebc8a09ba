"""The calls about aliases: point, roll back, protect, remove, look at the history."""

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.client import wire
from adaptermesh.client.calls import PAGE_SIZE, all_pages
from adaptermesh.client.records import Alias, AliasMove
from adaptermesh.client.store_connection import StoreConnection, invalid_ref
from adaptermesh.core.refs import Ref, parse_ref


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
        ref, name = _alias(alias)
        response = await self._call(
            self._stub.SetAlias,
            store_pb2.SetAliasRequest(
                namespace=ref.adapter.namespace,
                name=ref.adapter.name,
                alias=name,
                version_number=await self._version_number(ref.adapter, version),
                expected_generation=expected_generation,
                actor=actor,
                comment=comment,
                acknowledge_protection=acknowledge_protection,
            ),
        )
        return AliasMove(wire.alias_of(response.alias), response.feed_position)

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
        ref, name = _alias(alias)
        response = await self._call(
            self._stub.RollBackAlias,
            store_pb2.RollBackAliasRequest(
                namespace=ref.adapter.namespace,
                name=ref.adapter.name,
                alias=name,
                expected_generation=expected_generation,
                actor=actor,
                comment=comment,
                acknowledge_protection=acknowledge_protection,
            ),
        )
        return AliasMove(wire.alias_of(response.alias), response.feed_position)

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
        ref, name = _alias(alias)
        response = await self._call(
            self._stub.SetAliasProtection,
            store_pb2.SetAliasProtectionRequest(
                namespace=ref.adapter.namespace,
                name=ref.adapter.name,
                alias=name,
                protected=protected,
                expected_generation=expected_generation,
                actor=actor,
                comment=comment,
            ),
        )
        return AliasMove(wire.alias_of(response.alias), response.feed_position)

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
        ref, name = _alias(alias)
        response = await self._call(
            self._stub.DeleteAlias,
            store_pb2.DeleteAliasRequest(
                namespace=ref.adapter.namespace,
                name=ref.adapter.name,
                alias=name,
                expected_generation=expected_generation,
                actor=actor,
                comment=comment,
                acknowledge_protection=acknowledge_protection,
            ),
        )
        return AliasMove(wire.alias_of(response.alias), response.feed_position)

    async def alias_history(self, alias: str) -> list[Alias]:
        """Every change of `namespace/name@alias`, newest first."""
        ref, name = _alias(alias)

        async def page(token: str) -> tuple[list[Alias], str]:
            request = store_pb2.ListAliasHistoryRequest(
                namespace=ref.adapter.namespace,
                name=ref.adapter.name,
                alias=name,
                page_size=PAGE_SIZE,
                page_token=token,
            )
            response = await self._call(self._stub.ListAliasHistory, request)
            return [wire.alias_of(move) for move in response.moves], response.next_page_token

        return await all_pages(page)


def _alias(text: str) -> tuple[Ref, str]:
    """A ref that spells an alias, and the alias."""
    ref = parse_ref(text)
    if ref.alias is None or "@" not in text:
        raise invalid_ref(f"'{text}' names no alias: use namespace/name@alias", text)
    return ref, ref.alias
