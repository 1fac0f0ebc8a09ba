"""An upload's files of tensors, opened: their headers, and values where a plan depends on them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from adaptermesh.artifact.canonical import tensor_from_file
from adaptermesh.artifact.manifest_parts import TensorEntry
from adaptermesh.artifact.plan import Floats
from adaptermesh.artifact.problems import Problems, Rejection, shown
from adaptermesh.artifact.safetensors_file import Header, read_header
from adaptermesh.artifact.source_files import Layout
from adaptermesh.artifact.tensor_scan import scan_tensor


@dataclass(frozen=True, slots=True)
class Uploaded:
    """The files of an upload and the header of each file of tensors, by name.

    `all_zero` names the tensors of the adapter's own file that hold only zeros.
    """

    files: Mapping[str, Path]
    layout: Layout
    headers: Mapping[str, Header]
    all_zero: frozenset[str]

    @property
    def weights(self) -> Header:
        """The header of the adapter's own tensors."""
        return self.headers[self.layout.weights]

    def values(self, entry: TensorEntry) -> Floats:
        """One of the adapter's own tensors as float32."""
        with self.files[self.layout.weights].open("rb") as file:
            return tensor_from_file(entry, file)


def read_tensor_files(files: Mapping[str, Path], layout: Layout, problems: Problems) -> Uploaded:
    """Reads every header and looks at every value; what is wrong is noted.

    Of use only if no problem was noted.
    """
    headers: dict[str, Header] = {}
    all_zero: set[str] = set()
    for path in sorted(files):
        if not layout.has_tensors(path):
            continue
        header = _read_header(path, files[path], problems)
        if header is None:
            continue
        headers[path] = header
        zero = _scan(files[path], header, problems)
        if path == layout.weights:
            all_zero |= zero
    return Uploaded(files, layout, headers, frozenset(all_zero))


def _read_header(path: str, place: Path, problems: Problems) -> Header | None:
    try:
        header = read_header(place)
    except Rejection as error:
        problems.extend(f"{path}: {reason}" for reason in error.reasons)
        return None
    if not header.tensors:
        problems.add(f"{path} holds no tensors")
    return header


def _scan(place: Path, header: Header, problems: Problems) -> set[str]:
    """Notes every tensor with a value that is not finite; returns the names of those that are all zero."""
    all_zero: set[str] = set()
    with place.open("rb") as file:
        for entry in header.tensors.values():
            scan = scan_tensor(file, entry)
            if scan.not_finite_at is not None:
                problems.add(
                    f"tensor {shown(entry.name)} has NaN or infinity at flat index {scan.not_finite_at}, "
                    "expected finite values: the training may have diverged"
                )
            if scan.all_zero:
                all_zero.add(entry.name)
    return all_zero
