"""The `adaptermesh` command: which commands there are."""

import typer

from adaptermesh.cli.commands import (
    adapters,
    aliases,
    grants,
    keys,
    models,
    routes,
    signing_keys,
    tenants,
    traces,
)
from adaptermesh.cli.commands.aliases import roll_back
from adaptermesh.cli.commands.audit import audit
from adaptermesh.cli.commands.demo import demo
from adaptermesh.cli.commands.generate import generate
from adaptermesh.cli.commands.keys import whoami
from adaptermesh.cli.commands.status import status
from adaptermesh.cli.commands.up import up


def build_app() -> typer.Typer:
    """The whole command line."""
    app = typer.Typer(
        name="adaptermesh",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        help="One frozen base model, thousands of small adapters, the right one per request.",
        epilog="Start with `adaptermesh up`. Every command takes --json and --help.",
    )
    app.command()(up)
    app.command()(status)
    app.command()(demo)
    app.command()(generate)
    app.command("rollback")(roll_back)
    app.add_typer(models.app, name="models")
    app.add_typer(adapters.app, name="adapters")
    app.add_typer(aliases.app, name="alias")
    app.add_typer(routes.app, name="routes")
    app.add_typer(signing_keys.app, name="signing-keys")
    app.add_typer(keys.app, name="keys")
    app.command()(whoami)
    app.add_typer(tenants.app, name="tenants")
    app.add_typer(tenants.namespaces_app, name="namespaces")
    app.add_typer(grants.app, name="grants")
    app.command()(audit)
    app.add_typer(traces.app, name="trace")
    return app
