"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
GatewayOption = Annotated[
    str,
    typer.Option(
        "--gateway", metavar="HOST:PORT", help="The gateway. Default: ADAPTERMESH_GATEWAY or 127.0.0.1:7700."
    ),
]
RouterOption = Annotated[
    str,
    typer.Option(
        "--router", metavar="HOST:PORT", help="The router. Default: ADAPTERMESH_ROUTER or 127.0.0.1:7701."
    ),
]
StoreOption = Annotated[
    str,
    typer.Option(
        "--store",
        metavar="HOST:PORT",
        help="The adapter store. Default: ADAPTERMESH_STORE or 127.0.0.1:7702.",
    ),
]
HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home",
        metavar="DIR",
        file_okay=False,
        help="Where everything is kept. Default: ADAPTERMESH_HOME or ~/.adaptermesh.",
    ),
]
ActorOption = Annotated[str, typer.Option(help="Who does it, for the history.")]
TagsOption = Annotated[
    list[str] | None, typer.Option("--tag", help="A label; give it several times for more.")
]
