"""`vlmserve chat`: talk to a server in the terminal, with pictures.

Owns the commands behind a slash and the conversation while it runs; `chat_client.py` sends it.
Works with any server that has OpenAI's chat completions.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .chat_client import ChatClient, ChatError

HELP = """\
/image FILE    send a picture with the next question
/system TEXT   set the system message; without a text, remove it
/save FILE     write the conversation as the body of a request
/clear         start again
/help          show this
/quit          leave"""
# By the first bytes of a file.
MEDIA_TYPES = {
    b"\x89PNG": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"RIFF": "image/webp",
}


def chat(
    url: Annotated[str, typer.Option(help="Base URL of the server.")] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None, typer.Option(help="Model name. Default: the server's first.")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="Picture for the first question; repeatable.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, max=2.0)] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum tokens of an answer.")
    ] = None,
    api_key_env: Annotated[
        str, typer.Option(help="Environment variable with the API key, if the server needs one.")
    ] = "VLMSERVE_API_KEY",
) -> None:
    """Talk to a server: type questions, or pipe one question per line. /help lists commands."""
    keys = os.environ.get(api_key_env, "").split()
    options = {"temperature": temperature, "max_tokens": max_tokens}
    fields = {name: value for name, value in options.items() if value is not None}
    try:
        with ChatClient(url, keys[0] if keys else None) as client:
            talk = Conversation(model or client.first_model(), fields, system)
            for path in image or ():
                talk.add_picture(path)
            is_clean = _converse(talk, client)
    except ChatError as error:
        typer.echo(f"vlmserve: {error}", err=True)
        raise typer.Exit(1) from error
    raise typer.Exit(0 if is_clean else 1)


class Conversation:
    """The messages so far, and the pictures of the next question."""

    def __init__(self, model: str, fields: dict[str, Any], system: str | None = None) -> None:
        self._model = model
        self._fields = fields
        self._pictures: list[dict[str, Any]] = []
        self._messages: list[dict[str, Any]] = []
        self.system = system

    @property
    def body(self) -> dict[str, Any]:
        """The body of a chat completion."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return {"model": self._model, "messages": [*first, *self._messages], **self._fields}

    def add_picture(self, path: Path) -> None:
        """Send this file with the next question. Raises ChatError if it is no picture."""
        try:
            data = path.expanduser().read_bytes()
        except OSError as error:
            raise ChatError(f"cannot read {path}: {error.strerror}") from error
        types = [name for magic, name in MEDIA_TYPES.items() if data.startswith(magic)]
        if not types:
            raise ChatError(f"{path} is not a PNG, JPEG, GIF or WebP file")
        url = f"data:{types[0]};base64,{base64.b64encode(data).decode()}"
        self._pictures.append({"type": "image_url", "image_url": {"url": url}})

    def ask(self, text: str) -> None:
        """Add a question with the waiting pictures."""
        content: Any = text
        if self._pictures:
            content = [*self._pictures, {"type": "text", "text": text}]
        self._pictures = []
        self._messages.append({"role": "user", "content": content})

    def answer(self, text: str) -> None:
        """Add what the model answered; without a text, take the question back."""
        if text:
            self._messages.append({"role": "assistant", "content": text})
        else:
            self._messages.pop()

    def clear(self) -> None:
        """Forget all messages and pictures."""
        self._messages, self._pictures = [], []

    def save(self, path: Path) -> None:
        """Write the body of a request. Raises ChatError."""
        try:
            path.expanduser().write_text(json.dumps(self.body, indent=1) + "\n", "utf-8")
        except OSError as error:
            raise ChatError(f"cannot write {path}: {error.strerror}") from error


def _converse(talk: Conversation, client: ChatClient) -> bool:
    """Read lines until the end. Returns whether all of them could be answered."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        typer.echo("/help lists commands; Ctrl-C stops an answer, Ctrl-D leaves.", err=True)
    is_clean = True
    while (line := _next_line(is_terminal)) is not None:
        try:
            if line.startswith("/"):
                if not run_command(line, talk):
                    break
            elif line.strip():
                _answer(line, talk, client)
        except ChatError as error:
            typer.echo(f"vlmserve: {error}", err=True)
            is_clean = False
    return is_clean or is_terminal


def _next_line(is_terminal: bool) -> str | None:
    """The next line; None at the end."""
    try:
        return input("> " if is_terminal else "")
    except EOFError:
        return None
    except KeyboardInterrupt:
        typer.echo(err=True)
        return None


def run_command(line: str, talk: Conversation) -> bool:
    """Run a command; False to leave. Raises ChatError."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name in ("/quit", "/exit"):
        return False
    if name == "/image" and rest:
        talk.add_picture(Path(rest))
    elif name == "/system":
        talk.system = rest or None
    elif name == "/save" and rest:
        talk.save(Path(rest))
        typer.echo(f"wrote {rest}", err=True)
    elif name == "/clear":
        talk.clear()
    elif name == "/help":
        typer.echo(HELP, err=True)
    else:
        raise ChatError(f"{name} is no command, or lacks its file: /help lists the commands")
    return True


def _answer(text: str, talk: Conversation, client: ChatClient) -> None:
    """Ask, and print the answer as it comes. Ctrl-C ends it and keeps what is there."""
    talk.ask(text)
    pieces: list[str] = []
    try:
        for piece in client.stream(talk.body):
            pieces.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        typer.echo(" [stopped]", err=True)
    finally:
        if pieces:
            sys.stdout.write("\n")
            sys.stdout.flush()
        talk.answer("".join(pieces))
