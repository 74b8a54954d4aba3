"""TLS of the listening socket, for a server without a proxy in front of it.

Owns the certificate and its reading again. Knows nothing of requests.
"""

from __future__ import annotations

import logging
import ssl

logger = logging.getLogger(__name__)


class TlsError(ValueError):
    """Certificate and key do not serve; the message is one line for the operator."""


class ServerTls:
    """A context that serves `certfile`, which `reload` reads again. Raises TlsError."""

    def __init__(self, certfile: str, keyfile: str | None) -> None:
        """keyfile None: the key stands in certfile."""
        self._files = certfile, keyfile
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._load(self.context)

    def reload(self) -> None:
        """Serve the files' present content to new connections; what does not serve is left."""
        try:
            # Tried elsewhere first: a half-read pair would end every handshake.
            self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
            self._load(self.context)
        except TlsError as error:
            logger.error("the certificate stays as it was: %s", error)
            return
        logger.info("the certificate was read again")

    def _load(self, context: ssl.SSLContext) -> None:
        try:
            # A password is never asked for: nobody sits at the worker's terminal.
            context.load_cert_chain(*self._files, password=_no_password)
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            raise TlsError(f"the TLS certificate and key cannot be used: {reason}") from error


def _no_password() -> bytes:
    raise ValueError("the key has a password: give one without")
