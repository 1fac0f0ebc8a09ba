"""`adapters copy`, `export` and `import` against real stores."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from adaptermesh.api.store.v1 import store_pb2
from tests.unit.cli.conftest import Invoke, Publish, document
from tests.unit.store.conftest import BASE_NAME, base_model, make_files, running_store, store_config


@pytest.fixture
def other(tmp_path: Path) -> Iterator[str]:
    """The address of another store, on another thread's event loop."""
    ready, stopping = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()
    found: list[str] = []

    async def run() -> None:
        async with running_store(store_config(tmp_path / "other")) as store:
            await store.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=base_model()))
            found.append(store.target)
            ready.set()
            await stopping.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    assert ready.wait(30)
    yield found[0]
    loop.call_soon_threadsafe(stopping.set)
    thread.join(30)
    loop.close()


def test_a_version_is_copied_to_another_store_and_back_under_another_name(
    publish: Publish, invoke: Invoke, other: str
) -> None:
    ref = publish()
    done = invoke("adapters", "copy", ref, f"store://{other}", "--alias", "prod")
    assert "acme/ner:v1 published, from acme/ner:v1" in done.stdout
    assert "acme/ner@prod -> v1" in done.stdout
    assert "was there already" in invoke("adapters", "copy", ref, f"store://{other}/acme/ner").stdout
    back = document(invoke("adapters", "copy", f"store://{other}/acme/ner@prod", "shop/names", "--json"))
    assert back["copy"]["version"]["ref"] == "shop/names:v1"
    assert back["copy"]["source"] == "acme/ner:v1"
    assert back["copy"]["version"]["digest"] != back["copy"]["source_digest"]
    pulled = invoke("adapters", "import", f"store://{other}/acme/ner:v1", "shop/more", "--json")
    assert document(pulled)["copy"]["version"]["ref"] == "shop/more:v1"


def test_a_version_travels_in_a_file(publish: Publish, invoke: Invoke, other: str, tmp_path: Path) -> None:
    ref, file = publish(), tmp_path / "ner.tar"
    done = document(invoke("adapters", "export", ref, str(file), "--json"))
    assert (done["path"], done["size_bytes"]) == (str(file), file.stat().st_size)
    again = invoke("adapters", "export", ref, str(file))
    assert (again.exit_code, "exists: choose another name" in again.stderr) == (1, True)
    there = ("--store", other)
    checked = invoke("adapters", "import", str(file), "--check", *there)
    assert "every check passed, nothing was published" in " ".join(checked.stdout.split())
    assert "no adapters" in invoke("adapters", "ls", *there).stdout
    assert "acme/ner:v1 published" in invoke("adapters", "import", str(file), *there).stdout
    renamed = document(invoke("adapters", "import", str(file), "a/b", "--alias", "prod", "--json", *there))
    assert (renamed["result"]["version"]["ref"], renamed["alias"]["ref"]) == ("a/b:v1", "a/b@prod")
    file.write_bytes(file.read_bytes()[:3000])
    damaged = invoke("adapters", "import", str(file), *there)
    assert (damaged.exit_code, "no tar of an exported version" in damaged.stderr) == (1, True)


def test_a_folder_is_imported_as_it_is_uploaded(invoke: Invoke, real_store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for path, data in make_files().items():
        (folder / path).write_bytes(data)
    unsaid = invoke("adapters", "import", str(folder))
    assert (unsaid.exit_code, "does not say what it is" in unsaid.stderr) == (1, True)
    done = invoke("adapters", "import", str(folder), "acme/ner", "--base", BASE_NAME, "--alias", "prod")
    assert "acme/ner:v1 published" in done.stdout
    assert "acme/ner@prod -> v1" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("import", "nowhere"), "is no file or folder here"),
        (("import", "store://nowhere/acme/ner:v1"), "is no store"),
        (("copy", "acme/ner:v1", "store://x"), "is no store"),
        (("import", "store://127.0.0.1:9/acme/ner:v1", "--check"), "--check publishes nothing"),
    ],
)
def test_what_can_not_be_meant_is_a_usage_error(
    invoke: Invoke, arguments: tuple[str, ...], words: str
) -> None:
    result = invoke("adapters", *arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.replace("│", " ").split())


def test_what_would_be_left_out_in_silence_is_refused(
    publish: Publish, invoke: Invoke, tmp_path: Path
) -> None:
    ref, file = publish(), tmp_path / "ner.tar"
    invoke("adapters", "export", ref, str(file))
    for options in (("--base", "x"), ("--tag", "x"), ("--with-parents",)):
        refused = invoke("adapters", "import", str(file), *options)
        assert (refused.exit_code, "is not imported with" in refused.stderr) == (1, True)
    refused = invoke("adapters", "import", "store://127.0.0.1:9/acme/ner:v1", "--license", "mit")
    assert "is not imported with" in refused.stderr


def test_a_store_that_does_not_answer_is_named(publish: Publish, invoke: Invoke) -> None:
    refused = invoke("adapters", "copy", publish(), "store://127.0.0.1:9")
    assert (refused.exit_code, "nothing answers at 127.0.0.1:9" in refused.stderr) == (1, True)
