"""TLS of the listening socket, for a server without a proxy in front of it.

Owns the certificate and its reload. Knows nothing of requests.
"""

from __future__ import annotations

import logging
import ssl

logger = logging.getLogger(__name__)


class TlsError(ValueError):
    """The certificate or key is unusable; the message is one line for the operator."""


class ServerTls:
    """A TLS context of `certfile`, which `reload` reads again. Raises TlsError."""

    def __init__(self, certfile: str, keyfile: str | None) -> None:
        """keyfile None: certfile contains the key."""
        self._files = certfile, keyfile
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._load(self.context)

    def reload(self) -> None:
        """Read the files again for new connections. If unusable, log why and keep the present."""
        try:
            # Tried in a separate context first: a half-read pair would fail every handshake.
            self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
            self._load(self.context)
        except TlsError as error:
            logger.error("kept the present TLS certificate: %s", error)
            return
        logger.info("reloaded the TLS certificate")

    def _load(self, context: ssl.SSLContext) -> None:
        try:
            # Never ask for a password: a worker has no terminal.
            context.load_cert_chain(*self._files, password=_no_password)
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            raise TlsError(f"the TLS certificate and key cannot be used: {reason}") from error


def _no_password() -> bytes:
    raise ValueError("the key has a password: use a key without one")
