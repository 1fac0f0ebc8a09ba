"""Base models of the Hugging Face hub: safetensors and tokenizer files only."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.worker.models.folder import TEXT_FILES, fill_from_folder

_ETAG_SECONDS = 20.0


def fill_from_hub(
    repository: str, folder: Path, note: Callable[[str], None], revision: str | None = None
) -> None:
    """Fetches `ORG/NAME` into the folder.

    Raises:
        MeshError: NOT_FOUND (BASE_NOT_FOUND): no such model, or not for us. UNAVAILABLE: no answer.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    note(f"fetching {repository} from the Hugging Face hub")
    work = Path(tempfile.mkdtemp(prefix=".download-", dir=folder.parent))
    try:
        snapshot_download(
            repository,
            revision=revision,
            local_dir=work,
            allow_patterns=[*TEXT_FILES, "model.safetensors", "model-*-of-*.safetensors"],
            etag_timeout=_ETAG_SECONDS,
        )
        fill_from_folder(work, folder)
    except RepositoryNotFoundError as error:  # gated ones too
        raise MeshError(
            Code.NOT_FOUND,
            Reason.BASE_NOT_FOUND,
            f"the hub has no model '{repository}' for us: misspelt, private or gated (see `hf auth login`)",
            metadata={"name": repository},
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise MeshError(
            Code.UNAVAILABLE,
            Reason.BASE_NOT_FOUND,
            f"'{repository}' could not be fetched from the Hugging Face hub: {_first_line(error)}. Where "
            "it can't be reached, give a local folder or a model that `adaptermesh models pull --help` names",
            metadata={"name": repository},
            retry_after=30.0,
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
