"""An upload's header and what it may say."""

from collections import Counter
from dataclasses import dataclass

from adaptermesh.artifact.merging_recipe import MergeRecipe, check_lineage
from adaptermesh.core.digests import is_digest
from adaptermesh.core.errors import Code, MeshError, Reason, invalid_field
from adaptermesh.core.refs import AdapterName, check_name
from adaptermesh.store.fields import check_line, check_text
from adaptermesh.store.records import SourceFile

MAX_DESCRIPTION_BYTES = 4096
MAX_TAGS = 32
MAX_TAG = 64
MAX_LINE = 256
MAX_PATH = 255


@dataclass(frozen=True, slots=True)
class UploadHeader:
    """What is uploaded."""

    adapter: AdapterName
    base_model: str
    """Digest or name."""
    task: str
    description: str
    tags: tuple[str, ...]
    license: str
    author: str
    files: tuple[SourceFile, ...]
    validate_only: bool
    parents: tuple[str, ...] = ()
    """Digests of the versions it was made from."""
    merge_recipe_json: str = ""
    expected_digest: str = ""
    """The one that the version must get; "" for whatever it gets."""

    @property
    def merge_recipe(self) -> MergeRecipe | None:
        """How it was merged, if it was; raises MeshError INVALID_ARGUMENT."""
        return MergeRecipe.from_json(self.merge_recipe_json) if self.merge_recipe_json else None

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def check_header(header: UploadHeader, max_files: int, max_bytes: int) -> None:
    """Raises MeshError INVALID_ARGUMENT if the header can't be that of a legal upload."""
    check_name(header.adapter.namespace, "namespace")
    check_name(header.adapter.name, "name")
    check_line("base_model", header.base_model, MAX_LINE, required=True)
    if header.task:
        check_name(header.task, "task")
    check_text("description", header.description, MAX_DESCRIPTION_BYTES)
    if len(header.description.encode()) > MAX_DESCRIPTION_BYTES:
        raise invalid_field("description", f"has more than {MAX_DESCRIPTION_BYTES} bytes")
    check_line("license", header.license, MAX_LINE)
    check_line("author", header.author, MAX_LINE)
    if len(header.tags) > MAX_TAGS:
        raise invalid_field("tags", f"are {len(header.tags)}, at most {MAX_TAGS} are allowed")
    for tag in header.tags:
        check_line("tags", tag, MAX_TAG, required=True)
    check_lineage(header.parents, header.merge_recipe)
    if header.expected_digest and not is_digest(header.expected_digest):
        raise invalid_field("expected_digest", "must be sha256:<64 lower-case hex digits>")
    _check_files(header.files, max_files, max_bytes)


def invalid_upload(message: str, **metadata: str) -> MeshError:
    """INVALID_ARGUMENT (INVALID_UPLOAD)."""
    return MeshError(Code.INVALID_ARGUMENT, Reason.INVALID_UPLOAD, message, metadata=metadata)


def _check_files(files: tuple[SourceFile, ...], max_files: int, max_bytes: int) -> None:
    if not 1 <= len(files) <= max_files:
        raise invalid_upload(f"an upload has 1 to {max_files} files, this one has {len(files)}")
    for file in files:
        _check_path(file.path)
        if file.size_bytes < 0:
            raise invalid_upload(f"file '{file.path}' has a negative size", file=file.path)
        if not is_digest(file.digest):
            raise invalid_upload(f"file '{file.path}' has no sha256 digest", file=file.path)
    path, count = Counter(file.path for file in files).most_common(1)[0]
    if count > 1:
        raise invalid_upload(f"file '{path}' is there {count} times", file=path)
    total = sum(file.size_bytes for file in files)
    if total > max_bytes:
        raise invalid_upload(
            f"the files have {total} bytes, at most {max_bytes} are allowed",
            size_bytes=str(total),
            limit_bytes=str(max_bytes),
        )


def _check_path(path: str) -> None:
    legal = (
        0 < len(path) <= MAX_PATH
        and path.isprintable()
        and "\\" not in path
        and all(part not in ("", ".", "..") for part in path.split("/"))
    )
    if not legal:
        raise invalid_upload(
            f"{path[:80]!r} is not a relative path with forward slashes, at most {MAX_PATH} characters",
            file=path[:MAX_PATH],
        )
