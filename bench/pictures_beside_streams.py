"""Measures how long running text streams are held up while requests with pictures arrive.

    python bench/checkpoints.py vision-heavy --out vision-heavy
    OMP_NUM_THREADS=1 python bench/pictures_beside_streams.py --checkpoint vision-heavy --rate 2

The true scheduler and runner, without a server. `--streams` texts decode all the time; meanwhile
requests with a picture of their own arrive at random times (Poisson), `--rate` a second. The clock
is the engine's own CPU time, so that other work on the machine does not count: a second is a second
of one thread, or with `--clock wall` of the wall. The last line printed is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from processes import machine
from vlmserve.models import bundled
from vlmserve.models.batch import ImageSpan, ImageTiles, SamplingParams
from vlmserve.models.create_runner import create_runner
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.settings.runner_config import RunnerConfig
from vlmserve.router.messages import AddRequest
from vlmserve.router.scheduler.interface import SchedulerLimits
from vlmserve.router.scheduler.request_queue import QueueLimits, RequestQueue
from vlmserve.router.scheduler.scheduler import Scheduler
from vlmserve.router.scheduler.sequence import Sequence

MAX_MODEL_LEN = 2048
MAX_NUM_SEQS = 64
NUM_PROMPT_TOKENS = 32
CLOCKS: dict[str, Callable[[], float]] = {"cpu": time.process_time, "wall": time.perf_counter}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--checkpoint", default="", help="folder; default: the bundled model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--streams", type=int, default=8, help="texts that always decode")
    parser.add_argument("--pictures", type=int, default=40, help="requests with a picture")
    parser.add_argument("--rate", type=float, default=4.0, help="of them, a second")
    parser.add_argument("--output-tokens", type=int, default=16, help="of a picture request")
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--max-num-batched-images", type=int, default=4)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


@dataclass
class Measurement:
    """An engine's steps on a clock of their own, and when each request's tokens came."""

    runner: ModelRunner
    args: argparse.Namespace
    now: float = 0.0
    arrivals: dict[str, float] = field(default_factory=dict)
    token_times: dict[str, list[float]] = field(default_factory=dict)
    step_seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        args = self.args
        self._clock = CLOCKS[args.clock]
        self._rng = np.random.default_rng(args.seed)
        self._queue = RequestQueue(QueueLimits(1000, 10**7, 10**10))
        tokens, images = args.max_num_batched_tokens, args.max_num_batched_images
        limits = SchedulerLimits(MAX_NUM_SEQS, tokens, images, MAX_MODEL_LEN)
        self._scheduler = Scheduler(self.runner.info, limits, self._queue)

    def run(self) -> None:
        """Everything, from the first stream's prompt to the last picture's answer."""
        for number in range(self.args.streams):
            self._put(self._request(f"stream {number}", MAX_MODEL_LEN))
        while self._step() > self.args.streams:  # until all decode
            pass
        self.now, self.step_seconds = 0.0, []
        gaps = self._rng.exponential(1 / self.args.rate, self.args.pictures)
        due = list(np.cumsum(gaps))
        open_pictures: set[str] = set()
        while due or open_pictures:
            while due and due[0] <= self.now:
                self.arrivals[name := f"picture {len(self.arrivals)}"] = due.pop(0)
                open_pictures.add(name)
                self._put(self._request(name, self.args.output_tokens, self._picture()))
            self._step(open_pictures)

    def chunk_seconds(self) -> float:
        """How long a step takes that one long prompt fills, beside the streams."""
        self._put(self._request("long", 1, num_prompt_tokens=MAX_MODEL_LEN - 2))
        num_tokens = self._step()
        assert num_tokens >= min(self.args.max_num_batched_tokens, MAX_MODEL_LEN - 2)
        return self.step_seconds[-1]

    def _step(self, open_pictures: set[str] | None = None) -> int:
        """Compute one step; how many tokens were in it."""
        began = self._clock()
        batch = self._scheduler.schedule()
        assert batch is not None, "the streams are over: ask for fewer pictures"
        progress = self._scheduler.update(self.runner.execute(batch))
        spent = self._clock() - began
        self.now += spent
        self.step_seconds.append(spent)
        for one in progress:
            name = one.sequence.request_id
            self.token_times.setdefault(name, []).append(self.now)
            if one.finish_reason is not None and open_pictures is not None:
                open_pictures.discard(name)
        return batch.num_tokens

    def _put(self, request: AddRequest) -> None:
        self._queue.put(Sequence.of(0, request)[0])

    def _request(
        self,
        name: str,
        max_tokens: int,
        picture: ImageTiles | None = None,
        num_prompt_tokens: int = NUM_PROMPT_TOKENS,
    ) -> AddRequest:
        vocab_size = self.runner.info.vocab_size
        token_ids = self._rng.integers(1, vocab_size // 2, num_prompt_tokens).tolist()
        if picture is not None:
            token_ids[0] = vocab_size
        return AddRequest(
            request_id=name,
            prompt_token_ids=token_ids,
            images=[] if picture is None else [picture],
            spans=[] if picture is None else [ImageSpan(0)],
            sampling=SamplingParams(temperature=0.0),
            max_tokens=min(max_tokens, MAX_MODEL_LEN - num_prompt_tokens - 1),
        )

    def _picture(self) -> ImageTiles:
        """Of as many tiles as the model takes; every one is new."""
        info = self.runner.info
        shape = (info.max_num_tiles, 3, info.tile_size, info.tile_size)
        data = self._rng.integers(0, 256, shape, dtype=np.uint8).tobytes()
        return ImageTiles(
            data=data,
            num_tiles=info.max_num_tiles,
            tile_size=info.tile_size,
            aspect_ratio_id=1,
            content_hash=self._rng.bytes(32),
        )


def report(measurement: Measurement) -> dict[str, object]:
    times = measurement.token_times
    gaps = [
        later - earlier
        for name, moments in times.items()
        if name.startswith("stream")
        for earlier, later in pairwise(moments[1:])
    ]
    firsts = [times[name][0] - due for name, due in measurement.arrivals.items()]
    num_tokens = sum(moment <= measurement.now for all_of in times.values() for moment in all_of)
    figures: dict[str, object] = {
        "inter_token_ms": _percentiles(gaps),
        "picture_ttft_ms": _percentiles(firsts),
        "tokens_per_s": round(num_tokens / measurement.now, 1),
        "seconds": round(measurement.now, 2),
    }
    for name, value in figures.items():
        print(f"{name:<16} {value}")
    return figures


def _percentiles(seconds: list[float]) -> dict[str, float]:
    values = np.percentile(np.array(seconds) * 1e3, [50, 90, 99, 100])
    names = ("p50", "p90", "p99", "max")
    return {name: round(float(value), 1) for name, value in zip(names, values, strict=True)}


def main() -> None:
    args = parse_arguments()
    runner = create_runner(
        args.checkpoint or str(bundled.CHECKPOINT),
        RunnerConfig(
            dtype=args.dtype,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=args.max_num_batched_tokens,
            max_num_batched_images=args.max_num_batched_images,
            kv_cache_bytes=1 << 30,
        ),
    )
    measurement = Measurement(runner, args)
    measurement.run()
    figures = report(measurement)
    figures["chunk_ms"] = round(measurement.chunk_seconds() * 1e3, 1)
    document = {"machine": machine(), "device": runner.info.device} | vars(args)
    print(json.dumps(document | figures))


if __name__ == "__main__":
    main()
