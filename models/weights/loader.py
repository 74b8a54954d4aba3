"""Loads a Mllama checkpoint from a local folder onto its devices.

Owns the choice of device and dtype, and the changes to the loaded module. Reads safetensors only,
each weight straight to its device, and never runs code from a checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import PrefixedDataset
from torch import nn
from transformers import BitsAndBytesConfig, MllamaForConditionalGeneration, MllamaTextConfig

from ..attention import Geometry
from ..checkpoint import INDEX, check_folder, lacks_metadata
from ..decoder.decoder import LayerCount, fuse_layers
from ..decoder.multi_device import SPLIT_ATTENTION_NAME
from ..decoder.packed_linear import pack_linears
from ..errors import ModelError
from ..kv_cache.paged_cache import ATTENTION_NAME
from ..malloc import large_buffers_mapped
from ..tensor_parallel.group import Group
from ..tensor_parallel.layers import connect
from ..tensor_parallel.plan import Side, check_size, cut_linears
from ..vision.encoder import ImageNormalization, read_normalization
from . import progress
from .device_choice import choose_device, choose_dtype
from .device_map import EMBEDDING, VISION, Placement, on_one_device
from .formats.coded_tensor import CodedTensor
from .formats.recognition import read_weights
from .formats.safetensors_headers import PEFT_PREFIX, StoredTensor
from .meta_model import build_meta_model, is_short, one_line
from .quantization import OWN_METHODS, is_quantized, quantization_config, settle
from .tensor_loader import WHOLE, Opened, RankShare, Recipe, load_tensors, open_tensors


@dataclass(slots=True, frozen=True)
class Checkpoint:
    """A checked checkpoint folder, ready to load.

    tensors: by their names in the module. meta_model: the model on the meta device, in the compute
    dtype `dtype`. draw: creates all tensors on a device when there are no files
    (random_weights.py); the folder is then only a name.
    """

    folder: Path
    normalization: ImageNormalization
    tensors: dict[str, StoredTensor]
    meta_model: MllamaForConditionalGeneration
    dtype: torch.dtype
    draw: Callable[[torch.device], Opened] | None = None

    @property
    def is_coded(self) -> bool:
        """Whether the files have weights in 8 or 4 bits."""
        return any(isinstance(tensor, CodedTensor) for tensor in self.tensors.values())

    @property
    def is_resized(self) -> bool:
        """Whether the embedding lacks Mllama's rows beyond the vocabulary."""
        rows = self.tensors[f"{EMBEDDING}.weight"].shape[0]
        return is_short(f"{EMBEDDING}.weight", rows, self.meta_model.config)

    @property
    def lacks_metadata(self) -> bool:
        """Whether it has an index of shards that transformers refuses: without metadata."""
        return lacks_metadata(self.folder)


@dataclass(slots=True, frozen=True)
class LoadedModel:
    """A model ready to compute: in eval mode, on its devices, with paged attention.

    share: the rank's share of the layers; the model then has one rank's heads.
    """

    model: MllamaForConditionalGeneration
    normalization: ImageNormalization
    folder: Path
    placement: Placement
    dtype: torch.dtype
    layers: LayerCount
    share: RankShare = WHOLE

    @property
    def num_ranks(self) -> int:
        """How many ranks share the model."""
        return self.share.size

    @property
    def device(self) -> torch.device:
        """The main device, which takes the tokens; the only device unless the model is split."""
        return self.placement.main

    @property
    def layer_devices(self) -> list[torch.device]:
        """The devices that compute decoder layers, without repeats."""
        return list(dict.fromkeys(self.placement.layer_devices()))

    @property
    def num_patches(self) -> int:
        """Vision tokens of one tile, the class token included."""
        return int(self.model.model.vision_model.num_patches)

    @property
    def geometry(self) -> Geometry:
        """The sizes that decide which attention backend can run."""
        config = self.text_config
        return Geometry(
            device=self.device,
            dtype=self.dtype,
            num_heads=config.num_attention_heads // self.num_ranks,
            num_kv_heads=config.num_key_value_heads // self.num_ranks,
            head_dim=config.hidden_size // config.num_attention_heads,
            num_patches=self.num_patches,
        )

    @property
    def text_config(self) -> MllamaTextConfig:
        return cast(MllamaTextConfig, self.model.config.text_config)


def load_model(
    folder: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    group: Group | None = None,
) -> LoadedModel:
    """The checkpoint of a local folder on one device: `open_checkpoint`, then `load`.

    device: "auto", "cpu", "cuda" or "cuda:N"; dtype: "auto", "float32", "bfloat16" or "float16";
    quantize: one of `quantization.METHODS`; group: see `load`. Raises ModelError, one line with the
    remedy.
    """
    chosen = choose_device(device)
    checkpoint = open_checkpoint(folder, choose_dtype(dtype, chosen))
    return load(checkpoint, on_one_device(checkpoint.meta_model, chosen), quantize, group=group)


def open_checkpoint(folder: str | Path, dtype: torch.dtype) -> Checkpoint:
    """A local folder as a checkpoint, checked without reading a weight. Raises ModelError."""
    folder = Path(folder)
    check_folder(folder)
    normalization = read_normalization(folder)
    tensors = read_weights(folder)
    return Checkpoint(
        folder, normalization, tensors, build_meta_model(folder, tensors, dtype), dtype
    )


def load(
    checkpoint: Checkpoint,
    placement: Placement,
    quantize: str | None = None,
    is_fused: bool = True,
    group: Group | None = None,
) -> LoadedModel:
    """The checkpoint's model, with every weight where `placement` puts it.

    is_fused: replace decoder layers by those of `decoder/decoder.py` where possible; False keeps
    transformers' modules, to compare with or to split later. group: the ranks that share the model;
    None for one process. Logs progress to stderr. Raises ModelError, one line with the remedy.
    """
    quantization = quantization_config(quantize, checkpoint.dtype)
    share = share_with(checkpoint, group)
    _check_together(placement, quantize, share)
    check_coded(checkpoint, placement, quantize, share)
    _check_readable(checkpoint, placement, quantize)
    model = _read(checkpoint, placement, quantize, quantization, share)
    if placement.is_offloaded_part(VISION):
        _load_as_a_whole(model, VISION, placement.device_of(VISION))
    settle(model, checkpoint.dtype)
    model.eval().requires_grad_(False)
    if group is not None:
        connect(model, share.sides, group)
    with large_buffers_mapped():
        is_joined = is_fused and fuse_layers(model.model.language_model)
        pack_linears(model)
    if is_joined and placement.main.type == "cuda":
        torch.cuda.empty_cache()  # frees the parts of joined weights before memory is measured
    loaded = LoadedModel(
        model,
        checkpoint.normalization,
        checkpoint.folder,
        placement,
        checkpoint.dtype,
        LayerCount(model),
        share,
    )
    # only the text model: the vision encoder keeps transformers' attention
    name = ATTENTION_NAME if len(loaded.layer_devices) == 1 else SPLIT_ATTENTION_NAME
    loaded.text_config._attn_implementation = name
    return loaded


def share_with(checkpoint: Checkpoint, group: Group | None) -> RankShare:
    """This rank's share of the layers. Raises ModelError if the model does not divide by ranks."""
    if group is None or group.size == 1:
        return WHOLE
    check_size(checkpoint.meta_model.config, group.size)
    return RankShare(group.rank, group.size, cut_linears(checkpoint.meta_model, group.size))


def _check_together(placement: Placement, quantize: str | None, share: RankShare) -> None:
    """Raise ModelError for options that do not work together."""
    if quantize not in (None, *OWN_METHODS) and placement.is_offloaded:
        raise ModelError(
            f"--quantize {quantize} does not work with weights offloaded to disk or to the CPU: "
            "remove one of them, or let --device-map use GPUs only"
        )
    is_split = placement.single is None
    if quantize in OWN_METHODS and is_split:
        raise ModelError(
            f"--quantize {quantize} does not work with a --device-map over several devices: use "
            "--tensor-parallel-size, or --quantize bitsandbytes"
        )
    if share.size > 1 and is_split:
        raise ModelError(
            "--tensor-parallel-size and --device-map both split the model: use only one of them"
        )
    if share.size > 1 and quantize not in (None, *OWN_METHODS):
        raise ModelError(
            f"--quantize {quantize} works on one rank only: with --tensor-parallel-size use "
            f"--quantize {' or '.join(OWN_METHODS)}"
        )


def check_coded(
    checkpoint: Checkpoint, placement: Placement, quantize: str | None, share: RankShare
) -> None:
    """Raise ModelError for options that do not work with a checkpoint in 8 or 4 bits."""
    if not checkpoint.is_coded:
        return
    if quantize is not None:
        raise ModelError(
            f"{checkpoint.folder}: the checkpoint is quantized already: remove --quantize "
            f"{quantize}"
        )
    if placement.single is None:
        raise ModelError(
            f"{checkpoint.folder}: a quantized checkpoint does not work with a --device-map over "
            "several devices: use --tensor-parallel-size"
        )
    for tensor in checkpoint.tensors.values():
        side = share.sides.get(tensor.name.removesuffix(".weight"))
        if isinstance(tensor, CodedTensor) and side is Side.IN and is_quantized(tensor.name):
            reason = tensor.layout.why_not_cut(tensor.shape[1], share.size)
            if reason is not None:
                raise ModelError(
                    f"{checkpoint.folder}: {tensor.name} cannot be split over {share.size} ranks: "
                    f"{reason}; use a smaller --tensor-parallel-size"
                )


def _check_readable(checkpoint: Checkpoint, placement: Placement, quantize: str | None) -> None:
    """Raise ModelError for weights that transformers' loader cannot read, if it would have to.

    It reads files, and only an embedding with Mllama's rows beyond the vocabulary.
    """
    if placement.single is not None and quantize in (None, *OWN_METHODS):
        return
    only = f"on one device only, in the compute dtype or with --quantize {' or '.join(OWN_METHODS)}"
    if checkpoint.draw is not None:
        raise ModelError(f"{checkpoint.folder} work {only}")
    if checkpoint.is_resized:
        raise ModelError(f"{checkpoint.folder}: the vocabulary was resized, which works {only}")
    if checkpoint.lacks_metadata:
        raise ModelError(
            f'{checkpoint.folder}: {INDEX} has no metadata, which works {only}; or add "metadata": '
            "{} to it"
        )


def _read(
    checkpoint: Checkpoint,
    placement: Placement,
    quantize: str | None,
    quantization: BitsAndBytesConfig | None,
    share: RankShare,
) -> MllamaForConditionalGeneration:
    """The model with its weights, read by transformers, or tensor by tensor if it cannot."""
    is_own = quantize in OWN_METHODS or checkpoint.is_coded or checkpoint.is_resized
    is_tensor_wise = (
        is_own or share.size > 1 or checkpoint.draw is not None or checkpoint.lacks_metadata
    )
    sizes = {name: tensor.num_bytes for name, tensor in checkpoint.tensors.items()}
    with large_buffers_mapped() if quantize or checkpoint.is_coded else nullcontext():
        if is_tensor_wise:
            return _load_tensor_wise(checkpoint, placement, quantize, share)
        with progress.shown(sizes):
            return _read_weights(checkpoint, placement, quantization)


def _load_tensor_wise(
    checkpoint: Checkpoint, placement: Placement, quantize: str | None, share: RankShare
) -> MllamaForConditionalGeneration:
    """The model on its one device, loaded by `tensor_loader.py`."""
    recipe = Recipe(
        device=placement.main,
        dtype=checkpoint.dtype,
        share=share,
        quantize=quantize,
    )
    shown = progress.ByteProgress(sum(t.num_bytes for t in checkpoint.tensors.values()))
    config, folder = checkpoint.meta_model.config, checkpoint.folder
    try:
        if checkpoint.draw is not None:
            opened = checkpoint.draw(placement.main)
        else:
            opened = open_tensors(folder, checkpoint.tensors)
        return load_tensors(opened, config, recipe, shown.advance, str(folder))
    except OSError as error:
        raise ModelError(f"{checkpoint.folder}: cannot be loaded: {one_line(error)}") from error
    finally:
        shown.close()


def _read_weights(
    checkpoint: Checkpoint, placement: Placement, quantization: BitsAndBytesConfig | None
) -> MllamaForConditionalGeneration:
    read: Any = MllamaForConditionalGeneration.from_pretrained
    folder = checkpoint.folder
    try:
        model, report = read(
            folder,
            config=deepcopy(checkpoint.meta_model.config),  # without a stale quantization_config
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=checkpoint.dtype,
            quantization_config=quantization,
            key_mapping={f"^{re.escape(PEFT_PREFIX)}": ""},
            device_map=placement.device_map,
            output_loading_info=True,
        )
    except Exception as error:  # transformers and safetensors raise many types here
        raise ModelError(f"{folder}: cannot be loaded: {one_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"{folder}: {len(missing)} weights are missing, {missing[0]} among them")
    return cast(MllamaForConditionalGeneration, model)


def _load_as_a_whole(model: nn.Module, part: str, device: torch.device) -> None:
    """Load all weights of an offloaded part when it is called, and drop them after the call.

    For a module whose code reads the device of a child's weight, as transformers' vision model
    reads that of its patch embedding: layer by layer, that weight is not loaded yet.
    """
    module = model.get_submodule(part)
    hooks: list[Any] = [getattr(child, "_hf_hook", None) for child in module.modules()]
    stored = next(hook.weights_map for hook in hooks if getattr(hook, "weights_map", None))
    weights = stored.dataset if isinstance(stored, PrefixedDataset) else stored
    remove_hook_from_module(module, recurse=True)
    hook = AlignDevicesHook(
        execution_device=device,
        offload=True,
        place_submodules=True,
        weights_map=PrefixedDataset(weights, f"{part}."),
    )
    add_hook_to_module(module, hook)
