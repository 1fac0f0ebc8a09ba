"""Keys as text, and what is kept of them."""

import pytest

from adaptermesh.store.access.secrets import hash_key, is_key, key_id_of, new_key


def test_a_key_begins_with_the_id_by_which_it_is_known() -> None:
    key_id, key = new_key()
    assert key.startswith(key_id + "_")
    assert key_id_of(key) == key_id
    assert new_key()[1] != key


@pytest.mark.parametrize(
    "text", ["", "amk_", "amk_abcdefgh", "amk_abcdefgh_short", "x" * 10_000, "amk_ABCDEFGH_" + "a" * 43]
)
def test_what_is_no_key_has_no_id(text: str) -> None:
    assert key_id_of(text) is None


def test_only_the_key_itself_fits_what_is_kept_of_it() -> None:
    _, key = new_key()
    kept = hash_key(key)
    assert key not in kept
    assert is_key(key, kept)
    assert not is_key(key[:-1] + ("a" if key[-1] != "a" else "b"), kept)
    assert hash_key(key) != kept
