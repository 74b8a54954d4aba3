"""Paged rows with what they hold, dense attention over the same, and the backends to compare.

Every slot that no row owns is NaN, so a backend that reads one cannot pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import pytest
import torch
from support.fake_kernels import FLASH_ATTN, varlen_attn_of
from torch import Tensor

from vlmserve.models.attention import (
    AttentionBackend,
    Geometry,
    PagedRows,
    backend_class,
    get_backend,
)
from vlmserve.models.attention.flash_attn_package import FlashAttnBackend
from vlmserve.models.attention.torch_varlen import VarlenBackend
from vlmserve.models.attention.triton_paged import TritonBackend
from vlmserve.models.kernels import paged_attention

HEAD_DIM = 16
SCALE = 0.25


@dataclass(frozen=True)
class Subject:
    """A backend under test: how it is made, and the device that it computes on."""

    make: Callable[[], AttentionBackend]
    block_multiple: int = 1
    device: str = "cpu"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)


def on_cuda(name: str):
    """The backend with its own kernels on the first GPU; skipped with the reason elsewhere."""
    geometry = Geometry(torch.device("cuda", 0), torch.bfloat16, 6, 2, HEAD_DIM, 5)
    has_cuda = torch.cuda.is_available()
    reason = backend_class(name).why_not(geometry) if has_cuda else "there is no CUDA device"
    multiple = backend_class(name).block_multiple
    half = (torch.bfloat16, torch.float16)
    dtypes = half if name in ("flash_attn", "varlen") else (*half, torch.float32)
    subject = Subject(lambda: get_backend(name), multiple, "cuda", dtypes)
    marks = [pytest.mark.gpu, pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}")]
    return pytest.param(subject, id=f"{name}-cuda", marks=marks)


def _numbers(package: str) -> tuple[int, ...]:
    """Major and minor of an installed package's version."""
    return tuple(int(number) for number in version(package).split(".")[:2])


def needs_interpreter() -> pytest.MarkDecorator:
    """Skips where triton's interpreter and numpy do not fit.

    triton 3.6 makes numbers of arrays in a way that numpy 2.4 ended.
    """
    fits = _numbers("triton") >= (3, 7) or _numbers("numpy") < (2, 4)
    return pytest.mark.skipif(not fits, reason="triton's interpreter is older than numpy 2.4")


def cpu_backend() -> AttentionBackend:
    """The backend in C; skips without a compiler, or if the CPU's vectors are wider than a head.

    When a test runs, not when tests are collected: the first call compiles.
    """
    if not paged_attention.fits(torch.bfloat16, HEAD_DIM):
        pytest.skip("no gcc, or vectors of more than 8 numbers")
    return get_backend("cpu")


def interpreted(name: str, piece: int | None = None):
    """The Triton backend on a CPU, its kernels run by triton's interpreter (see conftest.py)."""
    subject = Subject(lambda: TritonBackend(piece))
    # whole rows are tried in every run, pieces of them in the long one
    marks = [needs_interpreter()] + ([] if piece is None else [pytest.mark.slow])
    return pytest.param(subject, id=name, marks=marks)


SUBJECTS = [
    pytest.param(Subject(lambda: get_backend("sdpa")), id="sdpa"),
    pytest.param(Subject(cpu_backend), id="cpu"),
    pytest.param(Subject(lambda: FlashAttnBackend(FLASH_ATTN), 256), id="flash_attn-fake"),
    pytest.param(
        Subject(lambda: VarlenBackend(varlen_attn_of("FA2"), "FA2"), 256), id="varlen-fake"
    ),
    pytest.param(
        Subject(lambda: VarlenBackend(varlen_attn_of("FA3"), "FA3"), 256), id="varlen-fake-FA3"
    ),
    interpreted("triton-interpreter"),
    interpreted("triton-interpreter-pieces", piece=96),
    on_cuda("sdpa"),
    on_cuda("flash_attn"),
    on_cuda("varlen"),
    on_cuda("triton"),
]


@dataclass
class Case:
    """Rows over one layer's pool, and what each row's keys and values are, unpaged."""

    rows: PagedRows
    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    keys: list[Tensor]
    values: list[Tensor]


def make_case(
    lens: list[tuple[int, int]],
    *,
    is_causal: bool,
    block_size: int = 4,
    num_kv_heads: int = 2,
    group: int = 3,
    head_dim: int = HEAD_DIM,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Rows of (query_len, key_len) in blocks of random places; every other slot is NaN.

    Block 0, which pads the table, is one of these for even seeds.
    """
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    counts = [-(-key_len // block_size) for _, key_len in lens]
    num_blocks = sum(counts) + 3
    places = [place for place in rng.permutation(num_blocks).tolist() if place or seed % 2]
    table = np.zeros((len(lens), max(1, *counts)), dtype=np.int64)
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    caches = [torch.full(shape, float("nan"), dtype=dtype) for _ in range(2)]
    own: tuple[list[Tensor], list[Tensor]] = ([], [])
    for row, ((_, key_len), count) in enumerate(zip(lens, counts, strict=True)):
        blocks = [places.pop() for _ in range(count)]
        table[row, :count] = blocks
        slots = [blocks[j // block_size] * block_size + j % block_size for j in range(key_len)]
        for cache, unpaged in zip(caches, own, strict=True):
            fresh = torch.randn(key_len, num_kv_heads, head_dim, generator=generator).to(dtype)
            cache.view(-1, num_kv_heads, head_dim)[slots] = fresh
            unpaged.append(fresh)
    starts = np.concatenate([[0], np.cumsum([q for q, _ in lens])]).astype(np.int64)
    key_lens = np.array([k for _, k in lens], dtype=np.int64)
    rows = PagedRows(starts, key_lens, table, block_size, is_causal)
    num_heads = num_kv_heads * group
    query = torch.randn(rows.num_queries, num_heads, head_dim, generator=generator).to(dtype)
    return Case(rows, query, caches[0], caches[1], own[0], own[1])


def dense(case: Case, scale: float) -> Tensor:
    """Softmax attention row by row and head by head in float64; zeros where a row has no key."""
    output = torch.zeros(case.query.shape, dtype=torch.float64)
    starts, num_heads = case.rows.query_start_loc.tolist(), case.query.shape[1]
    for row, (keys, values) in enumerate(zip(case.keys, case.values, strict=True)):
        query_len, key_len = starts[row + 1] - starts[row], len(keys)
        if key_len == 0:
            continue
        for head in range(num_heads):
            kv_head = head // (num_heads // keys.shape[1])
            query = case.query[starts[row] : starts[row + 1], head].double()
            scores = query @ keys[:, kv_head].double().T * scale
            if case.rows.is_causal:
                unseen = torch.ones(query_len, key_len).triu(key_len - query_len + 1).bool()
                scores = scores.masked_fill(unseen, float("-inf"))
            mixed = scores.softmax(-1) @ values[:, kv_head].double()
            output[starts[row] : starts[row + 1], head] = mixed
    return output


def attend(subject: Subject, case: Case, scale: float = SCALE) -> Tensor:
    """The backend's output for a case, back on the CPU."""
    backend, device = subject.make(), torch.device(subject.device)
    plan = backend.prepare(case.rows, device, case.query.dtype)
    tensors = (t.to(device) for t in (case.query, case.key_cache, case.value_cache))
    return backend.attend(*tensors, plan, scale).cpu()
