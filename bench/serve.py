"""Starts vlmserve and measures it with `vlmserve bench serve`, in its own process.

    python bench/serve.py --concurrency 1,4,16                # the bundled model
    python bench/serve.py --model m100 --dtype bfloat16 --request-rate 1,2,4

`vlmserve bench serve` gets all other options; its help lists them. For a server that runs already,
use that command alone. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from processes import BIN, add_options, machine, serving


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add_options(
        parser,
        model=("", "folder or hub id; default: the bundled model"),
        dtype=("auto", "compute type of the server"),
    )
    args, options = parser.parse_known_args()
    with serving(args.model, args.dtype) as (_, url):
        command = [str(BIN / "vlmserve"), "bench", "serve", "--url", f"{url}/v1"]
        command += ["--model", "bench", *options]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    print(json.dumps(json.loads(done.stdout) | {"machine": machine(), "dtype": args.dtype}))


if __name__ == "__main__":
    main()
