"""Routes that do not exist, and other spellings of paths."""

import asyncio

import pytest
from support.http_side import MODEL, ScriptedEngine, client_of, error_of

from vlmserve.server.http.targets import not_found, plain_url


def answers(checkpoint, method, *paths, **settings):
    async def run():
        async with client_of(checkpoint, ScriptedEngine(list), **settings) as client:
            headers = {"Authorization": "Bearer k"} if settings else {}
            return [
                await client.request(method, str(client.base_url) + path, headers=headers)
                for path in paths
            ]

    return asyncio.run(run())


@pytest.mark.parametrize(
    "path",
    [
        "/v1/embeddings", "/v1/audio/speech", "/v1/audio/transcriptions", "/v1/images/generations",
        "/v1/images/edits", "/v1/files", "/v1/batches/b1", "/v1/assistants", "/v1/rerank",
    ],
)  # fmt: skip
def test_a_route_of_other_servers_is_a_404_with_a_sentence(checkpoint, path):
    """It used to be `Requested URL  not found`."""
    (answer,) = answers(checkpoint, "POST", path)
    message = error_of(answer, 404)["message"]
    assert "/".join(path.split("/")[:3]) in message
    assert "is not served: " in message
    assert "/docs" in message


def test_an_unknown_route_is_named_and_points_to_the_docs(checkpoint):
    (answer,) = answers(checkpoint, "GET", "/v1/nothing")
    assert error_of(answer, 404)["message"] == (
        "'/v1/nothing' is not a route of this server: see /docs"
    )
    assert len(not_found("/" + "a" * 9999)) < 300


@pytest.mark.parametrize(
    "path",
    ["/v1/models/", "//v1/models", "/v1//models", "/v1/models//", "/v1/models/?a=b//c",
     "/v1/openai/v1/models"],
)  # fmt: skip
def test_other_spellings_of_a_path_behave_alike(checkpoint, path):
    plain, other = answers(checkpoint, "GET", "/v1/models", path)
    assert plain.status_code == other.status_code == 200
    assert plain.json()["data"][0]["id"] == other.json()["data"][0]["id"] == MODEL


@pytest.mark.parametrize("path", ["//v1/models", "/v1/models/", "/v1//chat//completions"])
def test_a_key_is_needed_however_a_path_is_spelled(checkpoint, path):
    async def run():
        async with client_of(checkpoint, ScriptedEngine(list), api_keys=["k"]) as client:
            return await client.get(str(client.base_url) + path)

    assert asyncio.run(run()).status_code == 401


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (b"/", b"/"), (b"//", b"/"), (b"/a//b/", b"/a/b"), (b"/a?x=//", b"/a?x=//"), (b"*", b"*"),
        (b"/a%2F%2Fb", b"/a%2F%2Fb"), (b"", b""),
    ],
)  # fmt: skip
def test_slashes_are_single(url, expected):
    assert plain_url(url) == expected
