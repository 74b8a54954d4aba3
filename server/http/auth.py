"""Who may ask: API keys, the hosts that this server answers for, and browsers' pages.

Owns the comparison of keys and their file, the allowlist of hosts, and CORS. All of it is
judged from a request's head, before routing, so that a new route is closed until it is opened
here. Knows nothing of heads' shapes, bodies or what a route does.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from sanic import HTTPResponse, Request

from ..errors import AuthenticationError, BadRequestError
from ..settings import ServerSettings

logger = logging.getLogger(__name__)

LIVE = "/v1/health/live"
READY = "/v1/health/ready"
# The only routes that need no key, and that answer under any host: probes name neither.
OPEN_PATHS = frozenset({LIVE, READY})

PREFLIGHT_MAX_AGE_S = 600
ALLOWED_METHODS = "GET, HEAD, POST"
EXPOSED_HEADERS = "X-Request-Id, Retry-After"
_HEADER_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+(?:\s*,\s*[A-Za-z0-9!#$%&'*+.^_`|~-]+)*")


class KeyFileError(ValueError):
    """The key file does not serve; the message is one line for the operator, without a key."""


class PreflightAnswer(Exception):
    """Raised to answer a browser's preflight before routing, which knows no OPTIONS."""

    def __init__(self, headers: dict[str, str]) -> None:
        super().__init__("a preflight request")
        self.headers = headers


class ApiKeys:
    """The keys that open the routes: given ones, and those of a file that `reload` reads again.

    Only digests are kept. With a file, a key is needed even where it holds none.
    """

    def __init__(self, keys: Sequence[str], file: Path | None = None) -> None:
        """Raises KeyFileError."""
        self._given = _digests(keys)
        self._file = file
        self._of_file: tuple[bytes, ...] = ()
        if file is not None:
            self._of_file = _digests(read_key_file(file))

    @property
    def are_needed(self) -> bool:
        return bool(self._given) or self._file is not None

    def reload(self) -> None:
        """Read the file again; one that does not serve leaves the keys as they are."""
        if self._file is None:
            return
        try:
            self._of_file = _digests(read_key_file(self._file))
        except KeyFileError as error:
            logger.error("the API keys stay as they were: %s", error)
            return
        logger.info("the API keys were read again: the file holds %d", len(self._of_file))

    def owner_of(self, request: Request) -> bytes | None:
        """The digest of the request's key, None where it has none that is known.

        The digests of all keys are compared to their end: time tells neither which key was
        nearly right nor how long the known ones are.
        """
        scheme, _, key = request.headers.getone("authorization", "").partition(" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in (*self._given, *self._of_file)]
        return digest if any(matches) and scheme.lower() == "bearer" else None


class Access:
    """Checks each request before it is routed, and marks the answers that pages may read."""

    def __init__(self, settings: ServerSettings) -> None:
        """Raises KeyFileError."""
        file = None if settings.api_key_file is None else Path(settings.api_key_file)
        self.keys = ApiKeys(settings.api_keys, file)
        self._hosts = [host.lower() for host in settings.allowed_hosts]
        self._origins = frozenset(origin.lower() for origin in settings.cors_origins)

    def check(self, request: Request) -> None:
        """Raises BadRequestError, AuthenticationError or PreflightAnswer."""
        if request.path not in OPEN_PATHS:
            self._check_host(request)
        self._answer_preflight(request)
        if request.path in OPEN_PATHS or not self.keys.are_needed:
            return
        owner = self.keys.owner_of(request)
        if owner is None:
            raise AuthenticationError(
                "a valid API key is required: send it as 'Authorization: Bearer KEY'"
            )
        request.ctx.key_owner = owner

    def mark(self, request: Request, response: HTTPResponse) -> None:
        """Add what lets a page of an allowed origin read this answer, an error or stream too."""
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
            raise BadRequestError("this server does not answer for the host that was asked for")

    def _answer_preflight(self, request: Request) -> None:
        """A preflight carries no key: it asks only whether the page may send one."""
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
        # Named one by one: '*' would not cover Authorization.
        if _HEADER_NAMES.fullmatch(wanted):
            headers["Access-Control-Allow-Headers"] = wanted
        raise PreflightAnswer(headers)

    def _allowed_origin(self, request: Request) -> str | None:
        """What the answer allows, None for a request of no page or of a foreign one."""
        origin = str(request.headers.getone("origin", ""))
        if not origin:
            return None
        if "*" in self._origins:
            return "*"
        return origin if origin.lower() in self._origins else None


def read_key_file(file: Path) -> list[str]:
    """The keys of a file: one a line; blank lines and those that begin with # are passed over.

    Raises KeyFileError, which names the line and never its text.
    """
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise KeyFileError(f"the API key file cannot be read: {reason}") from error
    keys = []
    for number, line in enumerate(lines, 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if len(key.split()) > 1:
            raise KeyFileError(f"line {number} of the API key file holds a blank inside its key")
        keys.append(key)
    if not keys:
        raise KeyFileError("the API key file holds no key: write one a line")
    return keys


def _digests(keys: Iterable[str]) -> tuple[bytes, ...]:
    return tuple(map(_digest, keys))


def _digest(key: str) -> bytes:
    # As the header's bytes were, whatever they were: Sanic decodes them in the same way.
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def _host_of(authority: str) -> str:
    """The host of `host:port`, in lower case, an IPv6 address without its brackets."""
    if authority.startswith("["):
        return authority[1:].partition("]")[0].lower()
    return authority.partition(":")[0].lower().rstrip(".")


def _host_of_url(url: bytes) -> str:
    try:
        return (urlsplit(url.decode("ascii")).hostname or "").rstrip(".")
    except ValueError:
        return ""


def _matches(host: str, allowed: Iterable[str]) -> bool:
    """Whether a host is one of those allowed; `*.example.com` allows every name below it."""
    return any(
        host.endswith(one[1:]) and len(host) >= len(one) if one.startswith("*.") else host == one
        for one in allowed
    )


def _vary_by(response: HTTPResponse, name: str) -> None:
    present = response.headers.get("Vary")
    response.headers["Vary"] = f"{present}, {name}" if present else name
