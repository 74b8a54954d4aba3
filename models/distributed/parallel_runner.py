"""A runner whose steps run on all ranks, and how each rank makes its own.

Owns the order in which ranks start, meet and agree. Knows nothing of scheduling; to the engine it
is one runner. Every rank samples, as the logits are joined on each; the first one's word counts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import torch

from ..batch import (
    ModelInfo,
    OnLaunch,
    ScheduledSequence,
    StepBatch,
    StepResult,
    TokenMatcher,
    ignore,
)
from ..create_runner import create_runner
from ..errors import ModelError, StepError
from ..execution.runner import ModelRunner
from ..settings.runner_config import RunnerConfig
from ..tensor_parallel.group import DistributedGroup, MeetingPlace
from ..threads import threads_of_one
from ..weights.loader import check_gpus, choose_device
from .ranks import Ranks, end_process
from .wire import RankSettings

logger = logging.getLogger(__name__)


class ParallelRunner:
    """The first rank's runner, with the others beside it; used as a `ModelRunner` is."""

    def __init__(
        self,
        local: ModelRunner,
        ranks: Ranks,
        on_death: Callable[[str], None] = end_process,
        group: DistributedGroup | None = None,
        meeting_place: MeetingPlace | None = None,
    ) -> None:
        """group: the first rank's, which is left at `close`, and then the place where it met."""
        self._local = local
        self._ranks = ranks
        self._on_death = on_death
        self._group = group
        self._meeting_place = meeting_place

    @property
    def info(self) -> ModelInfo:
        """What was loaded; the pools are those of every rank."""
        return self._local.info

    @property
    def num_layers_started(self) -> int:
        """How many layers the first rank has begun; the others wait for it at every layer."""
        return self._local.num_layers_started

    @property
    def rank_pids(self) -> list[int]:
        """The other ranks' processes."""
        return self._ranks.pids

    def compile_grammar(
        self, grammar: str, eos_token_ids: Sequence[int], tenant: str = ""
    ) -> TokenMatcher:
        """See `ModelRunner.compile_grammar`; the first rank alone applies grammars."""
        return self._local.compile_grammar(grammar, eos_token_ids, tenant)

    def prepare(self, rows: Sequence[ScheduledSequence]) -> None:
        """See `ModelRunner.prepare`; the other ranks get their rows with the step."""
        self._local.prepare(rows)

    def execute(self, batch: StepBatch, on_launch: OnLaunch = ignore) -> StepResult:
        """Compute one step on all ranks; see `ModelRunner.execute`.

        A step that fails on this rank alone leaves the others in another place of it: the process
        ends then, and whoever supervises it starts anew.
        """
        self._ranks.compute(batch)
        try:
            return self._local.execute(batch, on_launch)
        except StepError:
            raise
        except Exception as error:
            logger.exception("a step failed on the first rank")
            self._on_death("the ranks are out of step")
            raise StepError("a step failed on one rank of several") from error

    def close(self) -> None:
        """End the other ranks."""
        self._ranks.close()
        if self._group is not None:
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

    On CUDA the ranks take the devices from the chosen one on; on a CPU they share its cores. Raises
    ModelError, one line with the remedy.
    """
    # ranks share the machine's cores unless someone said how many threads a process takes
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
        # perhaps a collective that another rank left: that one knows why
        try:
            ranks.raise_last_words()
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
    """This process as one of the ranks, on a device of its own where there are several."""
    base = choose_device(settings.config.device)
    device = base
    if base.type == "cuda":
        device = torch.device("cuda", (base.index or 0) + settings.rank)
        torch.cuda.set_device(device)
    return DistributedGroup(settings.rank, settings.size, device, Path(settings.meeting_place))
