"""`adaptermesh signing-keys`: make keys, and say which ones a namespace trusts; and `adapters sign`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from adaptermesh.cli.connections import store_client
from adaptermesh.cli.execute import execute
from adaptermesh.cli.options import ActorOption, JsonOption, StoreOption
from adaptermesh.cli.output import Output
from adaptermesh.cli.tables import moment, table
from adaptermesh.client import SignaturePolicy

app = typer.Typer(no_args_is_help=True, help="Keys that sign versions, and which ones a namespace trusts.")

NamespaceArgument = Annotated[str, typer.Argument(metavar="NAMESPACE", help="E.g. acme.")]
ScopeArgument = Annotated[
    str,
    typer.Argument(metavar="NAMESPACE", help="E.g. acme; or tenant:acme-corp for all its namespaces."),
]


@app.command()
def create(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where the private key goes.", dir_okay=False)],
    as_json: JsonOption = False,
) -> None:
    """Makes an Ed25519 key: FILE for its owner only, FILE.pub for everybody else.

    The private key is not encrypted: keep it where secrets are kept.

    Example: adaptermesh signing-keys create ./release.pem
    """

    async def work(output: Output) -> None:
        from adaptermesh.client.private_key import PrivateKey

        key = PrivateKey.generate()
        public = file.with_name(file.name + ".pub")
        key.save(file, public)
        made = {"key_id": key.key_id, "private_key_file": file, "public_key_file": public}
        output.result(made, Text(f"{key.key_id}: private key in {file}, public key in {public}"))

    execute(as_json, work)


@app.command()
def add(
    namespace: ScopeArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The public key, PEM.", dir_okay=False)],
    comment: Annotated[str, typer.Option("--comment", "-m", help="Whose it is.")] = "",
    actor: ActorOption = "",
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Makes a namespace trust a key.

    Example: adaptermesh signing-keys add acme ./release.pem.pub --comment "release team"
    """

    async def work(output: Output) -> None:
        from adaptermesh.artifact.signing import key_id_of
        from adaptermesh.client.private_key import load_public_key

        public_key = load_public_key(file)
        async with store_client(output, store) as client:
            change = await client.add_signing_key(namespace, public_key, comment=comment, actor=actor)
        output.result(change, Text(f"{namespace} trusts {key_id_of(public_key)}"))

    execute(as_json, work)


@app.command("ls")
def list_keys(namespace: ScopeArgument, store: StoreOption = "", as_json: JsonOption = False) -> None:
    """Lists the keys that a namespace trusts, and whether its versions must be signed.

    Example: adaptermesh signing-keys ls acme
    """

    async def work(output: Output) -> None:
        async with store_client(output, store) as client:
            policy = await client.namespace_policy(namespace)
        rows = table("key", "whose", "added", "by", "trusted in")
        for keys, where in ((policy.keys, namespace), (policy.tenant_keys, "all of the tenant")):
            for key in keys:
                rows.add_row(key.key_id, key.comment, moment(key.create_time), key.actor, where)
        known = bool(policy.keys or policy.tenant_keys)
        asked = Text(f"signatures: {policy.signatures}")
        output.result(policy, asked, rows if known else Text("no trusted keys"))

    execute(as_json, work)


@app.command("rm")
def remove(
    namespace: ScopeArgument,
    key_id: Annotated[str, typer.Argument(metavar="KEY_ID", help="As `signing-keys ls` shows it.")],
    actor: ActorOption = "",
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Ends a namespace's trust in a key: what it has signed no longer counts as signed by it.

    Example: adaptermesh signing-keys rm acme ed25519:0123456789abcdef
    """

    async def work(output: Output) -> None:
        async with store_client(output, store) as client:
            change = await client.delete_signing_key(namespace, key_id, actor=actor)
        output.result(change, Text(f"{namespace} no longer trusts {key_id}"))

    execute(as_json, work)


@app.command()
def policy(
    namespace: NamespaceArgument,
    signatures: Annotated[SignaturePolicy, typer.Argument(help="Whether versions must be signed.")],
    expect: Annotated[
        int | None,
        typer.Option("--expect", metavar="GENERATION", min=0, help="Set it only if it is at this one."),
    ] = None,
    actor: ActorOption = "",
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Says whether the versions of a namespace must be signed by a key that it trusts.

    With `required`, requests for unsigned versions are refused, and no alias or route can be pointed at one.

    Example: adaptermesh signing-keys policy acme required
    """

    async def work(output: Output) -> None:
        async with store_client(output, store) as client:
            change = await client.set_namespace_policy(
                namespace, signatures, expected_generation=expect, actor=actor
            )
        output.result(change, Text(f"signatures of {namespace}: {change.policy.signatures}"))

    execute(as_json, work)


def sign(
    ref: Annotated[str, typer.Argument(metavar="REF", help="E.g. acme/ner:v2 or acme/ner@prod.")],
    key: Annotated[Path, typer.Option("--key", metavar="FILE", help="The private key, PEM.", dir_okay=False)],
    actor: ActorOption = "",
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Signs a version's digest. The key never leaves this machine.

    Example: adaptermesh adapters sign acme/ner:v2 --key ./release.pem
    """

    async def work(output: Output) -> None:
        async with store_client(output, store) as client:
            signed = await client.sign(ref, key, actor=actor)
        before = "" if signed.created else " (it was before)"
        output.result(signed, Text(f"{signed.version.ref} is signed by {signed.key_id}{before}"))

    execute(as_json, work)
