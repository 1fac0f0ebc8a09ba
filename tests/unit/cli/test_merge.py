"""`adapters merge` against a real store."""

from pathlib import Path

import pytest

from tests.unit.cli.conftest import Invoke, document
from tests.unit.store.conftest import BASE_NAME, make_files


@pytest.fixture
def published(real_store: Path, invoke: Invoke, tmp_path: Path) -> Invoke:
    """acme/one:v1 of rank 2 and acme/two:v1 of rank 3."""
    for seed, name in enumerate(("one", "two")):
        folder = tmp_path / name
        folder.mkdir()
        for path, data in make_files(seed, rank=seed + 2).items():
            (folder / path).write_bytes(data)
        options = ("--base", BASE_NAME, "--license", "mit", "--task", "ner")
        result = invoke("adapters", "upload", str(folder), f"acme/{name}", *options)
        assert result.exit_code == 0, result.output
    return invoke


def test_merge_says_what_was_merged_and_show_tells_it_again(published: Invoke) -> None:
    digests = [
        document(published("adapters", "show", f"acme/{name}:v1", "--json"))["version"]["digest"]
        for name in ("one", "two")
    ]
    result = published("adapters", "merge", "acme/both", "acme/one:v1=0.75", "acme/two:v1=-0.5")
    assert result.exit_code == 0, result.output
    for words in (
        "acme/both:v1 published",
        "linear, 3 modules, rank 5, of",
        f"0.75  acme/one:v1  {digests[0]}",
        f"-0.5  acme/two:v1  {digests[1]}",
        "lora, rank 5",
        "next: adaptermesh alias set acme/both@prod v1",
    ):
        assert words in result.stdout
    assert "kept" not in result.stdout
    assert "warning" not in result.stdout
    assert "was there already" in (
        published("adapters", "merge", "acme/both", "acme/one:v1=0.75", "acme/two:v1=-0.5").stdout
    )
    shown = published("adapters", "show", "acme/both:v1").stdout
    assert all(digest in shown for digest in digests)
    short = [digest.removeprefix("sha256:")[:12] for digest in digests]
    assert f"linear of 0.75 * {short[0]} + -0.5 * {short[1]}" in shown
    assert "parents" not in published("adapters", "show", "acme/one:v1").stdout


def test_merge_to_a_rank_says_what_is_left(published: Invoke) -> None:
    arguments = ("acme/both", "acme/one:v1", "acme/two:v1", "--method", "dare")
    result = published("adapters", "merge", *arguments, "--density", "0.5", "--rank", "4", "--seed", "7")
    assert result.exit_code == 0, result.output
    assert "dare, density 0.5, seed 7, 3 modules, rank 4, of" in result.stdout
    assert "cutting to rank 4 kept" in result.stdout
    assert "rank 4, density 0.5, seed 7" in published("adapters", "show", "acme/both:v1").stdout


def test_merge_as_json_is_one_document(published: Invoke) -> None:
    arguments = ("acme/both", "acme/one:v1", "acme/two:v1=3", "--method", "average", "--json", "--check")
    result = published("adapters", "merge", *arguments)
    printed = document(result)
    assert result.stderr == ""
    assert (printed["created"], printed["version"]["number"], printed["method"]) == (False, 0, "average")
    assert [(member["ref"], member["weight"]) for member in printed["members"]] == [
        ("acme/one:v1", 1.0),
        ("acme/two:v1", 3.0),
    ]
    assert printed["kept"] == 1.0
    missing = published("adapters", "show", "acme/both:v1")
    assert missing.exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("acme/one:v9",), "version 'acme/one:v9' does not exist"),
        (("acme/one:v1", "--method", "svd"), "rank: svd needs a rank in [1, 4096]"),
        (("acme/one:v1", "--rank", "3"), "linear takes no rank"),
        (("acme/one:v1", "--method", "ties", "--rank", "3", "--density", "2"), "density: 2 is not in (0, 1]"),
        (("acme/one:v1", "acme/one:v1"), "twice"),
        (("acme/one:v1=-1", "--method", "average"), "an average takes none, linear does"),
    ],
)
def test_what_can_not_be_merged_is_an_error_in_words(
    published: Invoke, arguments: tuple[str, ...], words: str
) -> None:
    result = published("adapters", "merge", "acme/both", *arguments)
    assert result.exit_code == 1
    assert words in result.stderr


@pytest.mark.parametrize("member", ["acme/one:v1=", "acme/one:v1=much", "acme/one:v1=nan", "=1"])
def test_a_member_that_is_misspelt_is_a_usage_error(invoke: Invoke, member: str) -> None:
    result = invoke("adapters", "merge", "acme/both", member)
    assert result.exit_code == 2
    assert "REF=WEIGHT" in result.stderr
