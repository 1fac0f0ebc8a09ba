"""The calls about signatures, and about the keys that a namespace trusts."""

import asyncio
import dataclasses
from pathlib import Path

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.client import wire
from adaptermesh.client.integrity_records import NamespacePolicy, PolicyChange, Signature, Signed
from adaptermesh.client.store_connection import StoreConnection
from adaptermesh.core.signature_policy import SignaturePolicy
from adaptermesh.rpc.signature_policy import policy_message


class SignatureCalls(StoreConnection):
    """The part of the store's client that is about signatures."""

    async def sign(self, ref: str, key_file: Path | str, *, actor: str = "") -> Signed:
        """Signs the version that a ref means now with the private key of a PEM file; needs `cryptography`.

        The key stays here: the store gets the signature, and verifies it with the public key that the
        version's namespace trusts.
        """
        # Only here: the client itself does without.
        from adaptermesh.client.private_key import PrivateKey

        key = await asyncio.to_thread(PrivateKey.load, Path(key_file))
        version = (await self.resolve(ref, include_unusable=True)).version
        return await self.add_signature(version.digest, key.key_id, key.sign(version.digest), actor=actor)

    async def add_signature(self, digest: str, key_id: str, signature: bytes, *, actor: str = "") -> Signed:
        """Adds a signature of a version that somebody made before, by a key that its namespace trusts."""
        request = store_pb2.AddSignatureRequest(
            digest=digest, key_id=key_id, signature=signature, actor=actor
        )
        response = await self._call(self._stub.AddSignature, request)
        return Signed(wire.version_of(response.version), key_id, response.created, response.feed_position)

    async def list_signatures(self, digest: str) -> list[Signature]:
        """The signatures of a version, and of each whether its key is trusted now."""
        response = await self._call(self._stub.ListSignatures, store_pb2.ListSignaturesRequest(digest=digest))
        return [wire.signature_of(signature) for signature in response.signatures]

    async def namespace_policy(self, namespace: str) -> NamespacePolicy:
        """What must hold in a namespace, and the keys that it and its tenant trust; or `tenant:<name>`."""
        request = store_pb2.GetNamespacePolicyRequest(namespace=namespace)
        response = await self._call(self._stub.GetNamespacePolicy, request)
        shared = wire.policy_record_of(response.tenant_policy)
        return dataclasses.replace(wire.policy_record_of(response.policy), tenant_keys=shared.keys)

    async def set_namespace_policy(
        self,
        namespace: str,
        signatures: SignaturePolicy,
        *,
        expected_generation: int | None = None,
        actor: str = "",
    ) -> PolicyChange:
        """Says whether the versions of a namespace must be signed to be used."""
        request = store_pb2.SetNamespacePolicyRequest(
            namespace=namespace,
            signatures=policy_message(signatures),
            expected_generation=expected_generation,
            actor=actor,
        )
        response = await self._call(self._stub.SetNamespacePolicy, request)
        return PolicyChange(wire.policy_record_of(response.policy), response.feed_position)

    async def add_signing_key(
        self, namespace: str, public_key: bytes, *, comment: str = "", actor: str = ""
    ) -> PolicyChange:
        """Makes a namespace, or `tenant:<name>`, trust a raw Ed25519 public key."""
        request = store_pb2.AddSigningKeyRequest(
            namespace=namespace, public_key=public_key, comment=comment, actor=actor
        )
        response = await self._call(self._stub.AddSigningKey, request)
        return PolicyChange(wire.policy_record_of(response.policy), response.feed_position)

    async def delete_signing_key(self, namespace: str, key_id: str, *, actor: str = "") -> PolicyChange:
        """Ends a namespace's trust in a key; what it signed no longer counts as signed by it."""
        request = store_pb2.DeleteSigningKeyRequest(namespace=namespace, key_id=key_id, actor=actor)
        response = await self._call(self._stub.DeleteSigningKey, request)
        return PolicyChange(wire.policy_record_of(response.policy), response.feed_position)
