"""Image URLs: what is taken for one, and how everything else is refused."""

from __future__ import annotations

import base64
import binascii
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmserve.server.images import sources
from vlmserve.server.images.settings import ImageError, ImageSettings
from vlmserve.server.images.sources import InlineImage, RemoteImage, parse_source

SETTINGS = ImageSettings()
SECRET = "token-5f2c"
BASE64 = re.compile("([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")


def data_url(data: bytes, label: str = "data:image/png;base64,") -> str:
    return label + base64.b64encode(data).decode()


def refusal(url: str, settings: ImageSettings = SETTINGS) -> str:
    with pytest.raises(ImageError) as caught:
        parse_source(url, settings)
    return caught.value.message


@pytest.mark.parametrize(
    "label",
    [
        "data:image/png;base64,", "data:image/jpeg;base64,", "DATA:IMAGE/PNG;BASE64,",
        "data:;base64,", "data:application/octet-stream;base64,",
        "data:image/png;charset=utf-8;base64,", "data:image/png; name=a.png; base64,",
    ],
)  # fmt: skip
def test_data_url_gives_its_bytes_whatever_its_label(label: str) -> None:
    assert parse_source(data_url(b"\x89PNG\xff\x00", label), SETTINGS) == InlineImage(
        b"\x89PNG\xff\x00"
    )


@given(st.binary(min_size=1, max_size=300))
def test_any_bytes_survive_a_data_url(data: bytes) -> None:
    assert parse_source(data_url(data), SETTINGS) == InlineImage(data)


@given(st.binary(min_size=1, max_size=100), st.text("AB=", max_size=6))
def test_long_data_url_is_read_in_slices_like_a_short_one(data: bytes, tail: str) -> None:
    """One call for 20 MB held the interpreter, and the event loop with it, for 0.1 s."""
    payload = base64.b64encode(data).decode().rstrip("=") + tail
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BASE64_SLICE_CHARS", 8)
        assert outcome(payload) == outcome_in_one_piece(payload)


def outcome(payload: str) -> bytes | None:
    try:
        source = parse_source("data:image/png;base64," + payload, SETTINGS)
    except ImageError:
        return None
    assert isinstance(source, InlineImage)
    return source.data


def outcome_in_one_piece(payload: str) -> bytes | None:
    if "=" not in payload and len(payload) % 4 > 1:
        payload += "=" * (-len(payload) % 4)
    return binascii.a2b_base64(payload) or None if BASE64.fullmatch(payload) else None


@pytest.mark.parametrize(
    ("payload", "problem"),
    [
        ("aGVsbG8=x", "base64"),
        ("aGVsbG8===", "base64"),
        ("-_-_", "URL-safe"),
        ("aGVsbG8_", "URL-safe"),
        ("aGVsb", "not valid base64: its length"),
        ("aGVs==aGVs", "not valid base64: its length"),
        ("aGVs%2BbG8", "percent-encoded base64"),
        ("data:image/png;base64,aGVs", "starts with data: again"),
        ("b'aGVs'", "as Python prints bytes"),
        ("aGVs!bG8", "standard alphabet"),
        ("aGéé", "base64"),
        ("\ud800aaa", "base64"),
        ("", "is empty"),
    ],
)
def test_data_url_that_is_not_base64_is_refused(payload: str, problem: str) -> None:
    message = refusal("data:image/png;base64," + payload)
    assert problem in message
    assert not payload or payload not in message


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png,%89PNG", "data:", "data:image/png;base64", "data:image/png;base64;,aGVs",
        "data:" + "x" * 300 + ";base64,aGVs",
    ],
)  # fmt: skip
def test_data_url_of_another_form_is_told_the_right_one(url: str) -> None:
    assert "data:image/png;base64," in refusal(url)


def test_data_url_counts_decoded_bytes_up_to_the_limit() -> None:
    for size in (97, 98, 99, 100):
        settings = ImageSettings(max_image_bytes=size)
        assert parse_source(data_url(bytes(size)), settings) == InlineImage(bytes(size))
        assert f"limit is {size}" in refusal(data_url(bytes(size + 1)), settings)


def test_large_data_url_is_refused_before_it_is_decoded() -> None:
    """What stands behind the comma is not base64 at all, yet the size is what is named."""
    assert "limit is 100" in refusal(
        "data:;base64," + "!" * 1000, ImageSettings(max_image_bytes=100)
    )


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h.example", RemoteImage("http", "h.example", 80, "/")),
        (
            "HTTPS://Pics.Example/A.png?b=c#d",
            RemoteImage("https", "pics.example", 443, "/A.png?b=c"),
        ),
        ("http://h.example:8080/x", RemoteImage("http", "h.example", 8080, "/x")),
        ("http://h.example:443/x", RemoteImage("http", "h.example", 443, "/x")),
        ("http://[2606:4700::1111]/x", RemoteImage("http", "2606:4700::1111", 80, "/x")),
        ("http://bücher.example/ü", RemoteImage("http", "xn--bcher-kva.example", 80, "/%C3%BC")),
        ("http://h。example/", RemoteImage("http", "h.example", 80, "/")),
        ("http://h.example/%0d%0aX:y", RemoteImage("http", "h.example", 80, "/%0d%0aX:y")),
        (
            "http://h.example/?u=http://a@b/",
            RemoteImage("http", "h.example", 80, "/?u=http://a@b/"),
        ),
    ],
)
def test_plain_url_is_read_once_into_its_parts(url: str, expected: RemoteImage) -> None:
    assert parse_source(url, SETTINGS) == expected


def test_authority_names_the_port_only_where_it_is_not_the_schemes_own() -> None:
    assert RemoteImage("http", "a.example", 80, "/").authority == "a.example"
    assert RemoteImage("https", "a.example", 80, "/").authority == "a.example:80"
    assert RemoteImage("https", "2606::1", 8443, "/x").url == "https://[2606::1]:8443/x"


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "ftp://h.example/x", "gopher://h.example/x", "javascript:alert(1)",
        "unix:///run/x.sock", "httpx://h.example", "blob:http://h.example/x", "FILE:///etc/passwd",
    ],
)  # fmt: skip
def test_other_schemes_are_refused(url: str) -> None:
    assert ("the path of a file" if url.lower().startswith("file:") else "scheme") in refusal(url)


@pytest.mark.parametrize(
    "url",
    [
        "", "x", "/etc/passwd", "//h.example/x", "http:", "http:/", "http://", "http:///x",
        "http:h.example", "http:/h.example/x", "http://?x", "http://:80/", " http://h.example/",
        "http://h.example/a b", "http://h.example/\r\nHost: x", "http://h.example/\x00",
        "http://h.example\\@evil.example/", "http:\\\\h.example/", "http://h\t.example/",
        "http://user@h.example/", f"http://user:{SECRET}@h.example/", "http://@h.example/",
        "http://h.example:0/", "http://h.example:22/", "http://h.example:25/",
        "http://h.example:65536/", "http://h.example:-1/", "http://h.example:8o/",
        "http://h.example:+80/", "http://ex%61mple.com/", "http://h.exa%2fmple/",
        "http://１２７.0.0.1/", "http://h.example\u2028/", "http://[::1",
        "http://[fe80::1%25eth0]/", "http://[zz]/", "http://-h.example/", "http://.h.example/",
        "http://a..example/", "http://" + "a" * 64 + ".example/", "http://\ud800.example/",
        "http://h.example/\ud800", "http://" + "a." * 130 + "example/", "http://h.example,b/",
    ],
)  # fmt: skip
def test_malformed_and_deceptive_urls_are_refused_in_silence_about_them(url: str) -> None:
    message = refusal(url)
    assert SECRET not in message
    assert "evil" not in message
    assert message.isascii()
    assert message.isprintable()


def test_overlong_url_is_refused() -> None:
    assert "8,192" in refusal("http://h.example/" + "a" * 9000)


@given(st.text(max_size=80).map(lambda text: "http://" + text))
def test_any_text_is_either_a_clean_url_or_an_image_error(url: str) -> None:
    """What is taken holds nothing that could end a header line or change the host."""
    try:
        source = parse_source(url, SETTINGS)
    except ImageError:
        return
    assert isinstance(source, RemoteImage)
    assert source.host.isascii()
    assert not set(source.host) & set("@/\\?#% \r\n\t[]")
    assert source.target.isascii()
    assert source.target.startswith("/")
    assert not set(source.target) & set(" \r\n\t\x00#")


@pytest.mark.parametrize(
    "payload", ["aGVsbG8", "aGVs\nbG8=", "aGVs bG8=", "aGVs\r\nbG8=\r\n", " aGVsbG8= ", "aGVs\tbG8"]
)
def test_base64_with_blanks_or_without_padding_is_read(payload: str) -> None:
    """Each used to be refused, as tools such as `base64` write them."""
    assert parse_source("data:image/png;base64," + payload, SETTINGS) == InlineImage(b"hello")


@pytest.mark.parametrize(
    "head", [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"RIFF1234"]
)
@pytest.mark.parametrize("size", [60, 20_000])
def test_bare_base64_is_told_what_to_put_in_front(head: bytes, size: int) -> None:
    """A long one used to be told only that it had too many characters for a URL."""
    message = refusal(base64.b64encode(head + bytes(size)).decode())
    assert "put data:image/png;base64, before" in message


@pytest.mark.parametrize(
    "path",
    [
        "/home/me/cat.png", "cat.jpg", "./cat", "../a/cat.webp", "~/cat.png", "C:\\a\\cat.png",
        "C:/cat.png", "file:///home/me/cat.png", "pictures/cat.JPEG", "\\\\host\\cat.gif",
    ],
)  # fmt: skip
def test_a_path_is_told_to_send_the_file(path: str) -> None:
    message = refusal(path)
    assert "data:image/png;base64,<" in message
    assert "cat" not in message


@pytest.mark.parametrize(
    "link",
    ["www.example.com/cat.png", "example.com/a/cat.jpg", "cdn.example.co.uk:8443/cat", "WWW.x"],
)
def test_a_link_without_a_scheme_is_told_to_put_it_in_front(link: str) -> None:
    """It used to be told that it is the path of a file."""
    assert refusal(link) == "image URL has no scheme: put https:// before the host"
