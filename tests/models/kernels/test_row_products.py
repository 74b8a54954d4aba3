"""Products by this project's C: right, the same bits for a row in any batch, only where wanted."""

import logging
import subprocess

import pytest
import torch
from support.oracle import checkpoint, oracle_logits, prefill_logits, requests
from torch import nn

from vlmserve.models.create_runner import create_runner
from vlmserve.models.decoder import packed_linear
from vlmserve.models.decoder.packed_linear import PackedLinear, PackedWeight, pack_linears
from vlmserve.models.kernels import c_library, cpu_trial, row_products
from vlmserve.models.kernels.row_products import RowWeight
from vlmserve.models.settings.runner_config import RunnerConfig

HALF = torch.bfloat16
# half a unit in the last place
ROUNDING = {torch.float32: 2**-24, HALF: 2**-8}
COUNTS = (1, 2, 3, 4, 5, 6, 7, 13, 64, 241, 500)


@pytest.fixture
def library():
    if row_products._loaded() is None:
        pytest.skip("no C compiler")


@pytest.fixture
def always(library, monkeypatch):
    """The C multiplies every weight, however small, whatever the trial finds."""
    monkeypatch.setattr(row_products, "MIN_SIDE", 1)
    monkeypatch.setattr(packed_linear, "are_rows_faster", lambda dtype: True)
    monkeypatch.setattr(packed_linear, "_has_operators", lambda dtype: False)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def weight_of(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    return (random(*shape) * (20 if dtype == torch.int8 else 1)).to(dtype)


def assert_rounded_once(
    found: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, addend: torch.Tensor | float = 0
) -> None:
    """That it is the product plus the addend; each of K sums in float32 rounds once."""
    rows, weight = rows.double(), weight.double()
    exact = rows @ weight.T + addend
    sums = rows.shape[-1] * 2**-24 * (rows.abs() @ weight.abs().T + 1)
    assert (found.double() - exact).abs().le(exact.abs() * ROUNDING[found.dtype] + sums).all()


@pytest.mark.parametrize("row_dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.int8], ids=str)
@pytest.mark.parametrize("shape", [(64, 48), (37, 130), (145, 1025), (16, 2300), (3, 1)])
@torch.inference_mode()
def test_products_are_the_exact_ones_rounded_once(library, shape, dtype, row_dtype):
    weight, (num_out, num_in) = weight_of(shape, dtype), shape
    packed = RowWeight(weight)
    for count in COUNTS:
        rows, addend = random(count, num_in, dtype=row_dtype), random(count, num_out)
        assert_rounded_once(packed.product(rows), rows, weight)
        addend = addend.to(row_dtype)
        found = packed.product_plus(rows, addend)
        assert_rounded_once(found, rows, weight, addend.double())


@pytest.mark.parametrize("row_dtype", [torch.float32, HALF], ids=str)
@torch.inference_mode()
def test_scales_come_before_the_bias_and_shapes_are_kept(library, row_dtype):
    codes, rows = weight_of((83, 96), torch.int8), random(2, 5, 96, dtype=row_dtype)
    scales, bias = random(83, dtype=row_dtype), random(83, dtype=row_dtype)
    found = RowWeight(codes, bias, scales).product(rows)
    assert found.shape == (2, 5, 83)
    assert_rounded_once(found, rows, codes.double() * scales.double()[:, None], bias.double())


@pytest.mark.parametrize("row_dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.int8], ids=str)
@torch.inference_mode()
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(library, dtype, row_dtype):
    packed, rows = RowWeight(weight_of((333, 1300), dtype)), random(500, 1300, dtype=row_dtype)
    num_threads = torch.get_num_threads()
    whole = packed.product(rows)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for count in COUNTS:
                assert torch.equal(packed.product(rows[-count:]), whole[-count:])
    finally:
        torch.set_num_threads(num_threads)


@torch.inference_mode()
def test_what_is_no_number_stays_so(library):
    """A NaN whose bits were rounded up like a number's would become 0 or infinite."""
    weight = torch.eye(32)
    states = torch.zeros(1, 32)
    states.view(torch.int32)[0, 3] = 0x7FFFFFFF
    found = RowWeight(weight).product(states)
    assert found.isnan().all()
    half = RowWeight(weight).product(torch.full((1, 32), float("inf"), dtype=HALF))
    assert half.isnan().all()
    large = torch.full((1, 32), 3.0e38)
    assert RowWeight(weight.bfloat16() * 3).product(large.bfloat16()).isposinf().all()


@torch.inference_mode()
def test_rows_with_gaps_and_no_rows_are_multiplied(library):
    packed, rows = RowWeight(weight_of((64, 48), torch.float32)), random(8, 96)[:, ::2]
    assert torch.equal(packed.product(rows), packed.product(rows.contiguous()))
    assert packed.product(random(0, 48)).shape == (0, 64)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_linear_layers_use_it_and_free_their_weight(always, dtype):
    model = nn.Sequential(nn.Linear(48, 80, dtype=dtype))
    states = random(2, 7, 48, dtype=dtype)
    linear = model[0]
    assert pack_linears(model) == 1
    assert isinstance(model[0], PackedLinear)
    assert isinstance(model[0]._packed, RowWeight)
    assert not [one for one in model.parameters() if one.dim() == 2]
    exact = states.double() @ linear.weight.double().T + linear.bias.double()
    torch.testing.assert_close(model(states).double(), exact, atol=1e-5, rtol=ROUNDING[dtype])


@pytest.mark.parametrize(
    ("gains", "is_taken"),
    [((2.0, 2.0, 1.0), True), ((1.0, 1.1, 1.0), False), ((3.0, 3.0, 0.5), False)],
)
def test_the_trial_asks_for_a_gain_and_for_no_loss_with_many_rows(
    library, gains, is_taken, monkeypatch
):
    left = [seconds for gain in gains for seconds in (gain, 1.0)]
    monkeypatch.setattr(cpu_trial, "fastest_s", lambda run: left.pop(0))
    assert row_products.is_faster(torch.ones(64, 64), [lambda rows: rows]) is is_taken
    assert not left


def test_bfloat16_instructions_are_preferred(library, monkeypatch):
    monkeypatch.setattr(row_products, "MIN_SIDE", 1)
    monkeypatch.setattr(packed_linear, "are_rows_faster", lambda dtype: True)
    for has in (True, False):
        monkeypatch.setattr(packed_linear, "_has_operators", lambda dtype, has=has: has)
        assert packed_linear._takes_rows(torch.ones(8, 8, dtype=HALF)) is not has


def test_wrong_results_leave_products_to_torch(library, monkeypatch, caplog):
    monkeypatch.setattr(RowWeight, "product", lambda self, states: torch.zeros(len(states), 83))
    with caplog.at_level(logging.WARNING):
        assert not row_products.is_right.__wrapped__(torch.float32)
    assert "the trial was off by" in caplog.text


def test_without_a_compiler_torch_computes(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("CC", str(tmp_path / "none"))
    monkeypatch.setattr(row_products, "_loaded", row_products._loaded.__wrapped__)
    with caplog.at_level(logging.INFO):
        assert not row_products.is_right.__wrapped__(torch.float32)
    assert "no C compiler was found" in caplog.text


def test_a_library_is_built_once(library, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "one.c"
    source.write_text("int one(void) { return 1; }\n")
    assert c_library.load(source).one() == 1
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("built again"))
        assert c_library.load(source).one() == 1
    source.write_text("int one(void) { return 2; }\n")
    assert c_library.load(source).one() == 2
    assert len(list((tmp_path / "vlmserve" / "kernels").iterdir())) == 2


def test_a_source_with_errors_is_reported_and_leaves_no_file(
    library, monkeypatch, caplog, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "one.c"
    source.write_text("int one(void) { return x; }\n")
    with caplog.at_level(logging.INFO):
        assert c_library.load(source) is None
    assert "undeclared" in caplog.text
    assert not list((tmp_path / "vlmserve" / "kernels").iterdir())


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_that_others_may_write_is_not_used(library, mode, monkeypatch, caplog, tmp_path):
    """Another user could put a library there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "vlmserve" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(mode)
    source = tmp_path / "one.c"
    source.write_text("int one(void) { return 1; }\n")
    with caplog.at_level(logging.INFO):
        assert c_library.load(source).one() == 1
    assert "others may write" in caplog.text
    assert not list(folder.iterdir())


def test_without_a_cache_folder_each_start_builds(library, monkeypatch, caplog, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    source = tmp_path / "one.c"
    source.write_text("int one(void) { return 1; }\n")
    with caplog.at_level(logging.INFO):
        assert c_library.load(source).one() == 1
    assert "compiled at every start" in caplog.text


def runner_of(**settings):
    config = RunnerConfig(
        device="cpu", block_size=4, num_text_blocks=200, num_image_blocks=40, **settings
    )
    return create_runner(checkpoint("tiny"), config)


def packed_of(runner) -> list[object]:
    values = [value for module in runner._model.modules() for value in vars(module).values()]
    return [one for one in values if isinstance(one, (PackedWeight, RowWeight))]


def test_a_model_of_such_layers_gives_the_oracles_logits(always):
    """The tests' models are too small to use it otherwise."""
    runner = runner_of(dtype="float32")
    assert all(isinstance(one, RowWeight) for one in packed_of(runner))
    assert packed_of(runner)
    batch = requests("apart", "text")
    for name, logits in prefill_logits(runner, batch, chunk=6).items():
        request = next(one for one in batch if one.request_id == name)
        torch.testing.assert_close(logits, oracle_logits("tiny", request), atol=4e-5, rtol=0.0)


def test_the_option_leaves_products_to_torch(always):
    assert not packed_of(runner_of(dtype="float32", cpu_products="torch"))
