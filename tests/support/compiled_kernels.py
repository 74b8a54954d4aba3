"""Compiles and assembles every Triton kernel as production launches it, without a GPU: a script.

    python tests/support/compiled_kernels.py 80 86 89 90 [KERNEL ...]

The launches are the project's own, on the meta device: whole steps of Llama-3.2-11B-Vision in
bfloat16, and the attention of 11B and 90B, alone and over 8 ranks. Each kernel is
replaced by a recorder of what it is launched with. Writes one JSON document: an entry for each
launch and compute capability, or the compiler's error. An entry has the bytes of shared memory,
the copies of 16 bytes to shared memory, the largest number of such groups that a wait leaves in
flight, and what the assembler of triton's wheel counts: registers and bytes spilled a thread.
With names of kernels, only theirs. A separate process, as TRITON_INTERPRET must not be set when
triton is imported.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor, nn
from transformers import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaTextModel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, mangle_type

from vlmserve.models.attention import PagedRows, triton_kernels, triton_paged
from vlmserve.models.attention.int8_states import SCALE_DTYPE, Int8States
from vlmserve.models.attention.triton_paged import TritonBackend
from vlmserve.models.decoder import fused_kernels, kernel_launch
from vlmserve.models.decoder.coded import coded_kernels
from vlmserve.models.decoder.coded import product as coded_product
from vlmserve.models.decoder.coded.layout import Coding
from vlmserve.models.decoder.coded.weight import CodedWeight
from vlmserve.models.decoder.decoder import (
    FusedCrossLayer,
    FusedDecoder,
    FusedSelfLayer,
    LayerCount,
)
from vlmserve.models.decoder.int8 import int8_kernels, product
from vlmserve.models.decoder.operations import TritonOperations
from vlmserve.models.execution.graphs.decode import DecodeGraphs, GraphLimits
from vlmserve.models.execution.graphs.recorder import Computation, Recorder
from vlmserve.models.kv_cache.paged_cache import KVPools, LayerCache, PagedStep
from vlmserve.models.lora import kernel_rows, lora_kernels
from vlmserve.models.lora.kernel_rows import KernelRows
from vlmserve.models.lora.slots import SiteSlots

META = torch.device("meta")
DTYPE = torch.bfloat16
NUM_PATCHES = 1601
HEAD_DIM = 128
# query and KV heads of a rank: 11B and 90B, alone and over 8 ranks
HEADS = [(32, 8), (64, 8), (4, 1), (8, 1)]
# over 2 and 4 ranks: the kernels differ from these by one constant, so text that is cut is enough
HEADS_OF_OTHER_RANKS = [(16, 4), (8, 2), (32, 4), (16, 2)]
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
BLOCK_SIZE = 16
# keys of a piece: no row is cut, or all are
PIECES = (1 << 20, 256)
OPTIONS = ("num_warps", "num_stages")
# of CUDA 12.8: what torch's oldest wheels of the supported range bring
PTX_VERSION = 87
ALIGNMENT = [["tt.divisibility", 16]]


@dataclass
class Launch:
    """A kernel as it was launched: everything that compiling it depends on."""

    kernel: JITFunction[Any]
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, int]

    @property
    def key(self) -> str:
        return repr((self.kernel.__name__, self.signature, self.constants, self.options))

    @property
    def title(self) -> str:
        named = {k: v for k, v in self.constants.items() if k.isupper()}
        return f"{self.kernel.__name__} {named} {self.options}"


class LaunchKeeper:
    """Stands in a kernel's place: keeps launches, computes nothing."""

    def __init__(self, kernel: JITFunction[Any], launches: dict[str, Launch]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(size > 0 for size in grid), "a grid without programs"
        return self._record

    def _record(self, *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        bound = inspect.signature(self._kernel.fn).bind(*args, **kwargs).arguments
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self._kernel.params):
            value = bound[parameter.name]
            is_fixed = parameter.is_constexpr
            # as triton's own launcher: 1 is compiled in, multiples of 16 are told
            if isinstance(value, int) and value == 1 and not parameter.do_not_specialize:
                is_fixed = True
            if is_fixed:
                signature[parameter.name] = "constexpr"
                constants[parameter.name] = value
                continue
            signature[parameter.name] = mangle_type(value)
            is_multiple = isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)
            if is_multiple and not parameter.do_not_specialize:
                attributes[(index,)] = ALIGNMENT
        launch = Launch(self._kernel, signature, constants, attributes, options)
        self._launches.setdefault(launch.key, launch)


def main() -> None:
    """Record, compile for the given capabilities, tell."""
    entries, named = [], {word for word in sys.argv[1:] if not word.isdigit()}
    for capability in [int(word) for word in sys.argv[1:] if word.isdigit()]:
        triton_paged.capability_of = lambda device, c=capability: divmod(c, 10)  # type: ignore[assignment,misc]
        launches: dict[str, Launch] = {}
        with torch.inference_mode():
            record(launches)
        chosen = [one for one in launches.values() if not named or one.kernel.__name__ in named]
        entries += [compiled(launch, capability) for launch in chosen]
    kernels = [fused_kernels, triton_kernels, int8_kernels, coded_kernels, lora_kernels]
    names = sorted(
        name
        for module in kernels
        for name, value in vars(module).items()
        if isinstance(value, JITFunction)
    )
    print(json.dumps({"kernels": names, "launches": entries}))


def record(launches: dict[str, Launch]) -> None:
    """Launch what a server does: prefills, decodes of text and of images, int8 products."""

    def recorders(module: Any) -> SimpleNamespace:
        found = {n: v for n, v in vars(module).items() if isinstance(v, JITFunction)}
        return SimpleNamespace(**{n: LaunchKeeper(v, launches) for n, v in found.items()})

    for heads, kv_heads in HEADS:
        for dtype in (torch.bfloat16, torch.float16) if heads == 32 else (torch.bfloat16,):
            for piece in PIECES:
                backend = TritonBackend(piece)
                backend._kernels = recorders(triton_kernels)  # type: ignore[assignment]
                attend(backend, heads, kv_heads, dtype)

    for heads, kv_heads in HEADS_OF_OTHER_RANKS:
        backend = TritonBackend(PIECES[1])
        backend._kernels = recorders(triton_kernels)  # type: ignore[assignment]
        attend(backend, heads, kv_heads, torch.bfloat16, sees=False)

    backend = TritonBackend(PIECES[1])
    backend._kernels = recorders(triton_kernels)  # type: ignore[assignment]
    attend_int8(backend, *HEADS[0])

    kernel_launch.fused_kernels = recorders(fused_kernels)  # type: ignore[assignment]
    product.int8_kernels = recorders(int8_kernels)  # type: ignore[assignment]
    coded_product.kernels = SimpleNamespace(  # type: ignore[assignment]
        **vars(coded_kernels) | vars(recorders(coded_kernels))
    )
    decoder, pools = model_and_pools()
    for piece in PIECES:
        backend = TritonBackend(piece)
        backend._kernels = recorders(triton_kernels)  # type: ignore[assignment]
        for lens in ([1], [1, 1, 1], [40, 1, 300]):
            for sees in (False, True):
                run_step(decoder, pools, backend, lens, sees)
    record_graphs(decoder, pools, backend)
    for num_rows in (1, 32, 64, 130):
        for num_out, num_in in ((28672, 4096), (4096, 14336)):
            rows = torch.empty(num_rows, num_in, dtype=DTYPE, device=META)
            codes = torch.empty(num_out, num_in, dtype=torch.int8, device=META)
            product.fused_product(rows, codes, torch.empty(num_out, dtype=DTYPE, device=META))
            launch_coded(rows, num_out, num_in)
    kernel_rows.lora_kernels = recorders(lora_kernels)  # type: ignore[assignment]
    for num_rows in (1, 16, 301):
        for num_in, num_outs in (
            (4096, (4096, 1024, 1024)),
            (4096, (14336,) * 2),
            (14336, (4096,)),
        ):
            change_by_adapters(num_rows, num_in, num_outs)


def attend(
    backend: TritonBackend,
    num_heads: int,
    num_kv_heads: int,
    dtype: torch.dtype,
    sees: bool = True,
) -> None:
    """Decodes beside a chunk of a prompt, over text and, if it sees images, over four tiles."""
    starts = np.array([0, 1, 301])
    query = torch.empty(301, num_heads, HEAD_DIM, dtype=dtype, device=META)
    pools = ((BLOCK_SIZE, True), (NUM_PATCHES, False)) if sees else ((BLOCK_SIZE, True),)
    for size, is_causal in pools:
        width = 512 if is_causal else 4
        lens = np.full(2, 8_000 if is_causal else 4 * NUM_PATCHES)
        rows = PagedRows(starts, lens, np.zeros((2, width), dtype=np.int64), size, is_causal)
        cache = torch.empty(64, size, num_kv_heads, HEAD_DIM, dtype=dtype, device=META)
        backend.attend(query, cache, cache, backend.prepare(rows, META, dtype), HEAD_DIM**-0.5)


def attend_int8(backend: TritonBackend, num_heads: int, num_kv_heads: int) -> None:
    """Decodes beside a chunk of a prompt, over four tiles in int8."""
    query = torch.empty(301, num_heads, HEAD_DIM, dtype=DTYPE, device=META)
    table = np.zeros((2, 4), dtype=np.int64)
    lens = np.full(2, 4 * NUM_PATCHES)
    rows = PagedRows(np.array([0, 1, 301]), lens, table, NUM_PATCHES, is_causal=False)
    codes = torch.empty(64, NUM_PATCHES, num_kv_heads, HEAD_DIM, dtype=torch.int8, device=META)
    scales = torch.empty(codes.shape[:-1], dtype=SCALE_DTYPE, device=META)
    cache = Int8States(codes, scales, DTYPE)
    backend.attend(query, cache, cache, backend.prepare(rows, META, DTYPE), HEAD_DIM**-0.5)


def launch_coded(rows: torch.Tensor, num_out: int, num_in: int) -> None:
    """Products of each coding: FP8 by channel, the others in groups, INT4 with zero points too."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=META)

    for coding in Coding:
        groups = 1 if coding is Coding.FP8 else num_in // (64 if coding is Coding.TABLE4 else 128)
        dtype = torch.int8 if coding is Coding.INT8 else torch.uint8
        codes = meta(num_out, num_in * coding.bits // 8, dtype=dtype)
        zeros = meta(num_out, groups, dtype=torch.int16) if coding is Coding.INT4 else None
        table = meta(16) if coding is Coding.TABLE4 else None
        weight = CodedWeight(coding, codes, meta(num_out, groups), zeros, table)
        coded_product.fused_product(rows, weight)


def change_by_adapters(num_rows: int, num_in: int, num_outs: tuple[int, ...]) -> None:
    """A product changed by three of eight adapters, to rank 64."""
    site = SiteSlots.empty(8, 64, num_in, num_outs, DTYPE, META)
    rows = KernelRows(np.arange(num_rows) % 3, 8, META)
    result = torch.empty(num_rows, sum(num_outs), dtype=DTYPE, device=META)
    rows.change(result, torch.empty(num_rows, num_in, dtype=DTYPE, device=META), site)


def model_and_pools() -> tuple[FusedDecoder, KVPools]:
    """Two layers of the published sizes, one of each kind, on the meta device."""
    config = MllamaTextConfig(num_hidden_layers=2, cross_attention_layers=[1])
    with META:
        model: Any = MllamaTextModel(config).to(DTYPE)
    model.layers = nn.ModuleList(
        [FusedSelfLayer(model.layers[0]), FusedCrossLayer(model.layers[1])]
    )
    heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads

    def cache(num_blocks: int, size: int) -> LayerCache:
        shape = (num_blocks, size, heads, dim)
        return LayerCache(*(torch.empty(shape, dtype=DTYPE, device=META) for _ in range(2)))

    layers = [cache(4096, BLOCK_SIZE), cache(64, NUM_PATCHES)]
    return FusedDecoder(model, TritonOperations()), KVPools(layers, frozenset([1]), NUM_PATCHES)


def run_step(
    decoder: FusedDecoder, pools: KVPools, backend: TritonBackend, lens: list[int], sees: bool
) -> None:
    """One step of sequences with so many new tokens each; `sees`: they see a new image of four."""
    num_tokens, starts = sum(lens), np.concatenate([[0], np.cumsum(lens)])
    table = np.zeros((len(lens), 512), dtype=np.int64)
    text = PagedRows(starts, np.full(len(lens), 8000), table, BLOCK_SIZE, is_causal=True)
    tiles = np.zeros((len(lens), 4), dtype=np.int64)
    cross = PagedRows(starts, np.full(len(lens), 4 * NUM_PATCHES), tiles, NUM_PATCHES, False)
    image_slots = torch.empty(4 * NUM_PATCHES, dtype=torch.long, device=META) if sees else None
    ids = torch.empty(num_tokens, dtype=torch.long, device=META)
    step = PagedStep(
        backend=backend,
        text_slots=ids,
        image_slots=image_slots,
        text_plan=backend.prepare(text, META, DTYPE),
        cross_plan=backend.prepare(cross, META, DTYPE) if sees else None,
    )
    vision = torch.empty(4 * NUM_PATCHES, 4096, dtype=DTYPE, device=META) if sees else None
    row_masks = [None, torch.empty(num_tokens, 1, dtype=DTYPE, device=META)] if sees else [None]
    for row_mask in row_masks:
        decoder(ids, ids, vision, row_mask, pools, step)


class OnePass(Recorder):
    """Computes once; there is nothing to replay on the meta device."""

    def record(self, compute: Computation) -> Computation:
        compute()
        return compute


def record_graphs(decoder: FusedDecoder, pools: KVPools, backend: TritonBackend) -> None:
    """What decode graphs launch: their slots are int32."""
    limits = GraphLimits(max_num_seqs=2, max_model_len=8192, block_size=BLOCK_SIZE, max_num_tiles=4)
    layers = LayerCount(decoder._text_model)
    DecodeGraphs(decoder, pools, backend, limits, OnePass(), layers)


def compiled(launch: Launch, capability: int) -> dict[str, Any]:
    """An entry of the document."""
    entry = {
        "kernel": launch.kernel.__name__,
        "launch": launch.title,
        "capability": capability,
    }
    try:
        metadata = to_ptx(launch, capability)
    except Exception as error:  # whatever a stage of the compiler raises
        return entry | {"error": f"{type(error).__name__}: {error}"}
    return entry | metadata


def to_ptx(launch: Launch, capability: int) -> dict[str, Any]:
    """What the PTX tells. As `triton.compile`, whose last stage would assemble it."""
    from triton._C.libtriton import ir

    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    options = backend.parse_options({**launch.options, "ptx_version": PTX_VERSION})
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    stages: dict[str, Callable[..., Any]] = {}
    backend.add_stages(stages, options, source.language)
    codegen, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(target, options, codegen, modules, context)
    metadata: dict[str, Any] = {"target": target, **options.__dict__}
    for stage in _until_ptx(stages):
        module = stage(module, metadata)
    assert ".entry" in module or ".visible" in module, "no PTX came out"
    copies = re.findall(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", module)
    waits = map(int, re.findall(r"cp\.async\.wait_group\s+(?:0x)?(\d+)", module))
    counts = {
        "shared_bytes": metadata["shared"],
        "wide_copies": len(copies),
        "left_in_flight": max(waits, default=0),
    }
    return counts | assembled(module)


def assembled(ptx: str) -> dict[str, int]:
    """Registers, and bytes spilled a thread, by the assembler; raises CalledProcessError."""
    (target,) = re.findall(r"\.target (\w+)", ptx)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [str(PTXAS), "-v", f"--gpu-name={target}", str(file), "-o", f"{folder}/kernel"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {
        "registers": re.search(r"Used (\d+) registers", done.stderr),
        "spilled_bytes": re.search(r"(\d+) bytes spill stores", done.stderr),
    }
    return {name: int(match.group(1)) if match else 0 for name, match in found.items()}


def _until_ptx(stages: dict[str, Callable[..., Any]]) -> Iterator[Callable[..., Any]]:
    for name, stage in stages.items():
        yield stage
        if name == "ptx":
            return


if __name__ == "__main__":
    main()
