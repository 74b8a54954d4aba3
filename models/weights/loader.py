"""Loads a Mllama checkpoint from a local folder onto its devices.

Owns the choice of device and dtype and what is done to the module once. Knows nothing of hubs,
pools or requests, nor of why a part lies where it does. Weights come from safetensors only, each
straight to its device; code from a checkpoint is never run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import BitsAndBytesConfig, MllamaForConditionalGeneration, MllamaTextConfig

from ..attention import Geometry
from ..checkpoint import check_folder
from ..decoder.decoder import fuse_layers
from ..decoder.layer_count import LayerCount
from ..decoder.mllama_fixes import mend_vision
from ..decoder.multi_device import SPLIT_ATTENTION_NAME
from ..decoder.packed_linear import pack_linears
from ..errors import ModelError
from ..kv_cache.paged_cache import ATTENTION_NAME
from ..malloc import large_buffers_mapped
from ..tensor_parallel.group import Group
from ..tensor_parallel.layers import connect
from ..tensor_parallel.plan import check_size, cut_linears
from ..vision.encoder import ImageNormalization, read_normalization
from . import progress
from .device_map import VISION, Placement, on_one_device
from .meta_model import build_skeleton, one_line
from .offload import bring_whole
from .quantization import WEIGHT_ONLY, is_quantized, quantization_config, settle
from .safetensors_headers import StoredTensor, read_tensors
from .tensor_loader import WHOLE, Opened, RankShare, Recipe, assemble, assemble_from

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(slots=True, frozen=True)
class Checkpoint:
    """A folder whose files fit together: what there is to load.

    tensors: by their names in the module. skeleton: the model on the meta device, in `dtype`, the
    type to compute in. draw: makes all tensors on a device, where no file holds them
    (random_weights.py); the folder is then a name only.
    """

    folder: Path
    normalization: ImageNormalization
    tensors: dict[str, StoredTensor]
    skeleton: MllamaForConditionalGeneration
    dtype: torch.dtype
    draw: Callable[[torch.device], Opened] | None = None


@dataclass(slots=True, frozen=True)
class LoadedModel:
    """A model ready to compute: eval mode, on its devices, attention set to the paged function.

    num_ranks: how many share it; heads are then a rank's own.
    """

    model: MllamaForConditionalGeneration
    normalization: ImageNormalization
    folder: Path
    placement: Placement
    dtype: torch.dtype
    layers: LayerCount
    num_ranks: int = 1

    @property
    def device(self) -> torch.device:
        """The main device, where tokens come in: the only one unless the model is split."""
        return self.placement.main

    @property
    def layer_devices(self) -> list[torch.device]:
        """The devices that decoder layers compute on, each once."""
        return list(dict.fromkeys(self.placement.layer_devices()))

    @property
    def num_patches(self) -> int:
        """Vision tokens of one tile, the class token included."""
        return int(self.model.model.vision_model.num_patches)

    @property
    def geometry(self) -> Geometry:
        """What an attention backend is chosen for."""
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
    return load(checkpoint, on_one_device(checkpoint.skeleton, chosen), quantize, group=group)


def open_checkpoint(folder: str | Path, dtype: torch.dtype) -> Checkpoint:
    """What a local folder holds, checked as far as can be without a weight. Raises ModelError."""
    folder = Path(folder)
    check_folder(folder)
    normalization = read_normalization(folder)
    tensors = read_tensors(folder)
    return Checkpoint(folder, normalization, tensors, build_skeleton(folder, tensors, dtype), dtype)


def load(
    checkpoint: Checkpoint,
    placement: Placement,
    quantize: str | None = None,
    is_fused: bool = True,
    group: Group | None = None,
) -> LoadedModel:
    """The checkpoint's model, every weight where `placement` puts it.

    is_fused: exchange decoder layers for those of `decoder.py` where they can be; without, all keep
    transformers' modules, to compare with or to be split afterwards. group: the ranks that share
    it, each with its part of the layers; None for one alone.
    Progress goes to stderr. Raises ModelError, one line with the remedy.
    """
    quantization = quantization_config(quantize, checkpoint.dtype)
    if quantization is not None and placement.is_offloaded:
        raise ModelError(
            f"--quantize {quantize} and weights on disk, or on the CPU beside a GPU, do not go "
            "together: leave one of them out, or let --device-map use GPUs only"
        )
    share = share_with(checkpoint, group)
    _check_together(placement, quantize, share)
    _check_drawn(checkpoint, placement, quantize)
    is_assembled = quantize == WEIGHT_ONLY or share.size > 1 or checkpoint.draw is not None
    sizes = {name: tensor.num_bytes for name, tensor in checkpoint.tensors.items()}
    with large_buffers_mapped() if quantize else nullcontext():
        if is_assembled:
            model = _assembled(checkpoint, placement, quantize == WEIGHT_ONLY, share)
        else:
            with progress.shown(sizes):
                model = _read_weights(checkpoint, placement, quantization)
    if placement.is_offloaded_part(VISION):
        bring_whole(model, VISION, placement.device_of(VISION))
    settle(model, checkpoint.dtype)
    model.eval().requires_grad_(False)
    # published taps are block inputs; transformers collects block outputs
    mend_vision(model)
    if group is not None:
        connect(model, share.sides, group)
    if is_fused and fuse_layers(model.model.language_model) and placement.main.type == "cuda":
        torch.cuda.empty_cache()  # the parts of joined weights, before anyone asks what is free
    pack_linears(model)
    loaded = LoadedModel(
        model,
        checkpoint.normalization,
        checkpoint.folder,
        placement,
        checkpoint.dtype,
        LayerCount(model),
        share.size,
    )
    # the text model alone: the vision encoder keeps transformers' own attention
    name = ATTENTION_NAME if len(loaded.layer_devices) == 1 else SPLIT_ATTENTION_NAME
    loaded.text_config._attn_implementation = name
    return loaded


def share_with(checkpoint: Checkpoint, group: Group | None) -> RankShare:
    """This rank's share of the layers. Raises ModelError where the model does not divide."""
    if group is None or group.size == 1:
        return WHOLE
    check_size(checkpoint.skeleton.config, group.size)
    return RankShare(group.rank, group.size, cut_linears(checkpoint.skeleton, group.size))


def _check_together(placement: Placement, quantize: str | None, share: RankShare) -> None:
    """Raise ModelError for what does not go together."""
    is_split = placement.single is None
    if quantize == WEIGHT_ONLY and is_split:
        raise ModelError(
            "--quantize int8 and a --device-map over several devices do not go together: use "
            "--tensor-parallel-size, or --quantize bitsandbytes"
        )
    if share.size > 1 and is_split:
        raise ModelError(
            "--tensor-parallel-size and --device-map both share the model out: leave one out"
        )
    if share.size > 1 and quantize not in (None, WEIGHT_ONLY):
        raise ModelError(
            f"--quantize {quantize} works on one rank: with --tensor-parallel-size take "
            f"--quantize {WEIGHT_ONLY}"
        )


def _check_drawn(checkpoint: Checkpoint, placement: Placement, quantize: str | None) -> None:
    """Raise ModelError where weights that are drawn would have to be read by transformers."""
    if checkpoint.draw is not None and (
        placement.single is None or quantize not in (None, WEIGHT_ONLY)
    ):
        raise ModelError(
            f"{checkpoint.folder} lie on one device, in the compute type or --quantize "
            f"{WEIGHT_ONLY}"
        )


def _assembled(
    checkpoint: Checkpoint, placement: Placement, is_int8: bool, share: RankShare
) -> MllamaForConditionalGeneration:
    """The model on its one device, by this project's own reading."""
    recipe = Recipe(
        device=placement.main,
        dtype=checkpoint.dtype,
        share=share,
        quantizes=lambda name: is_int8 and is_quantized(f"{name}.weight"),
    )
    shown = progress.ByteProgress(sum(one.num_bytes for one in checkpoint.tensors.values()))
    config, folder = checkpoint.skeleton.config, checkpoint.folder
    try:
        if checkpoint.draw is not None:
            drawn = checkpoint.draw(placement.main)
            return assemble_from(drawn, config, recipe, shown.advance, str(folder))
        return assemble(folder, config, checkpoint.tensors, recipe, shown.advance)
    except OSError as error:
        raise ModelError(f"{checkpoint.folder}: cannot be loaded: {one_line(error)}") from error
    finally:
        shown.close()


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first GPU, else the CPU. Raises ModelError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"device {name!r} is unknown: use auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")
    index = device.index or 0
    if index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ModelError(f"device {name!r} is not there ({count} CUDA devices): use --device cpu")
    return torch.device("cuda", index)


def check_gpus(first: torch.device, count: int, asked: str) -> None:
    """Return if there are so many GPUs from the chosen device on, where that is one.

    asked: the options that need them, for the message. Raises ModelError.
    """
    if first.type != "cuda":
        return
    left = torch.cuda.device_count() - (first.index or 0)
    if left < count:
        raise ModelError(f"{asked} needs {count} CUDA devices and there are {left} from {first} on")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto" is bfloat16 where the device has it in hardware."""
    if name == "auto":
        has_it = _gpu_has_bfloat16(device) if device.type == "cuda" else _cpu_has_bfloat16()
        return torch.bfloat16 if has_it else torch.float32
    if name not in _DTYPES:
        raise ModelError(f"dtype {name!r} is unknown: use auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _gpu_has_bfloat16(device: torch.device) -> bool:
    """Whether the GPU multiplies bfloat16 itself; older ones emulate it."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself; the probes are private and may go."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, probe, lambda: False)()) for probe in probes)


def _read_weights(
    checkpoint: Checkpoint, placement: Placement, quantization: BitsAndBytesConfig | None
) -> MllamaForConditionalGeneration:
    read: Any = MllamaForConditionalGeneration.from_pretrained
    folder = checkpoint.folder
    try:
        model, report = read(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=checkpoint.dtype,
            quantization_config=quantization,
            device_map=placement.device_map,
            output_loading_info=True,
        )
    except Exception as error:  # transformers and safetensors raise many kinds here
        raise ModelError(f"{folder}: cannot be loaded: {one_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"{folder}: {len(missing)} weights are missing, {missing[0]} among them")
    return cast(MllamaForConditionalGeneration, model)
