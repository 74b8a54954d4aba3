"""Starts vlmserve and measures it with `vlmserve bench serve`, in a process of its own.

    python bench/serve.py --concurrency 1,4,16                # the bundled model
    python bench/serve.py --model m100 --dtype bfloat16 --request-rate 1,2,4

What this script does not know is handed on to `vlmserve bench serve`, whose help names it. A
server that runs already is measured by that command alone. The last line printed is one JSON
document.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from processes import BIN, free_port, machine, running, vlmserve_command

MODEL_NAME = "bench"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", help="folder or hub id; default: the bundled model")
    parser.add_argument("--dtype", default="auto", help="compute type of the server")
    args, options = parser.parse_known_args()
    port = free_port()
    command = vlmserve_command(args.model, port, args.dtype, "--served-model-name", MODEL_NAME)
    with running(command, f"http://127.0.0.1:{port}/v1/health/ready"):
        document = measure(f"http://127.0.0.1:{port}/v1", options)
    print(json.dumps(document | {"machine": machine(), "dtype": args.dtype}))


def measure(url: str, options: list[str]) -> dict[str, object]:
    """What `vlmserve bench serve` prints for that server; ends this process where it fails."""
    command = [str(BIN / "vlmserve"), "bench", "serve", "--url", url, "--model", MODEL_NAME]
    done = subprocess.run([*command, *options], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    document: dict[str, object] = json.loads(done.stdout)
    return document


if __name__ == "__main__":
    main()
