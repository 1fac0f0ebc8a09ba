"""The formats that are read, by the library that wrote them. A new one is one reader and one branch here."""

from collections.abc import Mapping
from typing import Any, Protocol

from adaptermesh.artifact import adapters_config, adapters_fusion, adapters_sets, peft_config
from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.config_file import read_config_file
from adaptermesh.artifact.plan import Plan
from adaptermesh.artifact.problems import Problems
from adaptermesh.artifact.sites import SiteMap
from adaptermesh.artifact.source_files import ADAPTERS, FUSION, PEFT, SETUP
from adaptermesh.artifact.uploaded import Uploaded


class SourceConfig(Protocol):
    """An upload's config that was read: what is known of the adapter without its base.

    `unservable` says why it can't be served (yet), whatever the base; `version` is that of the library, empty
    if it did not say; `named_base` is what the config says of the base; `head` is the manifest's.
    """

    @property
    def raw(self) -> Mapping[str, Any]: ...
    @property
    def kind(self) -> str: ...
    @property
    def unservable(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def named_base(self) -> object: ...
    @property
    def head(self) -> Mapping[str, Any] | None: ...

    def plan(self, upload: Uploaded, sites: SiteMap, base: BaseFacts, problems: Problems) -> Plan:
        """What the adapter becomes on a base; of use only if no problem was noted."""
        ...


def read_source(upload: Uploaded, base: BaseFacts, problems: Problems) -> SourceConfig | None:
    """Reads the config of an upload; None if there are problems that leave nothing to go on with."""
    layout = upload.layout
    raw = read_config_file(layout.config, upload.files[layout.config], problems)
    if raw is None:
        return None
    if layout is SETUP:
        return adapters_sets.read_setup(raw, upload, base, problems)
    if layout is FUSION:
        return adapters_fusion.read_fusion(raw, upload, base, problems)
    if adapters_config.is_written_by_adapters(raw) != (layout is ADAPTERS):
        _note_mixture(layout.library, problems)
        return None
    if layout is PEFT:
        return peft_config.read_config(raw, problems)
    return adapters_config.read_config(raw, upload, base, problems)


def _note_mixture(library: str, problems: Problems) -> None:
    """A config of one library beside tensors of the other."""
    if library == "peft":
        problems.add(
            f"{PEFT.config} was written by the 'adapters' library, but its tensors are not in "
            f"{ADAPTERS.weights}: save it with {ADAPTERS.written_by}"
        )
    else:
        problems.add(
            f"{ADAPTERS.config} was not written by the 'adapters' library, which names its tensors "
            f"{ADAPTERS.weights}: load the adapter with version 1.0 or later of it and save it again"
        )
