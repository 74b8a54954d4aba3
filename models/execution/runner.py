"""Computes one step: images and tokens in, sampled tokens out.

Owns the order of a step and the pools' memory. The router decides what a step runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from transformers import MllamaConfig

from ..attention import AttentionBackend
from ..attention.sdpa import SdpaBackend
from ..attention.triton_paged import TritonBackend
from ..batch import (
    MayStart,
    ModelInfo,
    OnLaunch,
    PromptLogprobs,
    ScheduledSequence,
    StepBatch,
    StepResult,
    TokenMatcher,
    ignore,
    never,
)
from ..decoder.decoder import FusedDecoder, is_fused
from ..decoder.multi_device import SplitStep
from ..device_copies import WorkTimes
from ..errors import StepError
from ..grammar import Grammars, Matcher
from ..kv_cache.image_copies import ImageCopies
from ..kv_cache.paged_cache import KVPools, allocate_pools, copy_blocks, poison_blocks
from ..kv_cache.pool_sizes import PoolPlan
from ..kv_cache.step_inputs import PreparedRows, StepInputs, image_slots, pack
from ..kv_cache.step_tensors import Hidden, StepTensors, send
from ..lora.limits import AdapterLimits
from ..lora.store import AdapterStore, StepAdapters
from ..malloc import KeptMemory
from ..sampling.logprobs import RawLogprobs, prompt_logprobs
from ..sampling.sampler import Masks, sample
from ..sampling.verification import Places, drafts_of
from ..vision.encoder import VisionEncoder, as_it_is
from ..vision.image_cost import image_cost_tokens
from ..weights.device_map import VISION
from ..weights.loader import LoadedModel
from . import transformers_pass
from .between_layers import BetweenLayers
from .device_health import raise_if_lost
from .graphs.decode import DecodeGraphs, GraphLimits
from .graphs.recorder import Recorder
from .next_pass import NextPass, NextRows
from .shared_cores import SharedCores
from .step_checks import check_ids


class ModelRunner:
    """Runs step after step of one model; not safe for two threads at once."""

    def __init__(
        self,
        loaded: LoadedModel,
        plan: PoolPlan,
        backend: AttentionBackend | None = None,
        adapters: AdapterLimits | None = None,
    ) -> None:
        """Allocate the pools of `plan`, and the slots of adapters if there are any.

        backend: of attention; None uses the reference backend.
        """
        self._loaded, self._model = loaded, loaded.model
        self._text_model = loaded.model.model.language_model
        self._fused = FusedDecoder(self._text_model) if is_fused(self._text_model) else None
        self._vision = VisionEncoder(
            loaded.model, loaded.normalization, loaded.placement.device_of(VISION)
        )
        self._backend, self._sizes = backend or SdpaBackend(), plan.sizes
        self._layer_devices = loaded.layer_devices
        self._graphs: DecodeGraphs | None = None
        config = loaded.text_config
        self.grammars = Grammars(loaded.folder, config.vocab_size)
        self._mask_thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self.next_pass = NextPass()
        self._kept_memory: KeptMemory | None = None
        self._vision_times = WorkTimes()
        self.cores: SharedCores | None = None
        self._between = BetweenLayers(loaded.layers)
        self._num_embeddings = self._text_model.embed_tokens.num_embeddings
        self.pools: KVPools = allocate_pools(
            config,
            plan.sizes,
            loaded.num_patches,
            loaded.dtype,
            loaded.placement.layer_devices(),
            loaded.num_ranks,
        )
        self._images = ImageCopies(self.pools)
        self.adapters = None if adapters is None else AdapterStore(loaded, adapters)
        self.info = ModelInfo(
            vocab_size=config.vocab_size,
            max_model_len=plan.max_model_len,
            max_num_tiles=self._vision.max_num_tiles,
            tile_size=self._vision.tile_size,
            device="+".join(map(str, loaded.placement.devices())),
            dtype=str(loaded.dtype).removeprefix("torch."),
            pools=plan.sizes,
            image_cost_tokens=image_cost_tokens(self.config),
            num_image_layers=self._vision.num_layers,
            tile_bytes=self._images.tile_bytes if loaded.num_ranks == 1 else 0,
        )

    def bound_memory(self, limit_bytes: int) -> None:
        """From now on return freed memory while the process has more than this, and report it."""
        self._kept_memory = KeptMemory(limit_bytes)
        self.info = replace(self.info, max_memory_bytes=limit_bytes)

    @property
    def num_layers_started(self) -> int:
        """How many layers all steps have started so far; may be read while a step runs."""
        return self._loaded.layers.num_started

    @property
    def config(self) -> MllamaConfig:
        """The model's configuration: its sizes, for measuring."""
        return cast(MllamaConfig, self._model.config)

    @property
    def has_graphs(self) -> bool:
        """Whether decode steps are replayed."""
        return self._graphs is not None

    @property
    def num_replays(self) -> int:
        """How many steps the current graphs have replayed."""
        return 0 if self._graphs is None else self._graphs.num_replays

    def forget_graphs(self) -> None:
        """Compute every step eagerly from now on, to compare."""
        self._graphs = None

    @torch.inference_mode()
    def record_graphs(self, max_num_seqs: int, recorder: Recorder) -> DecodeGraphs:
        """Record decode steps of up to `max_num_seqs` sequences and replay them from now on.

        Call it only if `graphs.eligibility.why_not` returns None.
        """
        assert self._fused is not None
        assert isinstance(self._backend, TritonBackend)
        limits = GraphLimits(
            max_num_seqs=max_num_seqs,
            max_model_len=self.info.max_model_len,
            block_size=self._sizes.block_size,
            max_num_tiles=self.info.max_num_tiles,
        )
        self._graphs = DecodeGraphs(
            self._fused,
            self.pools,
            self._backend,
            limits,
            recorder,
            self._loaded.layers,
            self.adapters,
        )
        return self._graphs

    def call_between_layers(self, callback: Callable[[], None]) -> bool:
        """From now on call `callback` before each decoder layer of a step; it may call `execute`.

        False on GPUs, whose layers are not waited for, and with adapters: a step places them all.
        """
        if self.info.device != "cpu" or self._fused is None or self.adapters is not None:
            return False
        self._between.callback = callback
        return True

    @torch.inference_mode()
    def execute(self, batch: StepBatch, on_launch: OnLaunch = ignore) -> StepResult:
        """Encode the batch's images, run its tokens, sample the due tokens.

        on_launch: see `OnLaunch`. Raises StepError if the step cannot be computed; the contents of
        its blocks are then undefined. Raises DeviceLostError if no later step can be computed.
        """
        if self._between.is_inside:
            with nullcontext() if self.cores is None else self.cores.left_out():
                return self._execute(batch, on_launch)
        try:
            with nullcontext() if self.cores is None else self.cores.step(batch):
                result = self._execute(batch, on_launch)
        except Exception as error:
            raise_if_lost(self._loaded.placement.devices(), error)
            raise
        if self._kept_memory is not None:
            self._kept_memory.after_step()
        return result

    def _execute(self, batch: StepBatch, on_launch: OnLaunch) -> StepResult:
        prepared, started = self.next_pass.take()
        if self._loaded.device.type != "cuda":
            on_launch()
            batch = batch if self.adapters is None else self.adapters.in_order(batch)
        adapters = self._place(batch)
        vision_states = self._encode(batch, adapters)
        inputs = self._pack(batch, prepared)
        # Another thread fills the masks while the model computes; both release Python's lock.
        masks = self._start_masks(inputs)
        hidden = self.next_pass.hidden_of(started, batch)
        if hidden is None:
            hidden = self._forward(batch, inputs, vision_states, adapters)
        # the next pass may overwrite the hidden states, from which these log-probabilities come
        may_start = not any(row.prompt for row in batch.sequences)
        result = self._sample(hidden, inputs, masks, on_launch, may_start)
        result.prompt_logprobs = self._prompt_logprobs(hidden.states, batch)
        if not self._between.is_inside:
            result.vision_seconds = self._vision_times.take()
        result.kept = self._images.after_step(batch)
        return result

    def prepare(self, rows: Sequence[ScheduledSequence], may_start: MayStart = never) -> None:
        """Lay out rows that the next step may have; those that the step samples have no token yet.

        Called from another thread, between a step's `on_launch` and the next step. If `may_start`
        is true then, the rows' pass starts behind the step's sampling, if decodes are recorded.
        """
        following = None
        if rows:
            prepared = PreparedRows.of(rows, self._sizes.block_size, self._loaded.num_patches)
            following = NextRows.of(prepared, self._graphs, self._start, may_start)
        self.next_pass.prepare(following)

    @torch.inference_mode()
    def compute_logits(self, batch: StepBatch) -> Tensor:
        """The logits after every token of the batch, float32 [num_tokens, vocab_size].

        Runs the step like `execute`, with its cache writes but without sampling. For tests and
        measurements that need every position.
        """
        adapters = self._place(batch)
        around = as_it_is if adapters is None else adapters.encoding
        vision = self._vision.encode(batch.images, around)
        return self._logits(self._forward(batch, self._pack(batch), vision, adapters).states)

    def _place(self, batch: StepBatch) -> StepAdapters | None:
        """The step's adapters, in slots; None if it uses none."""
        if self.adapters is not None:
            return self.adapters.place(batch)
        if batch.adapters:
            raise StepError("a step has an adapter, but max_loras is 0")
        return None

    def _encode(self, batch: StepBatch, adapters: StepAdapters | None) -> Tensor | None:
        """The projected states of the finished images."""
        if not batch.images:
            return None
        watch = self._vision.start_watch()
        around = as_it_is if adapters is None else adapters.encoding
        states = self._vision.encode(batch.images, around)
        watch.stop()
        self._vision_times.add(watch)
        return states

    def _pack(self, batch: StepBatch, prepared: PreparedRows | None = None) -> StepInputs:
        """The packed inputs, with all ids and blocks checked."""
        check_ids(batch, self._num_embeddings, self._sizes)
        if prepared is not None and prepared.are_all_of(batch):
            return prepared.with_tokens()
        return pack(batch, self._sizes.block_size, self._loaded.num_patches)

    def _forward(
        self,
        batch: StepBatch,
        inputs: StepInputs,
        vision: Tensor | None,
        adapters: StepAdapters | None = None,
    ) -> Hidden:
        """The normalised hidden states of all tokens."""
        copy_blocks(self.pools, batch.copies)
        poison_blocks(self.pools, batch.freed_text_blocks, batch.freed_image_blocks)
        self._images.before_step(batch)
        row_slots = None if adapters is None else adapters.row_slots
        graphs = self._graphs if vision is None else None
        if graphs is not None and graphs.takes(inputs, row_slots is not None):
            return graphs.replay(inputs, row_slots)
        slots, dtype = None, self._loaded.dtype
        if finished := batch.finished_images:
            slots = image_slots(finished, self._loaded.num_patches)
        devices = dict.fromkeys([self._loaded.device, *self._layer_devices])
        sent = {one: send(inputs, slots, self._backend, one, dtype) for one in devices}
        own = sent[self._loaded.device]
        if self._fused is not None:
            return self._by_fused(own, vision, adapters)
        is_split = len(self._layer_devices) > 1
        split = (
            SplitStep({one: tensors.step for one, tensors in sent.items()}) if is_split else None
        )
        return transformers_pass.compute(self._text_model, self.pools, own, split, vision, adapters)

    def _start(self, inputs: StepInputs, token_ids: Tensor, places: Sequence[int]) -> Hidden:
        """Start a pass that is not recorded; its first tokens are on the device, at these places.

        token_ids: int64; a negative one counts as 0.
        """
        assert self._fused is not None
        known = inputs.token_ids.copy()
        known[: len(places)] = places
        device, dtype = self._loaded.device, self._loaded.dtype
        own = send(replace(inputs, token_ids=known), None, self._backend, device, dtype)
        fed = own.token_ids[: len(places)]
        fed.copy_(token_ids.index_select(0, fed).clamp_(min=0))
        return self._by_fused(own)

    def _by_fused(
        self, own: StepTensors, vision: Tensor | None = None, adapters: StepAdapters | None = None
    ) -> Hidden:
        assert self._fused is not None
        operations = None if adapters is None else adapters.operations(self._fused.operations)
        with self._between.calling():
            states = self._fused(
                own.token_ids, own.positions, vision, own.row_mask, self.pools, own.step, operations
            )
        return Hidden(states, own.sampled)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._model.lm_head(hidden).float()
        return logits

    def compile_grammar(
        self, grammar: str, eos_token_ids: Sequence[int], tenant: str = ""
    ) -> TokenMatcher:
        """A matcher at the start of a grammar. Raises GrammarError. One caller at a time."""
        return self.grammars.compile(grammar, eos_token_ids, tenant)

    def _start_masks(self, inputs: StepInputs) -> Future[Masks] | None:
        """The masks of the places with a grammar; None if there are none."""
        places: list[int] = []
        matchers, drafts, first = [], [], 0
        for one in inputs.sampled_sequences:
            if one.matcher is not None:
                places += range(first, first + 1 + one.num_drafts)
                matchers.append(cast(Matcher, one.matcher))
                drafts.append(drafts_of(one))
            first += 1 + one.num_drafts
        if not matchers:
            return None
        return self._mask_thread.submit(lambda: Masks(places, self.grammars.fill(matchers, drafts)))

    def _sample(
        self,
        hidden: Hidden,
        inputs: StepInputs,
        masks: Future[Masks] | None = None,
        on_launch: OnLaunch = ignore,
        may_start: bool = False,
    ) -> StepResult:
        sequences = inputs.sampled_sequences
        if not sequences:
            return StepResult({})
        logits = self._logits(hidden.of_sampled())
        places = Places.of(sequences)
        raw = RawLogprobs(logits, places.params)
        allowed = None if masks is None else masks.result()
        sampled = sample(logits, places.params, places.indices, places.contexts, allowed)
        collected = self.next_pass.collect(
            sequences,
            sampled,
            raw,
            may_start,
            on_launch if logits.is_cuda else ignore,  # the rest waits for the device
        )
        return places.result_of(*collected)

    def _prompt_logprobs(
        self, hidden: Tensor, batch: StepBatch
    ) -> dict[str, list[PromptLogprobs | None]]:
        """request_id -> one entry a target, for the sequences with targets."""
        found = {}
        begin = 0
        for sequence in batch.sequences:
            if targets := sequence.prompt:
                first = begin + targets.first
                rows = hidden[first : first + len(targets.token_ids)]
                found[sequence.request_id] = prompt_logprobs(rows, targets, self._logits)
            begin += len(sequence.token_ids)
        return found
