"""Adapters that PEFT made, against the weights that PEFT merged, on the bundled model.

float32 on a CPU, logits at every position within 1e-4.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from support.client_environments import ROOT, quantizer_python
from support.oracle import (
    BLOCK_SIZE,
    Request,
    image,
    image_arguments,
    prefill_logits,
    prompt,
)
from transformers import MllamaForConditionalGeneration

from vlmserve.models.batch import AdapterRef, PoolSizes
from vlmserve.models.bundled import CHECKPOINT
from vlmserve.models.decoder.mllama_fixes import mend
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.kv_cache.pool_sizes import PoolPlan
from vlmserve.models.lora.files import digest_of
from vlmserve.models.lora.limits import AdapterLimits
from vlmserve.models.weights.loader import load_model

pytestmark = pytest.mark.slow
TOLERANCE = 1e-4
TILE_SIZE = 56
SCRIPT = ROOT / "tests" / "quantizers" / "peft_adapters.py"
TIMEOUT_S = 600


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all forms."""
    folder = tmp_path_factory.mktemp("peft")
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    kept |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [str(quantizer_python("peft")), str(SCRIPT), str(CHECKPOINT), str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_S, env=kept, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def requests(digests: dict[str, str]) -> list[Request]:
    """A text and a prompt with two pictures for each adapter, and for none."""
    found = []
    for number, (name, digest) in enumerate({"": "", **digests}.items()):
        pictures = [image(1 + (number + i) % 8, number + i, tile_size=TILE_SIZE) for i in range(2)]
        for text, images in (("only words", []), ("|first then |second?", pictures)):
            request = prompt(f"{name} {text}", text, images)
            request.adapter = digest
            found.append(request)
    return found


def test_a_step_of_all_forms_equals_what_peft_merged(made) -> None:
    names = sorted(path.name for path in made.iterdir())
    assert len(names) == 7
    refs = [AdapterRef(n, str(made / n), digest_of(made / n)) for n in names]
    sizes = PoolSizes(400, 120, BLOCK_SIZE)
    model = load_model(CHECKPOINT, "cpu", "float32")
    limits = AdapterLimits(8, 16, torch.float32)
    runner = ModelRunner(model, PoolPlan(sizes, 400 * BLOCK_SIZE), None, limits)
    assert runner.adapters is not None
    infos = {ref.name: runner.adapters.read(ref) for ref in refs}
    assert {one.rank for one in infos.values()} == {4, 8, 16}
    assert not infos["vision-r4"].changes_text
    assert infos["text-only-r8"].changes_images  # the values of cross-attention
    batch = requests({ref.name: ref.digest for ref in refs})
    logits = prefill_logits(runner, batch, chunk=7)
    base = mend(MllamaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32))
    plain = [expected(base, request) for request in batch]
    for name in ("", *names):
        folder = made / name / "merged" if name else CHECKPOINT
        read = MllamaForConditionalGeneration.from_pretrained
        merged = mend(read(folder, dtype=torch.float32).eval())
        for request, unchanged in zip(batch, plain, strict=True):
            if request.request_id.split(" ")[0] == name:
                wanted = expected(merged, request)
                found = logits[request.request_id]
                torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0.0)
                sees = bool(request.images) or not name or infos[name].changes_text
                assert not name or not sees or (wanted - unchanged).abs().max() > 1e-2


@torch.inference_mode()
def expected(model: MllamaForConditionalGeneration, request: Request) -> torch.Tensor:
    ids = torch.tensor([request.token_ids])
    return model(input_ids=ids, use_cache=False, **image_arguments(request)).logits[0].float()
