"""Measures how long running text streams are held up while requests with pictures arrive.

    python bench/checkpoints.py vision-heavy --out vision-heavy
    python bench/pictures_beside_streams.py --checkpoint vision-heavy --rate 2

`--streams` clients stream text all the time; meanwhile requests with a picture that nobody sent
before arrive at random times (Poisson), `--rate` a second for `--seconds`. What this script does
not know goes to `vlmserve serve`, such as --max-num-batched-tokens 512. The streams' times between
tokens count while pictures are asked about. The last line printed is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from itertools import pairwise

import numpy as np

from processes import free_port, machine, running, vlmserve_command
from vlmserve.server.bench.client import Client, Sample
from vlmserve.server.bench.load import request_bodies
from vlmserve.server.bench.settings import Load

MODEL_NAME = "bench"
STREAM_TOKENS = 256
NUM_WARM_UP = 4
POLL_S = 0.1


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--checkpoint", help="folder; default: the bundled model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--streams", type=int, default=8, help="text streams that always run")
    parser.add_argument("--rate", type=float, default=4.0, help="picture requests a second")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--image-size", type=int, default=224, help="side in pixels")
    parser.add_argument("--output-tokens", type=int, default=16, help="of a picture request")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_known_args()


class Measurement:
    """Streams that never end, and picture requests that come at their times."""

    def __init__(self, client: Client, args: argparse.Namespace) -> None:
        self._client = client
        self._args = args
        self.began = self.ended = 0.0
        self.texts: list[Sample] = []
        self.pictures: list[Sample] = []
        self._is_over = False

    async def run(self) -> None:
        bodies = self._picture_bodies()
        for body in bodies[:NUM_WARM_UP]:
            await self._asked(body)
        streams = [asyncio.create_task(self._stream(n)) for n in range(self._args.streams)]
        while len(self.texts) < len(streams):  # each has ended once: all are under way
            done, _ = await asyncio.wait(streams, timeout=POLL_S)
            for failed in done:
                failed.result()
        self.began = time.perf_counter()
        self.pictures = await self._arrivals(bodies[NUM_WARM_UP:])
        self.ended = time.perf_counter()
        self._is_over = True
        await asyncio.gather(*streams)

    def _picture_bodies(self) -> list[bytes]:
        args = self._args
        size = (args.image_size, args.image_size)
        count = NUM_WARM_UP + max(1, round(args.rate * args.seconds))
        load = Load(count, args.output_tokens, image_sizes=(size,), ignore_eos=True, seed=args.seed)
        return request_bodies(load, MODEL_NAME)

    async def _stream(self, number: int) -> None:
        load = Load(1, STREAM_TOKENS, num_images=0, prompt_words=8, ignore_eos=True, seed=number)
        body = request_bodies(load, MODEL_NAME)[0]
        while not self._is_over:
            self.texts.append(await self._asked(body))

    async def _arrivals(self, bodies: list[bytes]) -> list[Sample]:
        rng = np.random.default_rng(self._args.seed)
        due, asked = time.perf_counter(), []
        for body in bodies:
            due += rng.exponential(1 / self._args.rate)
            await asyncio.sleep(due - time.perf_counter())
            asked.append(asyncio.create_task(self._asked(body, due)))
        return await asyncio.gather(*asked)

    async def _asked(self, body: bytes, due: float | None = None) -> Sample:
        """The answer. Raises RuntimeError where there is none."""
        sample = await self._client.chat(body, due)
        if sample.error:
            raise RuntimeError(f"{sample.error}: {sample.detail}")
        return sample


def report(measurement: Measurement) -> dict[str, object]:
    began, ended = measurement.began, measurement.ended
    times = [text.chunk_times for text in measurement.texts]
    gaps = [
        later - earlier
        for chunks in times
        for earlier, later in pairwise(chunks)
        if began <= earlier and later <= ended
    ]
    firsts = [one.chunk_times[0] - one.due for one in measurement.pictures]
    num_pieces = sum(
        began <= moment <= ended
        for sample in [*measurement.texts, *measurement.pictures]
        for moment in sample.chunk_times
    )
    figures: dict[str, object] = {
        "inter_token_ms": _percentiles(gaps),
        "picture_ttft_ms": _percentiles(firsts),
        "tokens_per_s": round(num_pieces / (ended - began), 1),
        "pictures": len(firsts),
    }
    for name, value in figures.items():
        print(f"{name:<16} {value}")
    return figures


def _percentiles(seconds: list[float]) -> dict[str, float]:
    values = np.percentile(np.array(seconds) * 1e3, [50, 90, 99, 100])
    names = ("p50", "p90", "p99", "max")
    return {name: round(float(value), 1) for name, value in zip(names, values, strict=True)}


async def measure(url: str, args: argparse.Namespace) -> dict[str, object]:
    async with Client(f"{url}/v1") as client:
        measurement = Measurement(client, args)
        await measurement.run()
    return report(measurement)


def main() -> None:
    args, options = parse_arguments()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    more = ["--served-model-name", MODEL_NAME, "--no-log-requests", *options]
    with running(
        vlmserve_command(args.checkpoint, port, args.dtype, *more), f"{url}/v1/health/ready"
    ):
        figures = asyncio.run(measure(url, args))
    document = {"machine": machine(), "server_options": options} | vars(args)
    print(json.dumps(document | figures))


if __name__ == "__main__":
    main()
