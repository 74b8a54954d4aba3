"""Measures what the image cache saves: the first token of a second turn about the same picture.

    python bench/checkpoints.py vision-heavy --out vision-heavy
    OMP_NUM_THREADS=2 python bench/second_turn.py --checkpoint vision-heavy

For each of `--pictures` new pictures: a question, a second question with the conversation so far,
and a question without a picture of as many tokens. One step encodes an image and projects its keys
and values, so one counter covers both. The difference also includes the worker's decoding, which a
second turn saves too. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from dataclasses import dataclass, field

import orjson

from processes import arguments, print_document, serving
from server_state import metrics
from vlmserve.server.bench.client import Client
from vlmserve.server.bench.load import QUESTION, unique_pictures

SECOND_QUESTION = "How many shapes are there?"
MODEL = "bench"


@dataclass(slots=True)
class Times:
    """Seconds to the first token, an entry a picture, and what the engine counted meanwhile."""

    first_turn: list[float] = field(default_factory=list)
    second_turn: list[float] = field(default_factory=list)
    text_only: list[float] = field(default_factory=list)
    vision: list[float] = field(default_factory=list)
    encoded_in_second_turns: float = 0.0


@dataclass(slots=True)
class Talk:
    """A client with one open request at a time."""

    url: str
    client: Client

    async def ttft(self, messages: list[dict[str, object]]) -> float:
        """Seconds to the first token of the answer. Raises RuntimeError if there is none."""
        body = {"model": MODEL, "messages": messages, "stream": True}
        sample = await self.client.chat(orjson.dumps(body | {"max_tokens": 8, "temperature": 0}))
        if sample.error or not sample.chunk_times:
            raise RuntimeError(sample.detail or "the answer has no text")
        return sample.chunk_times[0] - sample.sent

    async def settled(self) -> tuple[float, float]:
        """Images encoded and seconds of vision, after the next heartbeat."""
        await asyncio.sleep(1.2)
        found = metrics(self.url)
        return found["vlmserve_images_encoded_total"], found["vlmserve_vision_seconds_total"]


def turn(role: str, text: str, picture: str | None = None) -> dict[str, object]:
    if picture is None:
        return {"role": role, "content": text}
    image = {"type": "image_url", "image_url": {"url": picture}}
    return {"role": role, "content": [image, {"type": "text", "text": text}]}


async def measure(url: str, args: argparse.Namespace) -> Times:
    times = Times()
    pictures = unique_pictures([(args.image_size, args.image_size)], args.seed)
    async with Client(f"{url}/v1") as client:
        talk = Talk(url, client)
        await talk.ttft([turn("user", QUESTION, next(pictures))])
        for number in range(args.pictures):
            await measure_picture(talk, next(pictures), number, times)
    return times


async def measure_picture(talk: Talk, picture: str, number: int, times: Times) -> None:
    """Both turns about one picture, and a new text for comparison."""
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
    turns = ("first_turn", "second_turn", "text_only")
    ms = {name: 1e3 * statistics.median(getattr(times, name)) for name in (*turns, "vision")}
    saved = (ms["first_turn"] - ms["second_turn"]) / ms["vision"]
    for name, value in ms.items():
        print(f"{name.replace('_', ' '):<12} {value:8.1f} ms")
    print(f"saved by the second turn: {saved:.0%} of the vision time")
    print(f"pictures encoded in second turns: {times.encoded_in_second_turns:.0f}")
    return {
        "ttft_ms": {name: round(ms[name], 2) for name in turns},
        "vision_ms": round(ms["vision"], 2),
        "vision_over_text_prefill": round(ms["vision"] / ms["text_only"], 2),
        "saved_share_of_vision": round(saved, 3),
        "encoded_in_second_turns": times.encoded_in_second_turns,
    }


def main() -> None:
    args = arguments(
        __doc__,
        checkpoint=(..., "folder of a checkpoint"),
        dtype="bfloat16",
        pictures=16,
        image_size=(224, "side in pixels"),
        seed=0,
    )
    with serving(args.checkpoint, args.dtype, name=MODEL) as (_, url):
        times = asyncio.run(measure(url, args))
    print_document(args, **report(times))


if __name__ == "__main__":
    main()
