"""A small checkpoint, a scripted engine and a running server, for tests.

Owns what several test files share. No test, and nothing that serves, imports
torch through it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import msgspec
from support.quick_routes import share_compiled_routes
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from vlmserve.models.batch import AdapterInfo, AdapterRef, ImageTiles
from vlmserve.router.errors import AdapterUnusableError, EngineError, QueueFullError
from vlmserve.router.messages import AddRequest, EngineReady, EngineStats, SequenceOutput
from vlmserve.server.http.protocol import StrictProtocol
from vlmserve.server.images.settings import ImageRequest
from vlmserve.server.settings import ServerSettings
from vlmserve.server.worker.app import build_app

share_compiled_routes()
NUM_SERVERS_BEFORE = itertools.count()
CLIENT_DEADLINE_S = 120.0
# Reading the system's authorities takes a third of a client's start.
NO_AUTHORITIES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
MODEL = "meta/llama-3.2-11b-vision-instruct"

# The ids that Meta's tokenizer gives to the words and marks of the known prompts.
META_IDS = {
    "user": 882, "assistant": 78191, "system": 9125, "ĊĊ": 271, "What": 3923, "Ġis": 374,
    "Ġin": 304, "Ġthis": 420, "Ġimage": 2217, "?": 30, "You": 2675, "Ġare": 527, "Ġa": 264,
    "Ġhelpful": 11190, "Ġassistant": 18328, ".": 13,
}  # fmt: skip
SPECIAL_IDS = {
    "<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|finetune_right_pad_id|>": 128004,
    "<|start_header_id|>": 128006, "<|end_header_id|>": 128007, "<|eom_id|>": 128008,
    "<|eot_id|>": 128009, "<|python_tag|>": 128010, "<|image|>": 128256,
}  # fmt: skip
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def meta_like_tokenizer() -> Tokenizer:
    """A byte-level tokenizer that gives Meta's ids to the words of the known prompts."""
    words = [word.replace("Ġ", " ").replace("Ċ", "\n") for word in META_IDS]
    trained = _untrained(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(words, trainer)
    model = json.loads(trained.to_str())["model"]
    vocab = {token: META_IDS.get(token, 100_000 + id) for token, id in model["vocab"].items()}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = _untrained(models.BPE(vocab=vocab | SPECIAL_IDS, merges=merges))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_IDS])
    return tokenizer


def _untrained(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


# The published template, less its parts for tools.
LLAMA_TEMPLATE = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{%- set image_ns = namespace(has_images=false) %}
{%- for message in messages %}
    {%- for content in message['content'] %}
        {%- if content['type'] == 'image' %}
            {%- set image_ns.has_images = true %}
        {%- endif %}
    {%- endfor %}
{%- endfor %}
{%- if image_ns.has_images and not system_message == "" %}
    {{- raise_exception("Prompting with images is incompatible with system messages.") }}
{%- endif %}
{%- if not image_ns.has_images %}
    {{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
    {{- "Cutting Knowledge Date: December 2023\\n" }}
    {{- "Today Date: " + date_string + "\\n\\n" }}
    {{- system_message }}
    {{- "<|eot_id|>" }}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for content in message['content'] %}
            {%- if content['type'] == 'image' %}
                {{- '<|image|>' }}
            {%- elif content['type'] == 'text' %}
                {{- content['text'] }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


PUBLISHED = "as published"


def write_checkpoint(folder: Path, template: str | None = PUBLISHED) -> Path:
    """Write the files of a checkpoint that an HTTP worker reads: all but the weights.

    template: by default one that treats messages and tools as the published one does.
    """
    from .tool_template import TOOL_TEMPLATE  # made from this file's

    folder.mkdir(parents=True, exist_ok=True)
    meta_like_tokenizer().save(str(folder / "tokenizer.json"))
    files: dict[str, Any] = {
        "tokenizer_config.json": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        "generation_config.json": {"eos_token_id": [128001, 128008, 128009]},
        "config.json": {"text_config": {"max_position_embeddings": 131072}},
        "preprocessor_config.json": {
            "size": {"height": 56, "width": 56},
            "max_image_tiles": 4,
            "resample": 2,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), "utf-8")
    if template is not None:
        text = TOOL_TEMPLATE if template == PUBLISHED else template
        (folder / "chat_template.jinja").write_text(text, "utf-8")
    return folder


Script = Callable[[AddRequest], Sequence[SequenceOutput | EngineError | float]]


class ScriptedEngine:
    """An engine client that answers by a script.

    A script's SequenceOutputs are sent, its errors raised, its numbers slept.
    `requests` keeps what came in, `aborted` the ids of requests left before their end.
    """

    def __init__(self, script: Script, *, max_model_len: int = 131072) -> None:
        self.script = script
        self.is_ready = True
        self.heartbeat_age_s = 0.1
        self.stall_s = 0.0
        self.may_compile = False
        self.stats = EngineStats(num_running=1, text_blocks_used=1, text_blocks_total=4)
        self.refused: QueueFullError | None = None
        self.requests: list[AddRequest] = []
        self.aborted: list[str] = []
        self.loaded: list[AdapterRef] = []
        self.unloaded: list[str] = []
        self.open: set[str] = set()
        self.info: EngineReady | None = EngineReady(
            pid=1,
            max_model_len=max_model_len,
            vocab_size=128264,
            max_num_seqs=64,
            device="cpu",
            dtype="float32",
            num_text_tokens=4096,
            num_image_tiles=64,
        )

    async def generate(self, *requests: AddRequest) -> AsyncIterator[SequenceOutput]:
        """The script's outputs for these requests, one after the other."""
        # As over a real wire: what cannot be encoded never arrives.
        msgspec.msgpack.encode(requests)
        self.requests += requests
        self.open |= {choice_id for request in requests for choice_id in request.answer_ids}
        try:
            for request in requests:
                async for output in self._outputs(request):
                    yield output
        finally:
            for request in requests:
                for request_id in request.answer_ids:
                    self.leave(request_id)

    def rejection(self, owner: str, priority: int) -> QueueFullError | None:
        """What a test says."""
        return self.refused

    async def _outputs(self, request: AddRequest) -> AsyncIterator[SequenceOutput]:
        for item in self.script(request):
            if isinstance(item, EngineError):
                self.open -= set(request.answer_ids)
                raise item
            if isinstance(item, SequenceOutput):
                # A script names a choice by its number; without one it is the first.
                choice = int(item.request_id) if item.request_id.isdigit() else 0
                request_id = request.answer_ids[choice]
                if request_id not in self.open:
                    continue
                if item.finish_reason is not None:
                    self.open.discard(request_id)
                yield msgspec.structs.replace(item, request_id=request_id)
            else:
                await asyncio.sleep(item)

    async def load_adapter(self, adapter: AdapterRef) -> AdapterInfo:
        """Keep the adapter; those named broken cannot be used."""
        if "broken" in adapter.name:
            raise AdapterUnusableError("adapter_model.safetensors: it is broken")
        self.loaded.append(adapter)
        return AdapterInfo(4, 10, changes_text=True, changes_images=False)

    async def unload_adapter(self, digest: str) -> None:
        """Keep the digest."""
        self.unloaded.append(digest)

    def leave(self, request_id: str) -> None:
        """Keep the id of a request that is left before its end."""
        if request_id in self.open:
            self.open.remove(request_id)
            self.aborted.append(request_id)


class OneTileImages:
    """An image loader that gives one tile for whatever URL, and keeps the URLs."""

    def __init__(self) -> None:
        self.requests: list[ImageRequest] = []

    async def load(
        self, images: Sequence[ImageRequest], deadline: float | None = None
    ) -> list[ImageTiles]:
        """A tile of one pixel for each image."""
        self.requests += images
        return [
            ImageTiles(
                data=b"\0\0\0",
                num_tiles=1,
                tile_size=1,
                aspect_ratio_id=1,
                content_hash=image.url.encode()[:32],
            )
            for image in images
        ]


def tokens_one_by_one(
    tokenizer: Tokenizer, text: str, finish_reason: str | None = "stop", end: int = 128009
) -> Iterator[SequenceOutput]:
    """The outputs of an engine that answers with `text`, a token a step, then its end.

    A finish_reason None leaves the answer open.
    """
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids
    if finish_reason == "stop":
        token_ids = [*token_ids, end]
    for number, token_id in enumerate(token_ids, 1):
        is_last = number == len(token_ids)
        yield msgspec.convert(
            {
                "request_id": "r",
                "token_ids": [token_id],
                "finish_reason": finish_reason if is_last else None,
            },
            SequenceOutput,
        )


@asynccontextmanager
async def running_server(
    settings: ServerSettings, *, tls: ssl.SSLContext | None = None, **parts: Any
) -> AsyncIterator[str]:
    """A real server on a free loopback port, in this event loop; gives its base URL."""
    app = build_app(settings, **parts)
    async with running_app(app, tls, touches_up=next(NUM_SERVERS_BEFORE) == 0) as url:
        yield url


@asynccontextmanager
async def running_app(
    app: Any, tls: ssl.SSLContext | None = None, *, touches_up: bool = False
) -> AsyncIterator[str]:
    """The same of an application that was built before.

    touches_up: Sanic rewrites its classes without the signals that this application does not use,
    for all of the process. Every worker's uses the same, so the first one does it for the others.
    """
    app.config.TOUCHUP = touches_up
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = await app.create_server(
            sock=listening, ssl=tls, protocol=StrictProtocol, return_asyncio_server=True
        )
        assert server is not None, "sanic gives a server when asked to"
        await server.startup()
        await server.before_start()
        await server.start_serving()
        try:
            scheme = "https" if tls else "http"
            yield f"{scheme}://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.close()
            await server.wait_closed()
            await server.after_stop()


@asynccontextmanager
async def client_of(
    checkpoint: Path, engine: Any, *, images: Any = None, **settings: Any
) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a server on these parts, for CLIENT_DEADLINE_S at most."""
    fields = {"served_model_names": [MODEL]} | settings
    options = ServerSettings(model=str(checkpoint), engine_socket="", **fields)
    async with (
        asyncio.timeout(CLIENT_DEADLINE_S),
        running_server(options, engine_client=engine, images=images or OneTileImages()) as url,
        httpx2.AsyncClient(
            base_url=url, timeout=CLIENT_DEADLINE_S, verify=NO_AUTHORITIES
        ) as client,
    ):
        yield client


def error_of(response: httpx2.Response, status: int) -> dict[str, Any]:
    """The error of an answer, checked to be there in both documented forms."""
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["error", "object", "message", "type", "param", "code"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert (body["object"], body["code"]) == ("error", status)
    for key in ("message", "param"):
        assert body[key] == body["error"][key]
    # Anthropic's form names the body itself an error.
    is_anthropic = response.request.url.path.startswith("/v1/messages")
    assert body["type"] == ("error" if is_anthropic else body["error"]["type"])
    error: dict[str, Any] = body["error"]
    return error


def frames_of(response: httpx2.Response) -> list[str]:
    """The contents of the `data:` frames; comments are left out."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    frames = [part for part in response.text.split("\n\n") if part and not part.startswith(":")]
    assert all(frame.startswith("data: ") for frame in frames)
    return [frame.removeprefix("data: ") for frame in frames]


def all_routes(checkpoint, **settings):
    """Each (method, path) of the app's router, so that none is forgotten that is added later."""
    options = ServerSettings(
        model=str(checkpoint), engine_socket="", served_model_names=[MODEL], **settings
    )
    app = build_app(options)
    found = set()
    for route in app.router.routes:
        path = "/" + re.sub(r"<[^>]*>", "x", route.path)
        found |= {(method, path) for method in route.methods}
    return sorted(found)
