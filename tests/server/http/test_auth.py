"""Who is let in: the rows on keys, hosts and tenants, on every route that there is."""

from __future__ import annotations

import asyncio
import re

import httpx2
import pytest
from support.http_side import (
    MODEL,
    OneTileImages,
    ScriptedEngine,
    all_routes,
    client_of,
    meta_like_tokenizer,
    running_app,
    tokens_one_by_one,
)
from support.invariants import GENERATION_ROUTES, TEXT_ROUTES, body_for

from vlmserve.server.http.auth import ApiKeys, KeyFileError
from vlmserve.server.http.page_files import DOCS_PATHS, UI_PATHS
from vlmserve.server.settings import ServerSettings
from vlmserve.server.worker.app import build_app

TOKENIZER = meta_like_tokenizer()
# The page asks for the key itself; its files are the same on every server.
PROBES = {"/v1/health/live", "/v1/health/ready", "/health"}
OPEN = PROBES | DOCS_PATHS | UI_PATHS
KEYS = ["key-one", "schlüssel"]
HEADERS = {"Authorization": "Bearer key-one"}
PAGE = "https://page.example"


@pytest.fixture
def key_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# team a\nfirst\n\n  second  \n")
    return file


def served(checkpoint, use, **settings):
    """Run `use(client)` against a server, and give what it gives, and the engine."""

    async def run():
        engine = ScriptedEngine(lambda request: list(tokens_one_by_one(TOKENIZER, "What?")))
        async with client_of(checkpoint, engine, **settings) as client:
            return await use(client), engine

    return asyncio.run(run())


def body_of(path, **more):
    body = body_for(path, **more)
    return body | {name: MODEL for name in ("model", "model_id") if name in body}


def with_auth(value):
    return [] if value is None else [(b"authorization", value.encode("utf-8", "surrogateescape"))]


def test_row_41_every_route_of_the_router_needs_the_key_but_live_and_ready(checkpoint):
    routes = all_routes(checkpoint)
    assert {path for _, path in routes} >= {*OPEN, "/metrics", "/v1/models", *TEXT_ROUTES}
    extra = [("GET", "/no-such-route"), ("DELETE", "/v1/models"), ("OPTIONS", "/v1/models")]

    async def use(client):
        return {route: await client.request(*route) for route in [*routes, *extra]}

    answers, engine = served(checkpoint, use, api_keys=KEYS)
    opened = {path for (_, path), answer in answers.items() if answer.status_code != 401}
    assert opened == OPEN
    assert engine.requests == []


def test_row_41_a_route_that_was_added_later_is_closed(checkpoint):
    """A handler that nobody declared open is not reached, whatever its path."""
    reached = []

    async def leak(request):
        reached.append(request.path)

    settings = ServerSettings(
        model=str(checkpoint), engine_socket="", served_model_names=[MODEL], api_keys=KEYS
    )
    engine = ScriptedEngine(lambda request: [])
    app = build_app(settings, engine_client=engine, images=OneTileImages())
    app.add_route(leak, "/v1/health/live/secret", name="below")
    app.add_route(leak, "/secret", name="beside")

    async def run():
        async with running_app(app) as url, httpx2.AsyncClient(base_url=url) as client:
            return [
                (await client.get(path)).status_code
                for path in ("/secret", "/v1/health/live/secret", "/v1/health/live/../secret")
            ]

    assert asyncio.run(run()) == [401, 401, 401]
    assert reached == []


@pytest.mark.parametrize(
    "given",
    [None, "", "Bearer", "Bearer key-on", "Bearer key-one2", "Bearer key-two",
     "Basic key-one", "key-one", "Bearer key-one key-one", "Bearer \udcff\udcfe", "BearerKEY",
     "Bearer " + "k" * 9000],
)  # fmt: skip
def test_row_42_one_401_for_all_that_is_wrong(checkpoint, given):
    async def use(client):
        return {
            path: await client.request(method, path, headers=with_auth(given))
            for method, path in all_routes(checkpoint)
            if path not in OPEN and method != "HEAD"
        }

    answers, _ = served(checkpoint, use, api_keys=KEYS)
    assert {answer.status_code for answer in answers.values()} == {401}
    kept = {"content-type", "content-length", "www-authenticate"}
    seen = {
        # Anthropic's clients read other types of errors.
        (
            path.startswith("/v1/messages"),
            one.content,
            str([(k, v) for k, v in one.headers.items() if k in kept]),
        )
        for path, one in answers.items()
    }
    assert len(seen) == 2
    assert all(one.json()["error"]["code"] == "invalid_api_key" for one in answers.values())


def test_row_42_digests_of_bytes_are_compared_to_the_end_of_the_list(monkeypatch):
    compared = []

    def compare(one, other):
        compared.append((one, other))
        return one == other

    monkeypatch.setattr("vlmserve.server.http.auth.hmac.compare_digest", compare)
    keys = ApiKeys(["a", "b", "schlüssel"])

    class Asked:
        headers = None

    for given, is_known in (("a", True), ("schl\xfcssel", True), ("c" * 5000, False), ("", False)):
        compared.clear()
        asked = Asked()
        asked.headers = OneHeader(f"Bearer {given}")
        assert (keys.find(asked) is not None) is is_known
        assert len(compared) == 3, "a match ends nothing early"
        assert all(type(x) is bytes and len(x) == 32 for pair in compared for x in pair)


class OneHeader:
    def __init__(self, value):
        self._value = value

    def getone(self, name, default=""):
        return self._value if name == "authorization" else default


@pytest.mark.parametrize("key", KEYS)
def test_row_42_any_key_opens_every_route(checkpoint, key):
    async def use(client):
        return [
            (await client.post(path, json=body_of(path), headers=with_auth(f"bearer {key}")))
            for path in TEXT_ROUTES
        ]

    answers, engine = served(checkpoint, use, api_keys=KEYS)
    assert {answer.status_code for answer in answers} == {200}, answers[0].text
    assert len(engine.requests) == len(TEXT_ROUTES)


@pytest.mark.parametrize(
    ("host", "status"),
    [("api.example", 200), ("API.EXAMPLE:8000", 200), ("api.example.", 200), ("[::1]:80", 200),
     ("a.below.example", 200), ("below.example", 400), ("evil.example", 400), ("", 400),
     ("api.example.evil", 400), ("api.example@evil", 400), ("notbelow.example", 400)],
)  # fmt: skip
def test_row_42_a_foreign_host_is_refused_where_hosts_are_configured(checkpoint, host, status):
    async def use(client):
        head = [(b"host", host.encode())]
        answers = [await client.get("/v1/models", headers=head)]
        answers += [
            await client.post(path, json=body_of(path), headers=head) for path in TEXT_ROUTES
        ]
        probes = [(await client.get(path, headers=head)).status_code for path in PROBES]
        return answers, probes

    allowed = ["api.example", "::1", "*.below.example"]
    (answers, probes), _ = served(checkpoint, use, allowed_hosts=allowed)
    assert {answer.status_code for answer in answers} == {status}
    if status == 400:
        assert {answer.json()["object"] for answer in answers} == {"error"}
    if host and "@" not in host:  # which is no host at all, on any route
        assert set(probes) == {200}, "a probe names the address, whatever it is"


def test_row_42_without_hosts_any_is_answered(checkpoint):
    async def use(client):
        return (await client.get("/v1/models", headers={"Host": "anything"})).status_code

    assert served(checkpoint, use)[0] == 200


def test_row_42_the_host_of_an_absolute_target_counts_too(checkpoint):
    async def use(client):
        reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        writer.write(
            b"GET http://evil.example/v1/models HTTP/1.1\r\nHost: api.example\r\n"
            b"Connection: close\r\n\r\n"
        )
        answer = await reader.read()
        writer.close()
        return answer

    answer, _ = served(checkpoint, use, allowed_hosts=["api.example"])
    assert answer.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("stream", [False, True])
def test_row_37_equal_ids_of_clients_never_meet(checkpoint, stream):
    """Twenty requests of one X-Request-Id at once: each has ids of its own in the engine."""

    async def use(client):
        same = {"X-Request-Id": "same", **HEADERS}
        calls = [
            client.post(path, json=body_of(path, stream=stream), headers=same)
            for path in TEXT_ROUTES * 2
        ]
        return await asyncio.gather(*calls)

    answers, engine = served(checkpoint, use, api_keys=KEYS)
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.headers["x-request-id"] for answer in answers} == {"same"}
    ids = [one for request in engine.requests for one in request.answer_ids]
    assert len(set(ids)) == len(ids) == len(answers)
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in ids)


def test_row_37_no_field_of_a_client_becomes_a_cache_key(checkpoint):
    """Same words under other ids, users and cache hints share; the salt alone keeps apart."""
    hints = [
        {}, {"user": "u"}, {"prompt_cache_key": "k"}, {"safety_identifier": "s"},
        {"metadata": {"uuid": "1"}},
    ]  # fmt: skip
    chat = GENERATION_ROUTES[0]

    async def use(client):
        for number, hint in enumerate(hints):
            sent = {**HEADERS, "X-Request-Id": f"id-{number}"}
            answer = await client.post(chat, json=body_of(chat) | hint, headers=sent)
            assert answer.status_code == 200, answer.text

    _, engine = served(checkpoint, use, api_keys=KEYS)
    assert len({request.tenant for request in engine.requests}) == 1


def test_row_38_tenants_follow_the_key_on_every_route(checkpoint):
    async def use(client):
        for path in TEXT_ROUTES:
            for key in KEYS:
                sent = with_auth(f"Bearer {key}")
                answer = await client.post(path, json=body_of(path), headers=sent)
                assert answer.status_code == 200, answer.text

    _, engine = served(checkpoint, use, api_keys=KEYS)
    tenants = [request.tenant for request in engine.requests]
    assert tenants == tenants[:2] * len(TEXT_ROUTES)
    assert tenants[0] != tenants[1]
    assert not any(key in tenant for key in KEYS for tenant in tenants)


def test_row_38_without_keys_whatever_a_client_sends_is_no_tenant(checkpoint):
    async def use(client):
        for key in ("a", "b"):
            sent = with_auth(f"Bearer {key}")
            for path in TEXT_ROUTES:
                await client.post(path, json=body_of(path), headers=sent)

    _, engine = served(checkpoint, use)
    assert {request.tenant for request in engine.requests} == {""}


# The key file


def test_a_key_file_has_a_key_a_line_and_comments(key_file, checkpoint):
    async def use(client):
        keys = ("first", "second", "# team a", "team", "third")
        sent = [{"Authorization": f"Bearer {key}"} for key in keys]
        return [(await client.get("/v1/models", headers=one)).status_code for one in sent]

    statuses, _ = served(checkpoint, use, api_key_file=str(key_file))
    assert statuses == [200, 200, 401, 401, 401]


def test_a_reload_takes_new_keys_and_drops_old_ones(key_file, checkpoint):
    settings = ServerSettings(
        model=str(checkpoint), engine_socket="", served_model_names=[MODEL],
        api_key_file=str(key_file), api_keys=["given"],
    )  # fmt: skip
    engine = ScriptedEngine(lambda request: [])
    app = build_app(settings, engine_client=engine, images=OneTileImages())

    async def run():
        async with running_app(app) as url, httpx2.AsyncClient(base_url=url) as client:

            async def statuses():
                sent = [{"Authorization": f"Bearer {key}"} for key in ("first", "third", "given")]
                return [(await client.get("/v1/models", headers=one)).status_code for one in sent]

            before = await statuses()
            key_file.write_text("third\n")
            app.ctx.access.keys.reload()
            return before, await statuses()

    before, after = asyncio.run(run())
    assert before == [200, 401, 200]
    assert after == [401, 200, 200]


@pytest.mark.parametrize("content", [b"", b"# none\n", b"\xff\xfe", b"two words\n", None])
def test_a_key_file_that_does_not_serve_never_opens_the_server(key_file, content, caplog):
    keys = ApiKeys([], key_file)
    if content is None:
        key_file.unlink()
    else:
        key_file.write_bytes(content)
    keys.reload()
    assert keys.are_needed
    asked = type("Asked", (), {"headers": OneHeader("Bearer first")})
    assert keys.find(asked) is not None, "the keys stay as they were"
    assert "kept the present API keys" in caplog.text
    assert "words" not in caplog.text
    with pytest.raises(KeyFileError):
        ApiKeys([], key_file)


# Browsers


def test_cors_is_off_unless_it_is_set(checkpoint):
    async def use(client):
        answer = await client.get("/v1/models", headers={"Origin": PAGE})
        asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
        return answer, await client.options("/v1/models", headers=asked)

    (answer, preflight), _ = served(checkpoint, use)
    assert preflight.status_code == 405
    for one in (answer, preflight):
        assert not [name for name in one.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("origins", "told"), [([PAGE, "http://other"], PAGE), (["*"], "*"), ([PAGE.upper()], PAGE)]
)
def test_a_page_of_an_allowed_origin_may_read_answers_errors_and_streams(checkpoint, origins, told):
    chat = GENERATION_ROUTES[0]

    async def use(client):
        page = {"Origin": PAGE, **HEADERS}
        return [
            await client.get("/v1/models", headers=page),
            await client.get("/nothing", headers=page),
            await client.post(chat, content=b"{", headers=page),
            await client.post(chat, json=body_of(chat), headers=page),
            await client.post(chat, json=body_of(chat, stream=True), headers=page),
            await client.get("/v1/models", headers={"Origin": PAGE}),
        ]

    answers, _ = served(checkpoint, use, api_keys=KEYS, cors_origins=origins)
    assert [answer.status_code for answer in answers] == [200, 404, 400, 200, 200, 401]
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == told
        assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in answer.headers
        assert ("Origin" in answer.headers.get("vary", "")) is (origins != ["*"])


@pytest.mark.parametrize("path", ["/v1/models", *GENERATION_ROUTES, "/nothing"])
def test_a_preflight_is_answered_without_a_key(checkpoint, path):
    async def use(client):
        asked = {
            "Origin": PAGE,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type, x-stainless-os",
        }
        return await client.options(path, headers=asked)

    answer, engine = served(checkpoint, use, api_keys=KEYS, cors_origins=[PAGE])
    assert (answer.status_code, answer.content) == (204, b"")
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "POST" in answer.headers["access-control-allow-methods"]
    wanted = "authorization, content-type, x-stainless-os"
    assert answer.headers["access-control-allow-headers"] == wanted
    assert answer.headers["access-control-max-age"] == "600"
    assert "Origin" in answer.headers["vary"]
    assert engine.requests == []


@pytest.mark.parametrize("origin", ["https://evil.example", "null", PAGE + ".evil", ""])
def test_another_page_is_told_nothing(checkpoint, origin):
    async def use(client):
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        return [
            await client.options("/v1/models", headers=asked),
            await client.get("/v1/models", headers={"Origin": origin, **HEADERS}),
        ]

    answers, _ = served(checkpoint, use, api_keys=KEYS, cors_origins=[PAGE])
    assert [answer.status_code for answer in answers] == [401, 200]
    for answer in answers:
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert "Origin" in answer.headers["vary"]


def test_a_preflight_with_odd_header_names_gets_none(checkpoint):
    async def use(client):
        asked = [
            (b"Origin", PAGE.encode()),
            (b"Access-Control-Request-Method", b"POST"),
            (b"Access-Control-Request-Headers", b"a; b=(c)"),
        ]
        return await client.options("/v1/models", headers=asked)

    answer, _ = served(checkpoint, use, cors_origins=[PAGE])
    assert answer.status_code == 204
    assert "access-control-allow-headers" not in answer.headers


# Request ids


def test_every_answer_carries_its_request_id(checkpoint):
    chat = GENERATION_ROUTES[0]

    async def use(client):
        sent = {**HEADERS, "X-Request-Id": "mine-1"}
        return [
            await client.get("/v1/models", headers=sent),
            await client.get("/nothing", headers=sent),
            await client.get(chat, headers=sent),
            await client.post(chat, content=b"{", headers=sent),
            await client.post(chat, json=body_of(chat), headers=sent),
            await client.post(chat, json=body_of(chat, stream=True), headers=sent),
            await client.get("/v1/models", headers={"X-Request-Id": "mine-1"}),
            await client.options(
                chat,
                headers={**sent, "Origin": PAGE, "Access-Control-Request-Method": "POST"},
            ),
        ]

    answers, _ = served(checkpoint, use, api_keys=KEYS, cors_origins=[PAGE])
    statuses = [200, 404, 405, 400, 200, 200, 401, 204]
    assert [answer.status_code for answer in answers] == statuses
    assert {answer.headers["x-request-id"] for answer in answers} == {"mine-1"}


def test_a_head_that_nobody_can_read_gets_an_id_of_its_own(checkpoint):
    async def use(client):
        reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        writer.write(b"GARBAGE\r\n\r\n")
        answer = await reader.read()
        writer.close()
        return answer

    answer, _ = served(checkpoint, use)
    assert re.search(rb"(?i)x-request-id: [0-9a-f]{32}\r\n", answer)
