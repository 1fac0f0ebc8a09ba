from pathlib import Path

import pytest

from adaptermesh.artifact.card_text import card_is_empty
from adaptermesh.artifact.problems import Problems, Rejection
from adaptermesh.artifact.source_files import (
    MAX_TEXT_BYTES,
    card_text,
    check_files,
    check_path,
    describe_files,
)
from adaptermesh.core.digests import digest_bytes


@pytest.mark.parametrize(
    "path", ["adapter_config.json", "docs/notes.md", "a b.txt", ".gitattributes", "é.md"]
)
def test_a_plain_relative_path_is_fine(path: str) -> None:
    assert check_path(path) is None


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "../x.json",
        "a/../b.md",
        "a//b.md",
        "./a.md",
        "a/",
        "a\\b.md",
        "C:a.md",
        "a\0.md",
        "a\n.md",
        "x" * 256,
    ],
)
def test_an_unsafe_path_is_refused(path: str) -> None:
    assert check_path(path) is not None


def reasons(tmp_path: Path, **extra: bytes) -> str:
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x", **extra}
    placed = {}
    for number, (name, data) in enumerate(files.items()):
        placed[name] = tmp_path / str(number)
        placed[name].write_bytes(data)
    problems = Problems()
    check_files(placed, problems)
    try:
        problems.raise_if_any()
    except Rejection as error:
        return error.message
    return ""


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "LICENSE",
        "tokenizer.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "docs/a.txt",
    ],
)
def test_texts_about_the_adapter_are_kept(tmp_path: Path, name: str) -> None:
    assert reasons(tmp_path, **{name: "text é".encode()}) == ""


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "training_args.bin", "optimizer.pt", "a.pkl", "x/Y.BIN"]
)
def test_a_pickle_is_refused_with_advice(tmp_path: Path, name: str) -> None:
    message = reasons(tmp_path, **{name: b"x"})
    assert name in message
    assert "safe_serialization" in message


@pytest.mark.parametrize("data", [b"\x80\x04abc", b"PK\x03\x04abc"])
def test_a_pickle_under_the_name_of_a_text_is_refused(tmp_path: Path, data: bytes) -> None:
    assert "is a pickle or an archive" in reasons(tmp_path, **{"notes.md": data})


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("model-00001-of-00002.safetensors", b"", "without shards"),
        ("run.sh", b"", "neither part of an adapter"),
        ("README.md", b"\xff\xfe", "not UTF-8"),
        ("README.md", b"x" * (MAX_TEXT_BYTES + 1), "a text of its kind may have"),
        ("ADAPTER_CONFIG.json", b"", "differ only in case"),
        ("../README.md", b"", "without '..'"),
    ],
)
def test_what_is_no_part_of_an_adapter_is_refused(tmp_path: Path, name: str, data: bytes, why: str) -> None:
    assert why in reasons(tmp_path, **{name: data})


def test_too_many_files_are_refused(tmp_path: Path) -> None:
    assert "66 files" in reasons(tmp_path, **{f"{i}.md": b"" for i in range(64)})


def test_files_are_described_by_path_size_and_digest(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"bb")
    (tmp_path / "a").write_bytes(b"")
    found = describe_files({"b": tmp_path / "b", "a": tmp_path / "a"})
    assert [(file.path, file.size_bytes, file.sha256) for file in found] == [
        ("a", 0, digest_bytes(b"")),
        ("b", 2, digest_bytes(b"bb")),
    ]


@pytest.mark.parametrize(
    ("text", "empty"),
    [
        (None, True),
        ("", True),
        (" \n", True),
        ("---\na: b\n---\n", True),
        ("---\na: b\n---\nHi", False),
        ("Hi", False),
    ],
)
def test_a_card_without_words_is_empty(tmp_path: Path, text: str | None, empty: bool) -> None:
    files = {}
    if text is not None:
        files["README.md"] = tmp_path / "README.md"
        files["README.md"].write_text(text)
    assert card_is_empty(card_text(files)) is empty
