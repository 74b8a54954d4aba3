"""Debian's Chromium, driven by playwright: pages of a server under test, and axe-core's findings.

Owns how the browser starts and what counts as a disturbance. Knows nothing of the page's content.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

from support.client_environments import node_folder

CHROMIUM = shutil.which("chromium")
# Under load a page may be slow; what never comes fails the test.
DEADLINE_MS = 120_000


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """The browser, with a camera that shows a drawing; ended with the block."""
    from playwright.sync_api import sync_playwright

    options = ["--use-fake-device-for-media-stream"]
    # Chromium's sandbox needs another user than root.
    options += ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=options)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def opened(browser: Any, url: str, **options: Any) -> Iterator[Any]:
    """A page in a fresh profile, whose script errors and blocked contents fail the block.

    `page.disturbances` collects them; a test that expects one clears the list.
    """
    context = browser.new_context(**options)
    context.set_default_timeout(DEADLINE_MS)
    page = context.new_page()
    found: list[str] = []
    page.disturbances = found
    page.on("pageerror", lambda error: found.append(f"error: {error}"))
    page.on("console", lambda message: found.append(message.text) if is_bad(message) else None)
    page.on("dialog", lambda dialog: (found.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda sent: found.append(sent.url) if is_foreign(sent.url, url) else None)
    try:
        page.goto(url)
        yield page
        assert found == []
    finally:
        context.close()


def is_bad(message: Any) -> bool:
    """Errors of scripts and of the policy; not those of answers with an error status."""
    return message.type == "error" and "Failed to load resource" not in message.text


def is_foreign(address: str, url: str) -> bool:
    return not address.startswith((url, "data:", "blob:"))


def violations(page: Any) -> list[str]:
    """What axe-core finds on the page as it is now, at WCAG 2.2 AA and best practices."""
    axe = node_folder()[1] / "node_modules" / "axe-core" / "axe.min.js"
    page.evaluate(axe.read_text("utf-8"))
    result = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{one['id']}: {node['target']} {node['failureSummary']}"
        for one in result["violations"]
        for node in one["nodes"]
    ]
