"""What a request's head must carry before its body is read: host, API key, plain encoding.

Owns the valid API keys, the allowed hosts, CORS, and the order of these checks. All
run before routing, so a new route needs a key unless OPEN_PATHS names it. Knows nothing of how
a head is parsed, of bodies, or of what a route does.
"""

from __future__ import annotations

import hmac
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from sanic import HTTPResponse, Request

from ..admission.key_file import (
    ApiKey,
    KeyFileError,
    digest_of,
    owner_of_digest,
    read_key_file,
)
from ..admission.rate_limits import FOLDER_NAME, RateLimits
from ..errors import AuthenticationError, BadRequestError, NotFoundError, UnsupportedMediaError
from ..settings import ServerSettings
from .page_files import DOCS_PATHS, UI_PATHS

logger = logging.getLogger(__name__)

LIVE = "/v1/health/live"
READY = "/v1/health/ready"
# The path of other inference servers, and what routers ask before they know a key.
SHORT_READY = "/health"
# The only routes that need no key and answer for any host: health probes send neither.
OPEN_PATHS = frozenset({LIVE, READY, SHORT_READY})
METRICS_PATHS = frozenset({"/metrics", "/v1/metrics"})
# What --metrics-port serves, to any host and without a key: probes and scrapers send neither.
PROBE_PATHS = OPEN_PATHS | METRICS_PATHS
# /openapi.json, which names the models, needs the key.
KEYLESS_PATHS = OPEN_PATHS | DOCS_PATHS | UI_PATHS

PREFLIGHT_MAX_AGE_S = 600
ALLOWED_METHODS = "GET, HEAD, POST"
RATE_HEADERS = [
    f"X-RateLimit-{part}-{what}"
    for what in ("Requests", "Tokens")
    for part in ("Limit", "Remaining", "Reset")
]
EXPOSED_HEADERS = ", ".join(
    [
        "X-Request-Id",
        "X-Ignored-Fields",
        "X-Replica",
        "X-Image-Digests",
        "Retry-After",
        *RATE_HEADERS,
    ]
)
_HEADER_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+(?:\s*,\s*[A-Za-z0-9!#$%&'*+.^_`|~-]+)*")


def open_paths(settings: ServerSettings) -> frozenset[str]:
    """The paths that need no key and answer for any host."""
    return PROBE_PATHS if settings.open_metrics else OPEN_PATHS


def keyless_paths(settings: ServerSettings) -> frozenset[str]:
    """The paths that need no key."""
    return KEYLESS_PATHS | open_paths(settings)


class PreflightAnswer(Exception):
    """Raised to answer a browser's preflight before routing: no route takes OPTIONS."""

    def __init__(self, headers: dict[str, str]) -> None:
        super().__init__("a preflight request")
        self.headers = headers


class ApiKeys:
    """The valid API keys: given ones, and those of a file, which `reload` reads again.

    Stores digests only. With a file, requests need a key even if the file is empty. A key that is
    given and also in the file has the file's attributes.
    """

    def __init__(self, keys: Sequence[str], file: Path | None = None) -> None:
        """Raises KeyFileError."""
        self._given = [ApiKey(digest_of(key)) for key in keys]
        self._file = file
        self._known: dict[bytes, ApiKey] = {}
        self._by_owner: dict[str, ApiKey] = {}
        self._set([] if file is None else read_key_file(file))

    @property
    def are_needed(self) -> bool:
        return bool(self._given) or self._file is not None

    def reload(self) -> None:
        """Read the file again. If it is unusable, log why and keep the present keys."""
        if self._file is None:
            return
        try:
            keys = read_key_file(self._file)
        except KeyFileError as error:
            logger.error("kept the present API keys: %s", error)
            return
        self._set(keys)
        logger.info("reloaded the API key file: %d keys", len(keys))

    def _set(self, keys: Iterable[ApiKey]) -> None:
        self._known = {key.digest: key for key in (*self._given, *keys)}
        self._by_owner = {owner_of_digest(key.digest): key for key in self._known.values()}

    def weight_of(self, owner: str) -> float:
        """The weight of an owner; 1 for requests without a key, or with a key that is gone."""
        key = self._by_owner.get(owner)
        return 1.0 if key is None else key.policy.weight

    def find(self, request: Request) -> ApiKey | None:
        """The request's key; None if it is missing or unknown.

        Compares the digests of all keys completely. So the response time shows neither which
        key was nearly right nor how long the valid ones are.
        """
        scheme, _, key = request.headers.getone("authorization", "").partition(" ")
        if not scheme:
            # Anthropic's clients.
            scheme, key = "bearer", request.headers.getone("x-api-key", "")
        digest = digest_of(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._known]
        return self._known[digest] if any(matches) and scheme.lower() == "bearer" else None


class Access:
    """Checks each request before it is routed, and adds the CORS headers to its answer."""

    def __init__(self, settings: ServerSettings) -> None:
        """Raises KeyFileError."""
        file = None if settings.api_key_file is None else Path(settings.api_key_file)
        self.keys = ApiKeys(settings.api_keys, file)
        shared = shared_folder(settings)
        self.rate_limits = RateLimits(None if shared is None else shared / FOLDER_NAME)
        self._hosts = [host.lower() for host in settings.allowed_hosts]
        self._open_paths = open_paths(settings)
        self._keyless_paths = keyless_paths(settings)
        self._origins = frozenset(origin.lower() for origin in settings.cors_origins)

    def check(self, request: Request) -> None:
        """Check host, key and encoding by the head alone, for every path.

        Sets `request.ctx.key` where a key is needed, and `key_owner`, its digest. The connection
        closes after an error, because the body was not read.
        Raises BadRequestError, PreflightAnswer, AuthenticationError, NotFoundError or
        UnsupportedMediaError.
        """
        if getattr(request.protocol, "is_probe_port", False):
            _check_probe(request)
            return
        if request.path not in self._open_paths:
            self._check_host(request)
        self._answer_preflight(request)
        if request.path not in self._keyless_paths and self.keys.are_needed:
            self._check_key(request)
        _check_encoding(request)

    def _check_key(self, request: Request) -> None:
        key = self.keys.find(request)
        if key is None:
            raise AuthenticationError(
                "a valid API key is required: send it as 'Authorization: Bearer KEY' or as"
                " 'X-Api-Key: KEY'"
            )
        request.ctx.key = key
        request.ctx.key_owner = key.digest

    def mark(self, request: Request, response: HTTPResponse) -> None:
        """Add what is left of the key's rates, and the headers that let a page read the answer."""
        key: ApiKey | None = getattr(request.ctx, "key", None)
        if key is not None:
            response.headers.update(self.rate_limits.headers(key))
        if not self._origins:
            return
        if "*" not in self._origins:
            _vary_by(response, "Origin")
        origin = self._allowed_origin(request)
        if origin is not None:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = EXPOSED_HEADERS

    def _check_host(self, request: Request) -> None:
        if not self._hosts:
            return
        named = [_host_of(request.headers.getone("host", ""))]
        if not request.raw_url.startswith((b"/", b"*")):
            named.append(_host_of_url(request.raw_url))
        if not all(_matches(host, self._hosts) for host in named):
            raise BadRequestError("this server does not answer for the requested host")

    def _answer_preflight(self, request: Request) -> None:
        """Answer a browser's question whether a page may send a request. It carries no key."""
        if request.method != "OPTIONS" or not self._origins:
            return
        method = request.headers.getone("access-control-request-method", "")
        if not method or self._allowed_origin(request) is None:
            return
        headers = {
            "Access-Control-Allow-Methods": ALLOWED_METHODS,
            "Access-Control-Max-Age": str(PREFLIGHT_MAX_AGE_S),
            "Vary": "Access-Control-Request-Headers",
        }
        wanted = request.headers.getone("access-control-request-headers", "").strip()
        # Each header is named: '*' would not cover Authorization.
        if _HEADER_NAMES.fullmatch(wanted):
            headers["Access-Control-Allow-Headers"] = wanted
        raise PreflightAnswer(headers)

    def _allowed_origin(self, request: Request) -> str | None:
        """The allowed origin; None for a request without an origin or from another one."""
        origin = str(request.headers.getone("origin", ""))
        if not origin:
            return None
        if "*" in self._origins:
            return "*"
        return origin if origin.lower() in self._origins else None


def _check_probe(request: Request) -> None:
    if request.path not in PROBE_PATHS:
        raise NotFoundError(
            f"{request.path} is not served on the port of --metrics-port, only"
            f" {', '.join(sorted(PROBE_PATHS))}"
        )
    _check_encoding(request)


def shared_folder(settings: ServerSettings) -> Path | None:
    """The folder that all workers share, with the engine's socket; None without an engine."""
    return Path(settings.engine_socket).parent if settings.engine_socket else None


def _host_of(authority: str) -> str:
    """The host of `host:port` in lower case; an IPv6 address without its brackets."""
    if authority.startswith("["):
        return authority[1:].partition("]")[0].lower()
    return authority.partition(":")[0].lower().rstrip(".")


def _host_of_url(url: bytes) -> str:
    try:
        return (urlsplit(url.decode("ascii")).hostname or "").rstrip(".")
    except ValueError:
        return ""


def _matches(host: str, allowed: Iterable[str]) -> bool:
    """Whether a host is allowed; `*.example.com` allows every name below example.com."""
    return any(
        host.endswith(name[1:]) and len(host) >= len(name)
        if name.startswith("*.")
        else host == name
        for name in allowed
    )


def _vary_by(response: HTTPResponse, name: str) -> None:
    present = response.headers.get("Vary")
    response.headers["Vary"] = f"{present}, {name}" if present else name


def _check_encoding(request: Request) -> None:
    encoding = request.headers.getone("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise UnsupportedMediaError(
            "compressed request bodies are not supported: send the body uncompressed"
        )
