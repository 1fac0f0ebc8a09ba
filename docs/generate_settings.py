"""Writes docs/settings.md from the settings classes, when run as a script; a test compares the two."""

import sys
from pathlib import Path

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from adaptermesh.gateway.settings import GatewaySettings
from adaptermesh.router.settings import RouterSettings
from adaptermesh.rpc.settings import ServiceSettings
from adaptermesh.store.settings import StoreSettings
from adaptermesh.worker.settings import WorkerSettings

PAGE = Path(__file__).with_name("settings.md")
SERVICES: tuple[tuple[str, type[ServiceSettings]], ...] = (
    ("Gateway", GatewaySettings),
    ("Router", RouterSettings),
    ("Adapter store", StoreSettings),
    ("GPU worker", WorkerSettings),
)


def rows(settings: type[ServiceSettings], shared: bool) -> list[str]:
    """One table row for each setting; those that all services share, or the service's own."""
    prefix = settings.model_config.get("env_prefix", "")
    found = []
    for name, field in settings.model_fields.items():
        alias = field.validation_alias
        variable = alias if isinstance(alias, str) else f"{prefix}{name}".upper()
        is_shared = name in ServiceSettings.model_fields and name != "port"
        if is_shared == shared:
            found.append(f"| `{variable}` | {default_of(name, field)} | {field.description} |")
    return found


def default_of(name: str, field: FieldInfo) -> str:
    if name == "home":
        return "`~/.adaptermesh`"
    if field.default is None or field.default in ("", SecretStr(""), PydanticUndefined):
        return "unset"
    return f"`{field.default}`"


def page() -> str:
    """The whole page."""
    lines = [
        "# Settings",
        "",
        "Every service reads its settings from the environment. This page is made from the code by",
        "`python docs/generate_settings.py`.",
        "",
        "## All services",
        "",
        "| variable | default | meaning |",
        "|---|---|---|",
        *rows(ServiceSettings, shared=True),
    ]
    for title, settings in SERVICES:
        own = rows(settings, shared=False)
        lines += ["", f"## {title}", "", "| variable | default | meaning |", "|---|---|---|", *own]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
