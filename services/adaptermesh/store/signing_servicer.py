"""The part of the store's gRPC face that is about signatures and the policies of namespaces."""
# Names and signatures are those of the generated base class.
# ruff: noqa: ARG002, N802

from typing import Any

from adaptermesh.api.store.v1 import store_pb2, store_pb2_grpc
from adaptermesh.artifact.signing import key_id_of
from adaptermesh.core.errors import invalid_field
from adaptermesh.rpc.signature_policy import policy_message, policy_of
from adaptermesh.store import wire
from adaptermesh.store.access.caller import current_caller
from adaptermesh.store.with_stores import WithStores

Context = Any


class SigningServicer(WithStores, store_pb2_grpc.StoreServiceServicer):
    """Signatures, trusted keys and policies. Errors are raised as `MeshError`."""

    async def AddSignature(
        self, request: store_pb2.AddSignatureRequest, context: Context
    ) -> store_pb2.AddSignatureResponse:
        signed = await self._stores.signatures.add(
            request.digest, request.key_id, request.signature, request.actor
        )
        return store_pb2.AddSignatureResponse(
            version=wire.version_to(signed.version),
            created=signed.created,
            feed_position=signed.feed_position,
        )

    async def ListSignatures(
        self, request: store_pb2.ListSignaturesRequest, context: Context
    ) -> store_pb2.ListSignaturesResponse:
        found = await self._stores.signatures.list(request.digest)
        return store_pb2.ListSignaturesResponse(
            signatures=[wire.signature_to(signature, trusted=trusted) for signature, trusted in found]
        )

    async def GetNamespacePolicy(
        self, request: store_pb2.GetNamespacePolicyRequest, context: Context
    ) -> store_pb2.GetNamespacePolicyResponse:
        policy, shared = await self._stores.policies.get(request.namespace)
        caller = current_caller.get()
        if shared is not None and not caller.sees_everything and shared.tenant != caller.tenant:
            # Of another tenant one hears what it says of the namespace, not what it says of itself.
            shared = None
        return store_pb2.GetNamespacePolicyResponse(
            policy=wire.policy_to(policy), tenant_policy=None if shared is None else wire.policy_to(shared)
        )

    async def SetNamespacePolicy(
        self, request: store_pb2.SetNamespacePolicyRequest, context: Context
    ) -> store_pb2.SetNamespacePolicyResponse:
        signatures = policy_of(request.signatures)
        if policy_message(signatures) != request.signatures:
            raise invalid_field("signatures", "must be none or required")
        expected = request.expected_generation if request.HasField("expected_generation") else None
        policy, position = await self._stores.policies.set(
            request.namespace, signatures, expected, request.actor
        )
        return store_pb2.SetNamespacePolicyResponse(policy=wire.policy_to(policy), feed_position=position)

    async def AddSigningKey(
        self, request: store_pb2.AddSigningKeyRequest, context: Context
    ) -> store_pb2.AddSigningKeyResponse:
        policy, position = await self._stores.policies.trust(
            request.namespace, request.public_key, request.comment, request.actor
        )
        return store_pb2.AddSigningKeyResponse(
            policy=wire.policy_to(policy), key_id=key_id_of(request.public_key), feed_position=position
        )

    async def DeleteSigningKey(
        self, request: store_pb2.DeleteSigningKeyRequest, context: Context
    ) -> store_pb2.DeleteSigningKeyResponse:
        policy, position = await self._stores.policies.distrust(
            request.namespace, request.key_id, request.actor
        )
        return store_pb2.DeleteSigningKeyResponse(policy=wire.policy_to(policy), feed_position=position)
