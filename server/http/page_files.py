"""The files of the two pages: the playground at / and the API's document at /docs.

Owns which files there are, and their media types. They are the same on every server, so they need
no key: a browser can send a key only after the page has loaded and asked for it.
"""

from __future__ import annotations

HTML = "text/html; charset=utf-8"
SCRIPT = "text/javascript; charset=utf-8"
STYLE = "text/css; charset=utf-8"
TEXT = "text/plain; charset=utf-8"
PNG = "image/png"
SVG = "image/svg+xml"

# Of the page at /docs, besides the page itself.
DOCS_FILES = {
    "favicon-32x32.png": PNG,
    "initializer.js": SCRIPT,
    "swagger-ui-bundle.js": SCRIPT,
    "swagger-ui.css": STYLE,
}
# Of the playground, in server/api/pages/ui/.
UI_FILES = {
    "style.css": STYLE,
    "panels.css": STYLE,
    "icon.svg": SVG,
    "main.js": SCRIPT,
    "dom.js": SCRIPT,
    "api.js": SCRIPT,
    "events.js": SCRIPT,
    "frames.js": SCRIPT,
    "conversation.js": SCRIPT,
    "store.js": SCRIPT,
    "pictures.js": SCRIPT,
    "tiling.js": SCRIPT,
    "composer.js": SCRIPT,
    "thread.js": SCRIPT,
    "answer.js": SCRIPT,
    "machine.js": SCRIPT,
    "tokens.js": SCRIPT,
    "markdown.js": SCRIPT,
    "patch.js": SCRIPT,
    "request.js": SCRIPT,
    "settings.js": SCRIPT,
    "snippets.js": SCRIPT,
    "tools.js": SCRIPT,
    "live.js": SCRIPT,
    "ids.js": SCRIPT,
    "welcome.js": SCRIPT,
    "dialogs.js": SCRIPT,
    "vendor/marked.esm.js": SCRIPT,
    "vendor/libraries.txt": TEXT,
    "examples/shapes.png": PNG,
    "examples/three.png": PNG,
    "examples/wide.png": PNG,
}
PLAYGROUND = "/"
DOCS_PATHS = frozenset({"/docs", *(f"/docs/{name}" for name in DOCS_FILES)})
UI_PATHS = frozenset({PLAYGROUND, *(f"/ui/{name}" for name in UI_FILES)})
