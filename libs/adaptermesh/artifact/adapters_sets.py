"""Several adapters in one upload of the `adapters` library: AdapterFusion and set-ups. None is served yet."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from adaptermesh.artifact.adapters_config import is_written_by_adapters, read_version
from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.config_file import read_config_file
from adaptermesh.artifact.plan import Plan
from adaptermesh.artifact.problems import Problems
from adaptermesh.artifact.sites import SiteMap
from adaptermesh.artifact.source_files import CONFIG_FILE, FUSION, SETUP
from adaptermesh.artifact.uploaded import Uploaded

MAX_MEMBERS = 16


@dataclass(frozen=True, slots=True)
class AdaptersSet:
    """A fusion or a set-up: stored with the reason why it is not served."""

    raw: Mapping[str, Any]
    kind: str
    version: str
    unservable: str
    head: None = None

    @property
    def named_base(self) -> object:
        """What the config says of the base: a path or a name."""
        return self.raw.get("model_name")

    def plan(self, upload: Uploaded, sites: SiteMap, base: BaseFacts, problems: Problems) -> Plan:  # noqa: ARG002
        """Nothing: no base changes that it is not served."""
        return Plan(unservable=self.unservable)


def read_fusion(raw: Mapping[str, Any], problems: Problems) -> AdaptersSet | None:
    """Reads `adapter_fusion_config.json`; None if there are problems that leave nothing to go on with."""
    version = read_version(raw, FUSION.config, problems)
    names = raw.get("adapter_names", str(raw.get("name")).split(","))
    if not isinstance(names, list) or not _are_names(names):
        problems.add(f"{FUSION.config}: it names no adapters")
        return None
    reason = (
        f"not served yet: AdapterFusion over the adapters {', '.join(names)}; upload the adapters one by one"
    )
    return AdaptersSet(raw, "fusion", version, reason) if version else None


def read_setup(raw: Mapping[str, Any], upload: Uploaded, problems: Problems) -> AdaptersSet | None:
    """Reads `adapter_setup.json` and the config of each member's folder; None as above."""
    version = read_version(raw, SETUP.config, problems)
    tree = raw.get("adapter_setup")
    kind = tree.get("type") if isinstance(tree, dict) else None
    if not isinstance(kind, str) or not _are_names([kind]):
        problems.add(f"{SETUP.config}: adapter_setup has no type")
        return None
    members = sorted(path for path in upload.files if PurePosixPath(path).name == CONFIG_FILE)
    if not members:
        problems.add(f"{SETUP.config} is there, but no folder of an adapter: upload the whole folder")
    for path in members:
        config = read_config_file(path, upload.files[path], problems)
        if config is not None and not is_written_by_adapters(config):
            problems.add(f"{path} was not written by the 'adapters' library")
    reason = f"not served yet: a set-up ({kind}) of several adapters; upload the adapters one by one"
    return AdaptersSet(raw, "setup", version, reason) if version else None


def _are_names(names: list[Any]) -> bool:
    return 0 < len(names) <= MAX_MEMBERS and all(
        isinstance(name, str) and 0 < len(name) <= 64 and name.isprintable() for name in names
    )
