"""What a user does on the page at /, as steps of playwright: pictures, questions, answers."""

from __future__ import annotations

import base64

PHONE = {"viewport": {"width": 360, "height": 740}}
DROP = """([files]) => {
  const data = new DataTransfer();
  for (const { name, type, content } of files) {
    const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
    data.items.add(new File([bytes], name, { type }));
  }
  const main = document.querySelector("main");
  for (const kind of ["dragover", "drop"]) {
    const options = { dataTransfer: data, bubbles: true, cancelable: true };
    main.dispatchEvent(new DragEvent(kind, options));
  }
}"""


def as_file(picture, name="picture.png"):
    content = picture.url.partition(",")[2]
    return {"name": name, "type": "image/png", "content": content}


def as_upload(picture, name):
    """The same for a file chooser."""
    content = base64.b64decode(as_file(picture)["content"])
    return {"name": name, "mimeType": "image/png", "buffer": content}


def drop(page, *files):
    page.wait_for_selector("#model:not([disabled])")
    page.evaluate(DROP, [list(files)])
    page.wait_for_selector(f".chip:nth-child({len(files)})")


def sent_picture(page):
    """The bytes of the only picture of a question, as the request has them."""
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "What")
    (part, _) = sent.value.post_data_json["messages"][-1]["content"]
    return base64.b64decode(part["image_url"]["url"].partition(",")[2])


def ask(page, question):
    """Ask; returns the text of the last answer once it is complete."""
    page.wait_for_selector("#model:not([disabled])")
    page.fill("#question", question)
    page.press("#question", "Enter")
    page.wait_for_selector(".turn:last-child .answer:not(.streaming)")
    return page.inner_text(".turn:last-child .answer:last-child .prose")
