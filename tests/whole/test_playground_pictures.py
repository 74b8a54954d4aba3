"""Pictures on the page at /, in Debian's Chromium: dropped, pasted, chosen, photographed, moved."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image
from support.browsers import CHROMIUM, chromium, opened
from support.playground import PHONE, as_file, as_upload, ask, drop, sent_picture
from support.threaded import server_in_thread

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
PASTE = """([file]) => {
  const data = new DataTransfer();
  const bytes = Uint8Array.from(atob(file.content), (c) => c.charCodeAt(0));
  data.items.add(new File([bytes], file.name, { type: file.type }));
  const options = { clipboardData: data, bubbles: true, cancelable: true };
  return document.querySelector("#question").dispatchEvent(new ClipboardEvent("paste", options));
}"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def scripted(checkpoint):
    """The URL of a server that answers each question "What?"."""
    with server_in_thread(checkpoint) as port:
        yield f"http://127.0.0.1:{port}/"


def test_two_pictures_are_sent_in_the_order_that_was_chosen(browser, scripted, draw_picture):
    with opened(browser, scripted) as page:
        files = [as_file(draw_picture(seed), f"{seed}.png") for seed in (1, 2)]
        drop(page, *files)
        page.click("[aria-label='Move 1.png back']")
        shown = [page.get_attribute(f".chip:nth-child({at}) img", "alt") for at in (1, 2)]
        assert shown == ["2.png", "1.png"]
        page.click("[aria-label='Remove 2.png']")
        with page.expect_request("**/v1/chat/completions") as sent:
            ask(page, "What")
        (part, _) = sent.value.post_data_json["messages"][-1]["content"]
        assert part["image_url"]["url"] == draw_picture(1).url


def test_a_photo_is_turned_upright_and_scaled_only_over_the_limit(browser, scripted):
    image = Image.new("RGB", (60, 40), "red")
    image.paste("blue", (0, 0, 30, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees
    sideways, large = io.BytesIO(), io.BytesIO()
    image.save(sideways, "JPEG", exif=exif)
    Image.new("L", (16_400, 64)).save(large, "PNG")
    files = [
        {"name": name, "type": kind, "content": base64.b64encode(data.getvalue()).decode()}
        for name, kind, data in (("a.jpg", "image/jpeg", sideways), ("b.png", "image/png", large))
    ]
    with opened(browser, scripted) as page:
        drop(page, *files)
        notes = page.locator(".chip-note").all_inner_texts()
        assert notes[0] == "Turned upright."
        assert notes[1].startswith("Scaled from 16400 × 64 to 16384 × 63: the server takes at most")
        url = page.get_attribute(".chip:first-child img", "src")
        upright = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        assert upright.size == (40, 60)
        top, bottom = upright.getpixel((20, 10)), upright.getpixel((20, 50))
        assert top[2] > 150 > top[0]
        assert bottom[0] > 150 > bottom[2]


def test_a_pasted_picture_is_sent_and_pasted_words_stay_words(browser, scripted, draw_picture):
    picture = draw_picture(1)
    with opened(browser, scripted) as page:
        page.wait_for_selector("#model:not([disabled])")
        is_left_to_browser = page.evaluate(PASTE, [as_file(picture)])
        assert not is_left_to_browser
        page.wait_for_selector(".chip img[alt='picture.png']")
        assert as_file(picture)["content"].encode() == base64.b64encode(sent_picture(page))


def test_pictures_are_chosen_from_files_and_moved_by_keyboard(browser, scripted, draw_picture):
    with opened(browser, scripted) as page:
        page.wait_for_selector("#model:not([disabled])")
        with page.expect_file_chooser() as chooser:
            page.click("[aria-label='Add pictures']")
        assert chooser.value.is_multiple()
        uploads = [as_upload(draw_picture(seed), f"{seed}.png") for seed in (1, 2, 3)]
        chooser.value.set_files(uploads)
        page.wait_for_selector(".chip:nth-child(3)")
        page.focus("[aria-label='Move 3.png forward']")
        for _ in range(2):
            page.keyboard.press("Enter")  # the focus goes with the picture
        shown = page.eval_on_selector_all(".chip img", "all => all.map((one) => one.alt)")
        assert shown == ["3.png", "1.png", "2.png"]


def test_on_a_phone_a_photo_is_taken_with_its_own_camera(browser, scripted, draw_picture):
    with opened(browser, scripted, **PHONE, has_touch=True, is_mobile=True) as page:
        page.wait_for_selector("#model:not([disabled])")
        with page.expect_file_chooser() as chooser:
            page.tap("[aria-label='Take a photo']")
        assert chooser.value.element.get_attribute("capture") == "environment"
        chooser.value.set_files(as_upload(draw_picture(1), "photo.png"))
        page.wait_for_selector(".chip img[alt='photo.png']")
        assert sent_picture(page) == as_upload(draw_picture(1), "")["buffer"]


def test_on_a_desktop_a_photo_is_taken_with_the_camera_which_is_then_off(browser, scripted):
    with opened(browser, scripted, permissions=["camera"]) as page:
        page.wait_for_selector("#model:not([disabled])")
        page.click("[aria-label='Take a photo']")
        page.wait_for_selector("dialog video")
        stream = page.evaluate_handle("document.querySelector('dialog video').srcObject")
        page.click("text=Take the photo")
        page.wait_for_selector(".chip img[alt='photo.jpg']")
        assert stream.evaluate("(one) => one.getTracks().map((track) => track.readyState)") == [
            "ended"
        ]
        photo = Image.open(io.BytesIO(sent_picture(page)))
        assert photo.format == "JPEG"
        assert len(photo.convert("L").getcolors()) > 10  # the drawing, not an empty frame


def test_a_camera_that_is_not_allowed_is_reported(browser, scripted):
    with opened(browser, scripted, permissions=[]) as page:
        page.wait_for_selector("#model:not([disabled])")
        page.click("[aria-label='Take a photo']")
        page.wait_for_selector("text=The browser does not allow the camera.")
        assert page.locator("dialog").count() == 0
