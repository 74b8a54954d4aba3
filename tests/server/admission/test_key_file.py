"""The key file: attributes of each key, old files, and errors that never show a key."""

import hashlib

import pytest

from vlmserve.router.messages import OwnerPolicy
from vlmserve.server.admission.key_file import ApiKey, KeyFileError, digest_of, read_key_file


def keys_of(tmp_path, text: str) -> list[ApiKey]:
    file = tmp_path / "keys"
    file.write_text(text)
    return read_key_file(file)


def test_a_file_with_one_key_a_line_still_works(tmp_path):
    keys = keys_of(tmp_path, "first\n\n# comment\n  second \nfirst\n")
    assert keys == [ApiKey(digest_of("first")), ApiKey(digest_of("second"))]
    assert keys[0].digest == hashlib.sha256(b"first").digest()
    assert not keys[0].has_rates


def test_a_line_has_attributes_in_any_order(tmp_path):
    line = "k tokens_per_minute=20000 cross_priority weight=2.5 max_concurrent=8 name=team-a"
    (key,) = keys_of(tmp_path, line + " requests_per_minute=60")
    policy = OwnerPolicy(weight=2.5, cross_priority=True, max_concurrent=8)
    assert key == ApiKey(digest_of("k"), "team-a", policy, 60, 20_000)
    assert key.has_rates


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("SECRET words", "not an attribute"),
        ("SECRET color=SECRET", "not an attribute"),
        ("SECRET weight", "not an attribute"),
        ("SECRET cross_priority=1", "not an attribute"),
        ("SECRET weight=0", "weight in line 2"),
        ("SECRET weight=-1", "weight in line 2"),
        ("SECRET weight=nan", "weight in line 2"),
        ("SECRET weight=inf", "weight in line 2"),
        ("SECRET weight=SECRET", "weight in line 2"),
        ("SECRET max_concurrent=0", "max_concurrent in line 2"),
        ("SECRET max_concurrent=1.5", "max_concurrent in line 2"),
        ("SECRET requests_per_minute=SECRET", "requests_per_minute in line 2"),
        ("SECRET tokens_per_minute=" + "9" * 5000, "tokens_per_minute in line 2"),
        ("SECRET tokens_per_minute=٣", "tokens_per_minute in line 2"),
        ("SECRET weight=1 weight=1", "line 2 of the API key file gives weight twice"),
        ("ok weight=2", "repeats the key of line 1"),
    ],
)
def test_row_71_an_error_names_the_line_and_nothing_that_stands_in_it(tmp_path, line, error):
    with pytest.raises(KeyFileError, match=error) as raised:
        keys_of(tmp_path, f"ok\n{line}\n")
    assert "line 2" in str(raised.value)
    assert "SECRET" not in str(raised.value)
    assert "\n" not in str(raised.value)
