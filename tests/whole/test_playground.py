"""The page at / in Debian's Chromium, against real and scripted servers.

Needs chromium, and playwright from the tests' requirements; axe-core comes with the node packages.
The parts that need no browser: tests/server/api/test_playground.py.
"""

from __future__ import annotations

import os
import re
import signal

import psutil
import pytest
from support.browsers import CHROMIUM, chromium, opened, violations
from support.http_side import meta_like_tokenizer, tokens_one_by_one
from support.invariants import Standing
from support.playground import PHONE, as_file, ask, drop
from support.running import serving
from support.threaded import server_in_thread

from vlmserve.router.messages import SequenceOutput

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
TOKENIZER = meta_like_tokenizer()
HOSTILE = (
    "<img src=x onerror=\"document.title='hacked'\"> <script>document.title='hacked'</script>"
    " [link](javascript:document.title='hacked') <svg/onload=alert(1)>"
    " ![pixel](http://evil.example/pixel.png)\n\n```\n</code><b>\n```\n\n"
    "<iframe src='javascript:alert(1)'></iframe>"
)


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def scripted(checkpoint):
    """The URL of a server that answers by the last word of the question."""
    with server_in_thread(checkpoint, script=by_the_question) as port:
        yield f"http://127.0.0.1:{port}/"


def by_the_question(request):
    prompt = TOKENIZER.decode(request.prompt_token_ids, skip_special_tokens=False)
    question = prompt.split("<|eot_id|>")[-2]
    if question.endswith("hostile"):
        return list(tokens_one_by_one(TOKENIZER, HOSTILE))
    if question.endswith("megabyte"):
        return long_line()
    if question.endswith("slow"):
        return [part for _ in range(600) for part in (0.2, answer_token(3923))]
    if question.endswith("time"):
        if "ipython<|end_header_id|>" in prompt:
            return list(tokens_one_by_one(TOKENIZER, "What is in this image?"))
        call = '{"name": "current_time", "parameters": {"timezone": "UTC"}}'
        return list(tokens_one_by_one(TOKENIZER, call))
    outputs = list(tokens_one_by_one(TOKENIZER, "What is in this image?"))
    choices = range(len(request.answer_ids))
    return [with_id(output, str(choice)) for choice in choices for output in outputs]


def long_line():
    ids = TOKENIZER.encode("a*_[" * 64, add_special_tokens=False).ids
    pieces = [SequenceOutput(request_id="r", token_ids=ids) for _ in range(4096)]
    return [*pieces, SequenceOutput(request_id="r", token_ids=[128009], finish_reason="stop")]


def answer_token(token_id):
    return SequenceOutput(request_id="r", token_ids=[token_id])


def with_id(output, request_id):
    return SequenceOutput(
        request_id=request_id, token_ids=output.token_ids, finish_reason=output.finish_reason
    )


def test_a_dropped_picture_is_answered_rightly_with_what_the_machine_did(
    browser, server, draw_picture
):
    picture = draw_picture(1018, num_shapes=1, size=(300, 200))
    (shape,) = picture.scene.shapes
    with opened(browser, server.url + "/") as page:
        drop(page, as_file(picture))
        answer = ask(page, "What is in this image?")
        assert (
            answer
            == f"There is a {shape.colour} {shape.kind} on a {picture.scene.background} background."
        )
        facts = page.inner_text(".machine")
        assert re.search(r"Pictures\s+1, \d tiles?", facts)
        assert "tokens/s" in facts
        page.click(".seen-small button")
        page.wait_for_selector("dialog .tiles")
        assert "300 × 200 resized to" in page.inner_text("dialog figcaption")
        page.keyboard.press("Escape")
        page.click("text=Tokens")
        page.wait_for_selector(".token")
        assert "".join(page.locator(".token").all_inner_texts()).startswith(answer[:20])
        page.focus(".token")
        page.keyboard.press("ArrowRight")
        assert page.locator(".alternative").count() >= 5
        page.click("text=Prompt")
        page.wait_for_selector("dialog .special-token")
        assert "<|image|>" in page.inner_text("dialog .prompt")


def test_an_example_is_one_click_away_and_the_conversation_survives_a_reload(browser, server):
    with opened(browser, server.url + "/") as page:
        page.click(".example >> nth=0")
        page.wait_for_selector(".answer.done")
        assert "red circle" in page.inner_text(".prose")
        page.reload()
        page.click(".entry")
        page.wait_for_selector(".answer.done")
        assert "red circle" in page.inner_text(".prose")
        page.click("text=Tokens")
        assert page.locator(".token-view .token").count() > 5
        page.hover(".token >> nth=1")
        assert page.locator(".alternative").count() >= 5


def test_conversations_are_exported_deleted_and_imported_again(
    browser, scripted, draw_picture, tmp_path
):
    with opened(browser, scripted) as page:
        drop(page, as_file(draw_picture(1)))
        answer = ask(page, "What")
        with page.expect_download() as download:
            page.click("text=Export")
        file = tmp_path / download.value.suggested_filename
        download.value.save_as(file)
        page.click("[aria-label^='Delete ']")
        page.wait_for_selector(".entry", state="detached")
        with page.expect_file_chooser() as chooser:
            page.click("text=Import")
        chooser.value.set_files(file)
        page.click(".entry")
        page.wait_for_selector(".answer.done")
        assert page.inner_text(".answer .prose") == answer
        assert page.get_attribute(".picture img", "src") == draw_picture(1).url
        file.write_text("{}")
        with page.expect_file_chooser() as chooser:
            page.click("text=Import")
        chooser.value.set_files(file)
        page.wait_for_selector("text=The file is not an export of this page.")


def test_an_answer_can_be_stopped_and_keeps_what_came(browser, scripted):
    with opened(browser, scripted) as page:
        page.wait_for_selector("#model:not([disabled])")
        page.fill("#question", "slow")
        page.press("#question", "Enter")
        page.wait_for_selector(".prose:has-text('What')")
        page.click("[aria-label=Stop]")
        page.wait_for_selector(".answer.stopped")
        assert "What" in page.inner_text(".prose")
        assert page.get_attribute(".send", "aria-label") == "Send"


def test_turns_are_edited_and_answered_again_without_losing_a_version(browser, scripted):
    with opened(browser, scripted) as page:
        ask(page, "What")
        page.click("[aria-label='Answer again']")
        page.wait_for_selector("text=2 of 2")
        page.wait_for_selector(".answer.done")
        page.click("[aria-label='Edit and ask again']")
        assert page.input_value("#question") == "What"
        ask(page, "What else")
        assert page.inner_text(".user .figure") == "2 of 2"
        page.click("[aria-label='Previous question']")
        page.wait_for_selector(".assistant .figure >> text=2 of 2")
        assert page.inner_text(".question") == "What"


def test_several_answers_stand_side_by_side_and_one_goes_on(browser, scripted):
    with opened(browser, scripted) as page:
        page.wait_for_selector("#model:not([disabled])")
        page.click("#open-settings")
        page.fill("label:has-text('Answers side by side') + input", "2")
        ask(page, "What")
        assert page.locator(".several .answer.done").count() == 2
        page.click("text=Go on with this answer")
        page.wait_for_selector(".answer.chosen[aria-label='Answer 2']")
        with page.expect_request("**/v1/chat/completions") as sent:
            page.fill("#question", "slow")
            page.press("#question", "Enter")
        roles = [message["role"] for message in sent.value.post_data_json["messages"]]
        assert roles == ["user", "assistant", "user"]
        page.wait_for_selector(".several .answer.streaming >> nth=1")
        page.click("[aria-label=Stop]")
        page.wait_for_selector(".several .answer.stopped >> nth=1")


def test_settings_have_the_servers_bounds_and_the_form_of_an_answer_is_sent(browser, scripted):
    with opened(browser, scripted) as page:
        page.wait_for_selector("#model:not([disabled])")
        page.click("#open-settings")
        number = page.locator("label:has-text('Temperature') + input")
        assert (number.get_attribute("min"), number.get_attribute("max")) == ("0", "2")
        number.fill("3")
        assert number.get_attribute("aria-invalid") == "true"
        number.fill("0.5")
        page.select_option("label:has-text('Held to') + select", "json")
        page.fill("label:has-text('JSON schema') + textarea", '{"type": "object"}')
        with page.expect_request("**/v1/chat/completions") as sent:
            page.fill("#question", "What")
            page.press("#question", "Enter")
        body = sent.value.post_data_json
        assert body["temperature"] == 0.5
        assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
        page.wait_for_selector(".answer:not(.streaming)")


def test_the_demo_tool_is_called_and_its_result_answered(browser, scripted):
    with opened(browser, scripted) as page:
        page.wait_for_selector("#model:not([disabled])")
        page.click("#open-settings")
        page.check("text=Offer the demo tool")
        ask(page, "time")
        page.wait_for_selector(".tool")
        assert "UTC" in page.inner_text(".tool code")
        assert "current_time(" in page.inner_text(".call")


def test_a_wrong_key_is_refused_in_words_and_the_right_one_is_kept_for_the_session(
    browser, checkpoint
):
    with (
        server_in_thread(checkpoint, api_keys=["right"]) as port,
        opened(browser, f"http://127.0.0.1:{port}/") as page,
    ):
        page.fill("dialog input", "wrong")
        page.press("dialog input", "Enter")
        page.wait_for_selector("text=The server refused this key.")
        page.fill("dialog input", "right")
        page.press("dialog input", "Enter")
        assert ask(page, "What") == "What?"
        page.reload()
        page.wait_for_selector("#model:not([disabled])")
        stored = page.evaluate(
            "[sessionStorage.length, JSON.stringify(localStorage).includes('right')]"
        )
        assert stored == [1, False]


def test_a_server_that_restarts_in_the_middle_leaves_the_text_and_answers_again(
    browser, start_faulty_server
):
    server = start_faulty_server()
    server.suffer("slow 0.2")
    with opened(browser, server.url + "/") as page:
        page.wait_for_selector("#model:not([disabled])")
        page.click("#open-settings")
        page.fill("label:has-text('Maximum tokens') + input", "400")
        page.fill("#question", "What")
        page.press("#question", "Enter")
        page.wait_for_selector(".prose > *")
        server.suffer("")
        for child in psutil.Process(server.process.pid).children(recursive=True):
            if "vlmserve.server.worker.process" in " ".join(child.cmdline()):
                os.kill(child.pid, signal.SIGKILL)
        page.wait_for_selector(".answer.failed")
        assert (
            "The connection to the server was lost. The answer is incomplete."
            in page.inner_text(".error")
        )
        while page.locator(".answer.done").count() == 0:
            page.click("text=Try again")
            page.wait_for_selector(".turn:last-child .answer:not(.streaming)")
        page.disturbances.clear()


@pytest.mark.parametrize("question", ["hostile", "megabyte"])
def test_row_76_a_hostile_answer_does_nothing(browser, scripted, question):
    with opened(browser, scripted) as page:
        answer = ask(page, question)
        assert page.title() == "vlmserve"
        assert page.locator(".prose :is(img, script, iframe, svg, style)").count() == 0
        addresses = page.eval_on_selector_all(".prose a", "all => all.map((one) => one.protocol)")
        assert set(addresses) <= {"http:", "https:"}
        assert "<img src=x" in answer or len(answer) >= 2**20
        page.fill("#question", "still alive")
        assert page.input_value("#question") == "still alive"


def test_everything_is_done_by_keyboard(browser, server):
    with opened(browser, server.url + "/") as page:
        page.wait_for_selector(".example")
        tab_to(page, ".example")
        page.keyboard.press("Enter")
        page.wait_for_selector(".answer.done")
        assert page.evaluate("document.activeElement.id") == "question"
        tab_to(page, ".answer [aria-expanded]")
        page.keyboard.press("Enter")
        tab_to(page, ".token")
        page.keyboard.press("End")
        assert page.evaluate("document.activeElement.textContent") == "<|eot_id|>"
        tab_to(page, "#open-settings")
        page.keyboard.press("Enter")
        page.wait_for_selector("#panel:not([hidden])")
        page.keyboard.press("Escape")
        page.wait_for_selector("#panel", state="hidden")
        assert page.evaluate("document.activeElement.id") == "open-settings"


def tab_to(page, selector):
    for _ in range(100):
        page.keyboard.press("Tab")
        if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"{selector} is not reached by the tab key")


def test_the_engine_panel_counts_only_while_it_is_open(browser, server):
    with opened(browser, server.url + "/") as page:
        streams = []
        page.on("request", lambda sent: streams.append(sent) if "v1/live" in sent.url else None)
        page.wait_for_selector(".example")
        assert streams == []
        page.click("#open-engine")
        page.wait_for_selector(".meter")
        assert page.inner_text(".state") == "Ready"
        assert "Text blocks" in page.inner_text("#panel")
        page.click("#open-engine")
        page.wait_for_selector("#panel", state="hidden")
        assert len(streams) == 1


def test_the_engine_panel_shows_the_caches_of_each_replica(browser, tmp_path):
    """The second answer about a picture finds it in the replica that had the first."""
    with (
        serving(tmp_path, "--replicas", "2", "--dtype", "float32") as server,
        opened(browser, server.url + "/") as page,
    ):
        page.click(".example >> nth=0")
        page.wait_for_selector(".answer.done")
        page.click("[aria-label='Answer again']")
        page.wait_for_selector("text=2 of 2")
        page.wait_for_selector(".answer.done")
        page.click("#open-engine")
        page.wait_for_selector(".replicas td:has-text('50 %')")
        _, caches = page.locator(".replicas").all()
        rows = [row.split("\t") for row in caches.locator("tbody").inner_text().splitlines()]
        assert [row[0] for row in rows] == ["0", "1"]
        assert sorted(row[2:] for row in rows) == [["50 %", "0", "0"], ["–", "0", "0"]]
        assert sorted(row[1] == "–" for row in rows) == [False, True]
        assert page.inner_text("#panel dl:has-text('Pictures found')").count("50 %") == 1
        assert violations(page) == []
        os.kill(Standing(server).pids("engine")[0], signal.SIGKILL)
        page.wait_for_selector(".replicas:last-of-type td:last-child:has-text('1')")
        restarts = caches.locator("td:last-child").all_inner_texts()
        assert sorted(restarts) == ["0", "1"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [None, PHONE], ids=["desktop", "phone"])
def test_axe_finds_no_violation_and_nothing_is_wider_than_the_screen(browser, server, scheme, size):
    with opened(browser, server.url + "/", color_scheme=scheme, **(size or {})) as page:
        page.wait_for_selector(".example")
        found = violations(page)
        page.click(".example >> nth=1")
        page.wait_for_selector(".answer.done")
        page.click("text=Tokens")
        found += violations(page)
        for button in ("#open-engine", "#open-settings"):
            page.click(button)
            page.wait_for_selector("#panel:not([hidden]) .pane:not([hidden]) h3")
            found += violations(page)
            page.keyboard.press("Escape")
        page.click("[aria-label='This request as a program']")
        found += violations(page)
        width = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert width <= 0
        assert found == []
