"""A runner whose steps run on all ranks; for the engine it is one runner.

Owns the order in which ranks start and join. Every rank samples, since each has the joined logits;
the first rank's tokens are used.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import torch

from ..batch import (
    AdapterInfo,
    AdapterRef,
    MayStart,
    ModelInfo,
    OnLaunch,
    ScheduledSequence,
    StepBatch,
    StepResult,
    TokenMatcher,
    ignore,
    never,
)
from ..create_runner import create_runner
from ..errors import ModelError, StepError
from ..execution.runner import ModelRunner
from ..lora.store import AdapterStore
from ..settings.runner_config import RunnerConfig
from ..settings.threads import threads_of_one
from ..tensor_parallel.group import DistributedGroup, MeetingPlace
from ..weights.device_choice import check_gpus, choose_device
from .ranks import Ranks, end_process
from .wire import RankSettings, RankStep

logger = logging.getLogger(__name__)


class ParallelAdapters:
    """The first rank's adapters; the other ranks read and forget the same before the next step.

    May be called from any thread.
    """

    def __init__(self, local: AdapterStore) -> None:
        self._local = local
        self._lock = threading.Lock()
        self._read: dict[str, AdapterRef] = {}
        self._forgotten: dict[str, None] = {}

    def read(self, ref: AdapterRef) -> AdapterInfo:
        """See `AdapterStore.read`. A rank that cannot read what the first one could, exits."""
        info = self._local.read(ref)
        with self._lock:
            self._read[ref.digest] = ref
        return info

    def forget(self, digest: str) -> None:
        """See `AdapterStore.forget`."""
        self._local.forget(digest)
        with self._lock:
            self._read.pop(digest, None)
            self._forgotten[digest] = None

    def step_of(self, batch: StepBatch) -> RankStep:
        """The step for the other ranks, with what was read and forgotten since the last."""
        with self._lock:
            step = RankStep(batch, list(self._read.values()), list(self._forgotten))
            self._read, self._forgotten = {}, {}
        return step


class ParallelRunner:
    """The first rank's runner together with the other ranks; used like a `ModelRunner`."""

    def __init__(
        self,
        local: ModelRunner,
        ranks: Ranks,
        on_death: Callable[[str], None] = end_process,
        group: DistributedGroup | None = None,
        meeting_place: MeetingPlace | None = None,
    ) -> None:
        """group, meeting_place: of the first rank; `close` closes both."""
        self._local = local
        self._ranks = ranks
        self._on_death = on_death
        self._group = group
        self._meeting_place = meeting_place
        self.adapters = None if local.adapters is None else ParallelAdapters(local.adapters)

    @property
    def info(self) -> ModelInfo:
        """What was loaded; all ranks have the same pools."""
        return self._local.info

    @property
    def num_layers_started(self) -> int:
        """How many layers the first rank has started; ranks wait for each other at every layer."""
        return self._local.num_layers_started

    @property
    def rank_pids(self) -> list[int]:
        """The processes of the other ranks."""
        return self._ranks.pids

    def compile_grammar(
        self, grammar: str, eos_token_ids: Sequence[int], tenant: str = ""
    ) -> TokenMatcher:
        """See `ModelRunner.compile_grammar`; only the first rank applies grammars."""
        return self._local.compile_grammar(grammar, eos_token_ids, tenant)

    def prepare(self, rows: Sequence[ScheduledSequence], may_start: MayStart = never) -> None:
        """See `ModelRunner.prepare`; no pass is started: other ranks get their rows with a step."""
        self._local.prepare(rows)

    def call_between_layers(self, callback: Callable[[], None]) -> bool:
        """False: other ranks would have to compute the other step at the same layer."""
        return False

    def execute(self, batch: StepBatch, on_launch: OnLaunch = ignore) -> StepResult:
        """Compute one step on all ranks; see `ModelRunner.execute`.

        If a step fails on this rank only, the ranks are out of step: the process ends, and its
        supervisor restarts it.
        """
        step = RankStep(batch) if self.adapters is None else self.adapters.step_of(batch)
        self._ranks.compute(step)
        try:
            return self._local.execute(batch, on_launch)
        except StepError:
            raise
        except Exception as error:
            logger.exception("a step failed on the first rank")
            self._on_death("the ranks are out of step")
            raise StepError("a step failed on one rank only") from error

    def close(self) -> None:
        """Stop the other ranks."""
        self._ranks.close()
        if self._group is not None:
            self._local.forget_graphs()  # NCCL waits for graphs that have its sums
            self._group.close()
        if self._meeting_place is not None:
            self._meeting_place.close()


def create_parallel_runner(
    model: str,
    size: int,
    config: RunnerConfig,
    on_death: Callable[[str], None] = end_process,
) -> ParallelRunner:
    """The runner of a checkpoint over `size` ranks on this machine; see `create_runner`.

    On CUDA the ranks use the chosen device and those after it; on a CPU they share its cores.
    Raises ModelError, one line with the remedy.
    """
    num_threads = config.num_threads or threads_of_one(size)
    config = msgspec.structs.replace(config, num_threads=num_threads)
    first = choose_device(config.device)
    check_gpus(first, size, f"--tensor-parallel-size {size}")
    place = MeetingPlace()
    settings = RankSettings(
        rank=0, size=size, meeting_place=str(place.path), model=model, config=config
    )
    ranks = Ranks(settings, on_death)
    try:
        group = join_group(settings)
        local = create_rank(settings, group)
        ranks.wait_ready()
    except ModelError:
        ranks.close()
        place.close()
        raise
    except BaseException:
        # a collective may fail because another rank did: report that rank's error
        try:
            ranks.raise_reported_error()
        finally:
            ranks.close()
            place.close()
        raise
    return ParallelRunner(local, ranks, on_death, group, place)


def create_rank(settings: RankSettings, group: DistributedGroup | None = None) -> ModelRunner:
    """The runner of one rank, with its share of the weights. Waits for all ranks."""
    group = group or join_group(settings)
    config = msgspec.structs.replace(settings.config, device=str(group.device))
    return create_runner(settings.model, config, group=group)


def join_group(settings: RankSettings) -> DistributedGroup:
    """Join this process to the ranks; on CUDA each rank has its own device."""
    base = choose_device(settings.config.device)
    device = base
    if base.type == "cuda":
        device = torch.device("cuda", (base.index or 0) + settings.rank)
        torch.cuda.set_device(device)
    return DistributedGroup(settings.rank, settings.size, device, Path(settings.meeting_place))
