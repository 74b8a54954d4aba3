"""Which checkpoints load, which are refused and how, and what pools a machine's memory gives."""

from __future__ import annotations

import ast
import ctypes
import json
import mmap
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.oracle import checkpoint, generate, loaded, prompt
from torch import Tensor, nn
from transformers import MllamaForConditionalGeneration, MllamaProcessor, MllamaTextConfig

from vlmserve.bench.checkpoints import build
from vlmserve.models.batch import PoolSizes
from vlmserve.models.create_runner import create_runner, set_threads
from vlmserve.models.errors import ModelError
from vlmserve.models.kv_cache.paged_cache import allocate_pools, tile_bytes, token_bytes
from vlmserve.models.kv_cache.pool_sizes import PoolRequest, plan_pools
from vlmserve.models.settings.runner_config import RunnerConfig
from vlmserve.models.weights import loader
from vlmserve.models.weights.loader import load_model

PAGE = mmap.PAGESIZE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint("tiny"), tmp_path / "checkpoint"))


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | changes))


def test_a_checkpoint_loads_in_eval_mode_without_gradients() -> None:
    model = loaded("tiny")
    assert not model.model.training
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
    assert {parameter.dtype for parameter in model.model.parameters()} == {torch.float32}
    assert model.num_patches == 5


def test_models_that_load_at_once_leave_no_switch_of_the_process_on() -> None:
    """Ranks in threads once left torch's functions replaced, and later weights were undefined."""
    functions = [nn.init.normal_, nn.init.uniform_, nn.Module.register_parameter]
    with ThreadPoolExecutor(4) as threads:
        loads = [
            threads.submit(load_model, checkpoint("tiny"), "cpu", "float32", "int8")
            for _ in range(8)
        ]
        for load in loads:
            load.result()
    assert [nn.init.normal_, nn.init.uniform_, nn.Module.register_parameter] == functions


def test_only_the_text_model_gets_the_paged_attention() -> None:
    config = loaded("tiny").model.config
    assert config.text_config._attn_implementation == "vlmserve_paged"
    # a runner gives the vision encoder its own
    assert config.vision_config._attn_implementation in ("sdpa", "vlmserve_real_first")


def test_a_sharded_checkpoint_loads(folder: Path, tmp_path: Path) -> None:
    whole = MllamaForConditionalGeneration.from_pretrained(folder)
    whole.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    shutil.copy(folder / "preprocessor_config.json", tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    model = load_model(folder, "cpu", "float32").model
    again = load_model(tmp_path / "sharded", "cpu", "float32").model
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


def rename_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def write_index(shard: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        index = {"metadata": {}, "weight_map": {"lm_head.weight": shard}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "model.safetensors").unlink()

    return write


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[next(name for name in weights if name.endswith("layers.2.mlp.up_proj.weight"))]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def reshape_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[next(name for name in weights if name.endswith("up_proj.weight"))] = torch.ones(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickled weights": (rename_weights, "pytorch_model.bin is a pickle file"),
    "a shard that is a pickle": (write_index("pytorch_model.bin"), "not a safetensors file"),
    "a shard elsewhere": (write_index("../x.safetensors"), "not a safetensors file"),
    "a shard that is missing": (write_index("x.safetensors"), "x.safetensors is missing"),
    "an adapter": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        "not a model",
    ),
    "normalisation of two channels": (
        lambda f: edit(f / "preprocessor_config.json", image_mean=[0.5, 0.5]),
        "2 values for 3 channels",
    ),
    "normalisation by nothing": (
        lambda f: edit(f / "preprocessor_config.json", image_std=[0.5, 0, 0.5]),
        "image_std contains 0",
    ),
    "normalisation by words": (
        lambda f: edit(f / "preprocessor_config.json", rescale_factor="much"),
        "normalisation is invalid",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "config that is no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
    "config that is a list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "another architecture": (
        lambda f: edit(f / "config.json", model_type="llama", architectures=["LlamaForCausalLM"]),
        "is a LlamaForCausalLM; only MllamaForConditionalGeneration",
    ),
    "the text model alone": (
        lambda f: edit(f / "config.json", architectures=["MllamaForCausalLM"]),
        "is a MllamaForCausalLM",
    ),
    "weights cut short": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x08" + b"\0" * 7),
        "model.safetensors is damaged: it is cut short, inside its header",
    ),
    "a weight too few": (drop_a_weight, "1 weights are missing"),
    "a weight of a wrong shape": (
        reshape_a_weight,
        r"has the shape \[3\], but config.json gives \[96, 64\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_that_must_not_load_is_refused_in_one_line(
    folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    apply, message = DAMAGE[damage]
    apply(folder)
    with pytest.raises(ModelError, match=message) as raised:
        load_model(folder, "cpu", "float32")
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)


def test_row_43_code_that_a_checkpoint_names_is_never_run(folder: Path) -> None:
    marker = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    names = {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}
    edit(folder / "config.json", auto_map=names)
    load_model(folder, "cpu", "float32")
    assert not marker.exists()


def test_row_43_a_pickle_beside_safetensors_is_left_alone(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    load_model(folder, "cpu", "float32")


def test_row_43_nothing_of_this_floor_can_unpickle_or_evaluate() -> None:
    """No call of eval, exec, compile or torch.load, no import of pickle, in any source here."""
    for file in Path(loader.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
                assert not names & {"pickle", "marshal", "shelve", "dill", "joblib"}, file
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "compile", "torch.load"}, (file, called)


# --- pools -------------------------------------------------------------------------------------

REQUEST = PoolRequest(
    context_len=1000,
    max_model_len=None,
    max_num_seqs=8,
    max_num_tiles=4,
    block_size=16,
    token_bytes=100,
    tile_bytes=5_000,
)


def test_pools_stop_growing_at_what_all_sequences_can_use() -> None:
    plan = plan_pools(REQUEST, 10**12)
    assert plan.sizes == PoolSizes(8 * 63, 8 * 4 * 2, 16)
    assert plan.max_model_len == 1000


@pytest.mark.parametrize("budget_bytes", [60_000, 100_000, 300_000, 500_000, 900_000])
def test_pools_stay_within_the_budget(budget_bytes: int) -> None:
    sizes = plan_pools(REQUEST, budget_bytes).sizes
    images = sizes.num_image_blocks * REQUEST.tile_bytes
    assert images <= budget_bytes / 2
    assert images + sizes.num_text_blocks * 16 * REQUEST.token_bytes <= budget_bytes
    assert sizes.num_image_blocks >= REQUEST.max_num_tiles


def test_max_model_len_shrinks_to_the_pool_only_if_nobody_asked_for_it() -> None:
    assert plan_pools(REQUEST, 60_000).max_model_len == 288
    with pytest.raises(ModelError, match="max_model_len is 900 but the text pool has only 288 tok"):
        plan_pools(replace(REQUEST, max_model_len=900), 60_000)


def test_max_model_len_over_the_context_is_refused() -> None:
    with pytest.raises(ModelError, match=r"1,001 and the model's context is 1,000"):
        plan_pools(replace(REQUEST, max_model_len=1001), 10**9)


def test_a_budget_too_small_for_one_image_is_refused() -> None:
    with pytest.raises(ModelError, match=r"image pool has 2 tiles .* one image may take 4"):
        plan_pools(REQUEST, 20_000)


def test_block_counts_that_were_asked_for_are_taken() -> None:
    request = replace(REQUEST, num_text_blocks=20, num_image_blocks=5)
    plan = plan_pools(request, 1)
    assert plan.sizes == PoolSizes(20, 5, 16)
    assert plan.max_model_len == 320


def test_bytes_of_a_token_and_a_tile_are_those_of_llama_3_2_11b() -> None:
    """128 KiB a text token and 50 MiB a tile in bf16, by the published configuration."""
    config = MllamaTextConfig()
    assert token_bytes(config, torch.bfloat16) == 128 * 1024
    assert round(tile_bytes(config, 1601, torch.bfloat16) / 2**20) == 50


# --- the entry of the engine process -----------------------------------------------------------


def test_a_tokenizer_that_supports_no_grammars_is_logged_at_the_start(folder: Path, caplog) -> None:
    """The engine used to fail at its start."""
    words = {"type": "WordLevel", "vocab": {"a": 0, "?": 1}, "unk_token": "?"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": words}))
    config = RunnerConfig(device="cpu", dtype="float32", kv_cache_bytes=1 << 20, max_model_len=64)
    create_runner(str(folder), config)
    (line,) = [one for one in caplog.records if "grammar" in one.getMessage()]
    assert line.levelname == "WARNING"
    assert "rejected: the tokenizer does not support grammars" in line.getMessage()


def test_create_runner_makes_a_runner_that_answers() -> None:
    runner = create_runner(
        checkpoint("tiny"),
        RunnerConfig(
            device="cpu",
            dtype="float32",
            max_model_len=256,
            max_num_seqs=4,
            block_size=4,
            kv_cache_bytes=8 << 20,
            num_threads=torch.get_num_threads(),
        ),
    )
    assert runner.info.pools == PoolSizes(4 * 64, 4 * 4 * 2, 4)
    request = prompt("r", "hello")
    generate(runner, [request], num_tokens=3, chunk=100)
    assert len(request.generated) == 3


def resident_bytes(tensor: Tensor) -> int:
    """The tensor's bytes that are in memory, by the page: not what else the process does."""
    start = tensor.data_ptr() // PAGE * PAGE
    num_pages = -(-(tensor.data_ptr() + tensor.nbytes - start) // PAGE)
    pages = (ctypes.c_ubyte * num_pages)()
    status = ctypes.CDLL(None).mincore(
        ctypes.c_void_p(start), ctypes.c_size_t(num_pages * PAGE), pages
    )
    assert status == 0
    return PAGE * sum(page & 1 for page in pages)


def test_pools_take_memory_only_as_they_are_used() -> None:
    """A pool made by torch.zeros was resident at once: 4 GiB for the smallest model."""
    config = loaded("tiny").text_config
    sizes = PoolSizes(num_text_blocks=100_000, num_image_blocks=10_000, block_size=16)
    devices = [torch.device("cpu")] * config.num_hidden_layers
    pools = allocate_pools(config, sizes, 5, torch.float32, devices)
    states = [state for layer in pools.layers for state in (layer.keys, layer.values)]
    assert sum(state.nbytes for state in states) > 1 << 30
    assert sum(map(resident_bytes, states)) < 100 << 20
    assert resident_bytes(torch.ones(1 << 20)) >= 4 << 20, "resident memory is not seen"
    assert {layer.keys.data_ptr() % 64 for layer in pools.layers} == {0}
    assert not pools.layers[0].keys[-1].any()


def test_threads_leave_one_core_of_more_than_two_unless_someone_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    set_threads(None)
    set_threads(3)
    for cores in ({0}, {0, 1}, {0, 1, 2}):
        monkeypatch.setattr("os.sched_getaffinity", lambda pid, cores=cores: cores)
        set_threads(None)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    set_threads(None)
    assert calls == [5, 3, 1, 2, 2]


# --- the random checkpoints --------------------------------------------------------------------


def test_a_random_checkpoint_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build("tiny", tmp_path / name, seed=seed, with_processor=False)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.slow
def test_transformers_processor_reads_a_random_checkpoint(tmp_path: Path) -> None:
    build("tiny", tmp_path)
    processor: Any = MllamaProcessor.from_pretrained(tmp_path)
    content = [{"type": "image"}, {"type": "text", "text": "What is in this image?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    picture = Image.new("RGB", (50, 20))
    inputs = processor(picture, text, add_special_tokens=False, return_tensors="pt")
    assert inputs["input_ids"][0].tolist().count(768) == 1
    assert inputs["pixel_values"].shape == (1, 1, 4, 3, 28, 28)
    assert processor.image_processor.size["height"] == 28
