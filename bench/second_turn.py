"""Measures what the image cache saves: the first token of a second turn about the same picture.

    python bench/checkpoints.py vision-heavy --out vision-heavy
    OMP_NUM_THREADS=2 python bench/second_turn.py --checkpoint vision-heavy

For each of `--pictures` new pictures: a question, then another with the conversation so far, and a
question without a picture of as many tokens. An image's keys and values are projected in the step
that encodes it and in no other, so one counter tells of both. The worker's decoding is saved in a
second turn too and is part of the difference. The last line printed is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import urllib.request
from dataclasses import dataclass, field

import orjson

from processes import free_port, machine, running, vlmserve_command
from vlmserve.server.bench.client import Client
from vlmserve.server.bench.load import QUESTION, unique_pictures

SECOND_QUESTION = "How many shapes are there?"
ENCODED = "vlmserve_images_encoded_total"
VISION_S = "vlmserve_vision_seconds_total"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--checkpoint", required=True, help="folder of a checkpoint")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=224, help="side in pixels")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


@dataclass(slots=True)
class Times:
    """Seconds to the first token, a picture each, and what the engine counted meanwhile."""

    first_turn: list[float] = field(default_factory=list)
    second_turn: list[float] = field(default_factory=list)
    text_only: list[float] = field(default_factory=list)
    vision: list[float] = field(default_factory=list)
    encoded_in_second_turns: float = 0.0


def metric(url: str, name: str) -> float:
    """The value of a metric without labels, once the engine has told of its last step."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        for line in response.read().decode().splitlines():
            if line.split(" ")[0] == name:
                return float(line.split(" ")[1])
    raise KeyError(name)


class Talk:
    """A client that asks one thing at a time."""

    def __init__(self, url: str, model: str, client: Client) -> None:
        self._url = url
        self._model = model
        self._client = client

    async def ttft(self, messages: list[dict[str, object]]) -> float:
        """Seconds to the first token of the answer. Raises RuntimeError if there is none."""
        body = {
            "model": self._model,
            "messages": messages,
            "max_tokens": 8,
            "temperature": 0,
            "stream": True,
        }
        sample = await self._client.chat(orjson.dumps(body))
        if sample.error or not sample.chunk_times:
            raise RuntimeError(sample.detail or "the answer has no text")
        return sample.chunk_times[0] - sample.sent

    async def settled(self) -> tuple[float, float]:
        """Images encoded and seconds of vision, after the next heartbeat."""
        await asyncio.sleep(1.2)
        return metric(self._url, ENCODED), metric(self._url, VISION_S)


def turn(role: str, text: str, picture: str | None = None) -> dict[str, object]:
    if picture is None:
        return {"role": role, "content": text}
    image = {"type": "image_url", "image_url": {"url": picture}}
    return {"role": role, "content": [image, {"type": "text", "text": text}]}


async def measure(url: str, model: str, args: argparse.Namespace) -> Times:
    times = Times()
    size = (args.image_size, args.image_size)
    pictures = unique_pictures([size], args.seed)
    async with Client(f"{url}/v1") as client:
        talk = Talk(url, model, client)
        await talk.ttft([turn("user", QUESTION, next(pictures))])
        for number in range(args.pictures):
            await measure_picture(talk, next(pictures), number, times)
    return times


async def measure_picture(talk: Talk, picture: str, number: int, times: Times) -> None:
    """Both turns about one picture, and a text of its own for comparison."""
    first = [turn("user", f"{number}: {QUESTION}", picture)]
    encoded, vision = await talk.settled()
    times.first_turn.append(await talk.ttft(first))
    encoded_then, vision_then = await talk.settled()
    if encoded_then != encoded + 1:
        raise RuntimeError("the first turn did not encode one picture")
    times.vision.append(vision_then - vision)
    second = [*first, turn("assistant", "A picture."), turn("user", SECOND_QUESTION)]
    times.second_turn.append(await talk.ttft(second))
    times.encoded_in_second_turns += (await talk.settled())[0] - encoded_then
    times.text_only.append(await talk.ttft([turn("user", f"{number}. {QUESTION}")]))


def report(times: Times) -> dict[str, object]:
    ms = {
        name: statistics.median(getattr(times, name)) * 1e3
        for name in ("first_turn", "second_turn", "text_only", "vision")
    }
    saved = (ms["first_turn"] - ms["second_turn"]) / ms["vision"]
    for name, value in ms.items():
        print(f"{name.replace('_', ' '):<12} {value:8.1f} ms")
    print(f"saved by the second turn: {saved:.0%} of the vision time")
    print(f"pictures encoded in second turns: {times.encoded_in_second_turns:.0f}")
    return {
        "ttft_ms": {name: round(value, 2) for name, value in ms.items() if name != "vision"},
        "vision_ms": round(ms["vision"], 2),
        "vision_over_text_prefill": round(ms["vision"] / ms["text_only"], 2),
        "saved_share_of_vision": round(saved, 3),
        "encoded_in_second_turns": times.encoded_in_second_turns,
    }


def main() -> None:
    args = parse_arguments()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = vlmserve_command(args.checkpoint, port, args.dtype, "--served-model-name", "bench")
    with running(command, f"{url}/v1/health/ready"):
        times = asyncio.run(measure(url, "bench", args))
    document = {"machine": machine(), "checkpoint": args.checkpoint, "dtype": args.dtype}
    print(json.dumps(document | {"pictures": args.pictures} | report(times)))


if __name__ == "__main__":
    main()
