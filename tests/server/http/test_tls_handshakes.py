"""TLS handshakes that a client leaves half done, at a real worker."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from pathlib import Path

import httpx2
import pytest
from support.polling import FAR_S
from support.worker_process import worker_process

# asyncio itself gives up after this long.
DEFAULT_S = 60.0
START_OF_HELLO = b"\x16\x03\x01"


@pytest.fixture
def certificate(tmp_path: Path) -> dict[str, str]:
    files = {"tls_certfile": str(tmp_path / "c.pem"), "tls_keyfile": str(tmp_path / "k.pem")}
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=a"),
            *("-out", files["tls_certfile"], "-keyout", files["tls_keyfile"]),
        ],
        check=True,
        capture_output=True,
    )
    return files


def test_row_04_a_half_done_handshake_is_closed_after_the_time_of_a_request(
    certificate: dict[str, str], tmp_path: Path
) -> None:
    """It kept its descriptor for 60 s, and no place counted it: some hundreds took them all."""

    async def scenario() -> None:
        # No engine listens there: the routes of health answer without one.
        path = str(tmp_path / "engine.sock")
        async with worker_process(path, request_timeout_s=1.0, **certificate) as worker:
            port = int(worker.url.rpartition(":")[2])
            tls = ssl._create_unverified_context()
            async with httpx2.AsyncClient(verify=tls, timeout=FAR_S) as client:
                live = f"https://127.0.0.1:{port}/v1/health/live"
                assert (await client.get(live)).status_code == 200
                pairs = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
                for _, writer in pairs:
                    writer.write(START_OF_HELLO)
                async with asyncio.timeout(DEFAULT_S / 2):
                    for reader, _ in pairs:
                        assert await reader.read() == b""
                for _, writer in pairs:
                    writer.close()
                assert (await client.get(live)).status_code == 200

    asyncio.run(scenario())
