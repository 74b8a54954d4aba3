"""Rows 10 to 20, 27 and 36: pictures and their URLs, on every route that takes them.

Hostile pictures go to the real server as data URLs. Whatever names a host goes to a server
whose resolver and connector are scripted: it can tell who would have been asked, and no packet
leaves the machine. The single shapes are `test_decoding`'s, `test_decoders`' and
`test_fetch_guard`'s.
"""

import base64
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.guarded import guarded_server
from support.invariants import CHAT, GENERATION_ROUTES, assert_error, body_for, peak_bytes
from support.outside import (
    FORBIDDEN,
    PUBLIC,
    Site,
    drip,
    endless,
    plain_response,
    redirect,
)
from support.pictures import bombs, encoded, noise, picture, png_of_zeros

from vlmserve.server.images.settings import MEBI

ROOT = Path(__file__).resolve().parents[3]
GOOD = encoded(picture())


def url_of(data: bytes, label: str = "image/png") -> str:
    return f"data:{label};base64,{base64.b64encode(data).decode()}"


def refuse_all(standing, pictures) -> list[str]:
    """Send each picture to every route; gives the messages of the 400s."""
    messages = []
    for route in GENERATION_ROUTES:
        for data in pictures:
            answer = standing.post(route, body_for(route, images=[url_of(data)]))
            messages.append(assert_error(answer, 400)["message"])
    return messages


def test_row_10_a_picture_over_a_limit_is_refused_by_its_header_alone(standing):
    """21.6 kB of PNG would be 860 MB of pixels."""
    bomb = png_of_zeros(13_300, 13_300)
    assert len(bomb) < 25_000
    long_side, thin = png_of_zeros(16_385, 100), png_of_zeros(4_000, 19)
    pids = [*standing.pids("decoder"), *standing.pids("worker")]
    before = {pid: peak_bytes(pid) for pid in pids}
    messages = refuse_all(standing, [bomb, long_side, thin])
    assert all("pixels" in message for message in messages)
    assert all(peak_bytes(pid) - size < 32 * MEBI for pid, size in before.items())


def test_row_10_a_phone_photo_of_48_megapixels_is_taken(standing):
    photo = encoded(Image.fromarray(noise(80, 60)).resize((8_000, 6_000)), "JPEG", quality=40)
    for route in GENERATION_ROUTES:
        assert standing.post(route, body_for(route, images=[url_of(photo)])).status == 200


def test_row_11_what_is_none_of_four_formats_by_its_bytes_is_refused(standing):
    broken = [bombs()[name] for name in bombs() if "early" in name or name in ("HEIC", "empty")]
    others = [encoded(picture(), one) for one in ("TIFF", "BMP", "ICO", "PPM")]
    messages = refuse_all(standing, [*broken, *others, b"<svg onload=x>", bytes(range(256))])
    assert any("HEIC" in message and "convert it" in message for message in messages)
    assert not any("cannot identify" in message for message in messages)


def test_row_11_a_wrong_label_is_forgiven_and_a_phones_several_pictures_are_one(standing):
    several = encoded(picture(), "MPO", save_all=True, append_images=[picture(70, 51)])
    for route in GENERATION_ROUTES:
        for data, label in ((GOOD, "image/jpeg"), (GOOD, "text/html"), (several, "image/png")):
            answer = standing.post(route, body_for(route, images=[url_of(data, label)]))
            assert answer.status == 200, answer.body


def test_row_12_bombs_beside_the_pixels_cost_nothing(standing):
    frames = [Image.new("P", (200, 200), number) for number in range(200)]
    animated = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    for route in GENERATION_ROUTES:
        for data in (bombs()["text bomb"], bombs()["profile bomb"], animated):
            answer = standing.post(route, body_for(route, images=[url_of(data)]))
            if answer.status != 200:
                assert_error(answer, 400)


ODD = {
    "a pixel": Image.new("RGB", (1, 1)),
    "a column": Image.new("RGB", (1, 200)),
    "too long a column": Image.new("RGB", (1, 8192)),
    "16 bits": Image.fromarray(np.full((8, 8), 0x4080, dtype=np.uint16)),
    "palette": picture().quantize(16),
    "bilevel": picture().convert("1"),
    "grey with alpha": Image.fromarray(noise(20, 10, 4)).convert("LA"),
}


def test_row_13_odd_pictures_are_answered_or_refused_and_never_a_500(standing):
    files = {name: encoded(image) for name, image in ODD.items()}
    files["CMYK"] = encoded(Image.new("CMYK", (64, 64)), "JPEG")
    files["palette with alpha"] = encoded(ODD["palette"], transparency=3)
    exif = Image.Exif()
    exif[0x0112] = 6
    files["turned"] = encoded(picture(), "JPEG", exif=exif)
    for route in GENERATION_ROUTES:
        for name, data in files.items():
            answer = standing.post(route, body_for(route, images=[url_of(data)]))
            assert answer.status == (400 if name == "too long a column" else 200), (name, answer)


def has_limits(pid: int) -> bool:
    """Whether a decoder has begun to serve: it takes its limits last."""
    try:
        lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    except OSError:  # it has ended
        return False
    return any(line.split()[:4] == ["Max", "file", "size", "0"] for line in lines)


def test_row_14_a_decoder_that_hangs_or_dies_costs_its_own_picture(standing, wait_for):
    """Killed by the system: a 503. Crashed: a 400. Both are replaced; text goes on meanwhile."""
    routes = (CHAT, GENERATION_ROUTES[-1])
    for end, status, words in (
        (signal.SIGKILL, 503, "was interrupted"),
        (signal.SIGSEGV, 400, "crashed the decoder"),
    ):
        # A child that is still starting would not be given a picture.
        assert wait_for(lambda: len([*filter(has_limits, standing.pids("decoder"))]) == 2)
        standing.settled()
        stopped = standing.pids("decoder")
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        bodies = [
            body_for(route, images=[url_of(encoded(picture(70 + len(words), 50 + number)))])
            for number, route in enumerate(routes)
        ]
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(standing.post, *one) for one in zip(routes, bodies, strict=True)]
            standing.probe()
            # Only one that has been given its picture is lost with it.
            time.sleep(1.0)
            for pid in stopped:
                os.kill(pid, end)
                # The killed one may have been waited for already.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            for one in waiting:
                assert words in assert_error(one.result(), status)["message"]
        for route in GENERATION_ROUTES:
            answer = standing.post(route, body_for(route, images=[url_of(GOOD)]))
            assert answer.status == 200, answer.body
        assert not set(stopped) & set(standing.pids("decoder"))


@pytest.fixture(scope="module")
def guarded(checkpoint):
    with guarded_server(checkpoint) as server:
        yield server


@pytest.fixture(scope="module")
def narrow(checkpoint):
    """The same with limits that a test reaches."""
    limits = {"max_request_bytes": 15_000, "max_request_pixels": 5_000}
    with guarded_server(checkpoint, **limits) as server:
        yield server


@pytest.fixture(scope="module")
def impatient(checkpoint):
    """The same with limits of a single picture, and room for many in a request."""
    limits = {"max_image_bytes": 100_000, "fetch_timeout_s": 0.3}
    with guarded_server(checkpoint, **limits) as server:
        yield server


@pytest.fixture(scope="module")
def patient(checkpoint):
    """The same limit of bytes, and a time that no busy machine takes."""
    with guarded_server(checkpoint, max_image_bytes=100_000, fetch_timeout_s=100.0) as server:
        yield server


def test_row_15_an_address_that_is_not_public_is_refused_without_a_connection(guarded):
    spelled = ["2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0x7f.1", "[::ffff:7f00:1]"]
    hosts = [*(f"[{one}]" if ":" in one else one for one in FORBIDDEN if "%" not in one), *spelled]
    for host in hosts:
        asked = guarded.ask([f"http://{host}/a.png"], Site({}), routes=[CHAT])
        assert all("image URL" in message for message in asked.messages())
        assert asked.connected == asked.resolved == []
    for host in ("127.0.0.1", "[::1]", *spelled):
        asked = guarded.ask([f"http://{host}:8080/a.png"], Site({}))
        assert all("image URL" in message for message in asked.messages())
        assert asked.connected == asked.resolved == []


def test_row_15_a_name_of_such_an_address_is_refused_without_a_connection(guarded):
    for addresses in (
        ["10.0.0.1"],
        [PUBLIC, "127.0.0.1"],
        ["::ffff:127.0.0.1"],
        ["64:ff9b::7f00:1"],
    ):
        names = {"inside.example": [addresses]}
        asked = guarded.ask(["https://inside.example/a.png"], Site({}), names=names)
        assert all("not a public address" in message for message in asked.messages())
        assert asked.connected == []


def test_row_15_the_real_client_connects_to_no_forbidden_address():
    """In a network of its own, where nobody is; the interpreter tells of each connection."""
    script = f"""
        import asyncio, sys
        from vlmserve.server.images.fetch import ImageFetcher
        from vlmserve.server.images.settings import ImageError, ImageSettings
        from vlmserve.server.images.sources import parse_remote_url

        tried = []

        def note(event, args):
            if event == "socket.connect":
                tried.append(args[1])

        sys.addaudithook(note)

        async def main():
            fetcher = ImageFetcher(ImageSettings(fetch_timeout_s=5.0))
            for host in {[one for one in FORBIDDEN if "%" not in one]!r}:
                url = f"http://[{{host}}]/" if ":" in host else f"http://{{host}}/"
                try:
                    await fetcher.fetch(parse_remote_url(url, 8192))
                except ImageError as error:
                    assert "address" in str(error), (host, str(error))
                else:
                    raise AssertionError(host)
            assert tried == [], tried
            # And that the hook would have told.
            try:
                await fetcher.fetch(parse_remote_url("http://{PUBLIC}/", 8192))
            except ImageError:
                pass
            assert tried == [("{PUBLIC}", 80)], tried
            await fetcher.close()

        asyncio.run(main())
    """
    unshare = shutil.which("unshare")
    command = [unshare or "unshare", "--net", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    if unshare is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("this machine gives no network namespace")
    run = [*command, sys.executable, "-c", textwrap.dedent(script)]
    result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "location",
    ["http://127.0.0.1/", "http://[::1]/", "//10.0.0.1/", "http://inside.example/", "http://0x7f.1/",
     "file:///etc/passwd", "ftp://pictures.example/", "gopher://pictures.example/", "data:,x"],
)  # fmt: skip
def test_row_16_a_redirect_to_a_refused_place_is_refused(guarded, location):
    names = {"pictures.example": [[PUBLIC]], "inside.example": [["192.168.0.1"]]}
    asked = guarded.ask(
        ["http://pictures.example/a"], Site({"/a": redirect(location)}), names=names
    )
    asked.messages()
    assert asked.connected == [(PUBLIC, 80)] * len(GENERATION_ROUTES), "never the second hop"


def test_row_16_three_redirects_are_followed_and_four_are_not(guarded):
    chain = {f"/{hop}": redirect(f"/{hop + 1}") for hop in range(4)}
    site = Site({**chain, "/4": plain_response(GOOD)})
    fine = guarded.ask(["http://pictures.example/1"], site)
    assert fine.succeeded()
    asked = guarded.ask(["http://pictures.example/0"], site)
    assert all("more than 3 times" in message for message in asked.messages())


def test_row_17_only_the_address_that_was_judged_is_connected_to(guarded):
    """The name's second answer would be the inside; each request asks once, and goes there."""
    for route in GENERATION_ROUTES:
        names = {"pictures.example": [[PUBLIC], ["127.0.0.1"]]}
        site = Site({"/a": plain_response(GOOD)})
        asked = guarded.ask(["http://pictures.example/a"], site, names=names, routes=[route])
        assert asked.answers[0].status_code == 200
        assert asked.connected == [(PUBLIC, 80)]
        assert asked.resolved == ["pictures.example"]


async def lying(reader, writer):
    """Declares a byte less than the limit below, and sends without end."""
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    with contextlib.suppress(ConnectionError):
        while True:
            writer.write(b"1000\r\n" + bytes(0x1000) + b"\r\n")
            await writer.drain()


def test_row_18_a_slow_download_is_refused(impatient):
    asked = impatient.ask(["http://pictures.example/a"], Site({"/a": drip}))
    assert all("took over 0.3 s" in message for message in asked.messages())


@pytest.mark.parametrize("handler", [endless, lying])
def test_row_18_an_endless_or_lying_download_is_refused(patient, handler):
    """What all pictures of a request may have together is another limit, and ended it first."""
    asked = patient.ask(["http://pictures.example/a"], Site({"/a": handler}))
    assert all("over 100,000 bytes, the limit" in message for message in asked.messages())


@pytest.mark.slow
def test_row_18_decoded_bytes_count_of_data_urls_too(guarded):
    url = url_of(GOOD + bytes(20 * MEBI))
    asked = guarded.ask([url])
    assert all("20,971,520" in message for message in asked.messages())


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://pictures.example/a", "gopher://pictures.example/", "HTTP:a",
     "http://user:word@pictures.example/", "http://user@pictures.example/", "//pictures.example/a",
     "http://pictures.example\\@127.0.0.1/", "http://pictures.example/a\r\nX: y", "http://a\nb/",
     "http://pictures.example/a b", "http://pictures.example:22/", "/etc/passwd", ""],
)  # fmt: skip
def test_row_19_a_url_that_is_not_plain_is_refused(guarded, url):
    asked = guarded.ask([url], Site({}))
    asked.messages()
    assert asked.connected == asked.resolved == []


def test_row_20_a_fetch_carries_nothing_and_a_link_in_a_text_is_not_fetched(guarded, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    site = Site({"/a": plain_response(GOOD, headers="Set-Cookie: s=1\r\n")})
    asked = guarded.ask(["http://pictures.example/a"] * 2, site)
    assert asked.succeeded()
    allowed = {"accept", "accept-encoding", "connection", "host", "user-agent"}
    for head in site.heads:
        assert {line.split(":")[0].lower() for line in head.split("\r\n")[1:] if line} == allowed
    links = (
        'http://pictures.example/a ![a](http://pictures.example/a) <img src="http://pictures.'
        'example/a"> <img src="file:///etc/passwd">'
    )
    asked = guarded.ask(None, site, text=links)
    assert asked.succeeded()
    assert asked.connected == asked.resolved == []


FLAT = url_of(encoded(Image.new("RGB", (70, 50))))
BUDGETS = {
    "images": [FLAT] * 17,
    "MiB together": [url_of(GOOD)] * 2,
    "pixels together": [FLAT] * 2,
    "characters": ["http://pictures.example/" + "a" * 9_000],
}


@pytest.mark.parametrize("words", BUDGETS)
def test_row_27_a_requests_budget_is_checked_before_anything_is_fetched(narrow, words):
    urls = ["http://pictures.example/a", *BUDGETS[words]]
    asked = narrow.ask(urls, Site({"/a": plain_response(GOOD)}))
    assert all(words in message for message in asked.messages())
    assert asked.connected == asked.resolved == []


def test_row_27_the_tokens_of_a_prompt_are_counted_before_anything_is_fetched(guarded):
    asked = guarded.ask(["http://pictures.example/a"], Site({}), text="word " * 140_000)
    assert all("max_model_len" in message for message in asked.messages())
    assert asked.connected == []
