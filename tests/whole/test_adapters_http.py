"""Adapters over HTTP with the bundled model: listed, used, mixed, loaded and unloaded meanwhile.

That an adapter computes what it should is tested in tests/models/lora. Here the adapters are random
and strong, so that each answers differently, and every answer is compared with that of the same
request alone.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.invariants import CHAT, COMPLETIONS, MODEL, Standing, assert_error, raw_post
from support.polling import wait_until
from support.running import serving

from vlmserve.models.lora.files import CONFIG, WEIGHTS

RANK, HIDDEN, KV, MLP = 4, 128, 64, 384
DECODER = "base_model.model.model.language_model.layers"
TEXT = [(f"{DECODER}.{layer}.mlp.down_proj", MLP, HIDDEN) for layer in range(6)]
IMAGES = [(f"{DECODER}.{layer}.cross_attn.v_proj", HIDDEN, KV) for layer in (1, 3, 4)]
COUNT = "How many shapes are there?"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
ASK = "What is in this image?"
ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "german"


def write_adapter(folder: Path, seed: int, layers, rows: int = 0) -> Path:
    """A random adapter of these layers. rows: more rows than the layers have outputs."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, num_in, num_out in layers:
        a = rng.standard_normal((RANK, num_in)) / num_in**0.5
        b = rng.standard_normal((num_out + rows, RANK)) / RANK**0.5
        tensors[f"{name}.lora_A.weight"] = a.astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = b.astype(np.float32)
    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 16 * RANK,
        "target_modules": "all-linear",
    }
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """fixed: given at the start; root/...: for requests; source: watched, and empty."""
    folder = tmp_path_factory.mktemp("adapters")
    write_adapter(folder / "text", 1, TEXT)
    write_adapter(folder / "sight", 2, IMAGES)
    write_adapter(folder / "root" / "both", 3, TEXT + IMAGES)
    write_adapter(folder / "root" / "wrong", 4, TEXT, rows=1)
    (folder / "source").mkdir()
    return folder


@pytest.fixture(scope="module")
def adapted(folders, tmp_path_factory):
    """Two workers that share what they serve."""
    options = ["--dtype", "float32", "--workers", "2", "--max-loras", "2", "--lora-refresh", "0.2"]
    options += ["--lora", f"german={EXAMPLE}"]
    options += ["--lora", f"text={folders / 'text'}", "--lora", f"sight={folders / 'sight'}"]
    options += ["--allow-lora-updates", "--lora-root", str(folders / "root")]
    options += ["--lora-source", str(folders / "source"), "--metrics-names", "vllm"]
    with serving(tmp_path_factory.mktemp("server"), *options) as server:
        yield Standing(server)


@pytest.fixture
def picture(draw_picture) -> str:
    return draw_picture(1, num_shapes=2).url


def body_of(model: str, url: str | None = None, **more) -> dict:
    parts = [{"type": "text", "text": ASK if url else "Hello!"}]
    parts += [{"type": "image_url", "image_url": {"url": url}}] if url else []
    turn = {"role": "user", "content": parts}
    fields = {"temperature": 0, "max_tokens": 12, "ignore_eos": True} | more
    return {"model": model, "messages": [turn]} | fields


def ask(server: Standing, model: str, url: str | None = None, **more) -> str:
    answer = server.post(CHAT, body_of(model, url, **more))
    assert answer.status == 200, answer.body
    assert answer.json["model"] == model
    return answer.json["choices"][0]["message"]["content"]


def names_of(server: Standing) -> list[str]:
    return [card["id"] for card in server.get("/v1/models").json["data"]]


def is_served(server: Standing, name: str) -> bool:
    """By both workers: each answers some of these connections."""
    return all(name in names_of(server) for _ in range(8))


def is_gone(server: Standing, name: str) -> bool:
    return not any(name in names_of(server) for _ in range(8))


def test_adapters_are_listed_used_and_streamed(adapted, picture):
    listed = adapted.get("/v1/models").json["data"]
    assert [(card["id"], card["parent"]) for card in listed] == [
        (MODEL, None), ("german", MODEL), ("text", MODEL), ("sight", MODEL)
    ]  # fmt: skip
    answers = {name: ask(adapted, name, picture) for name in (MODEL, "text", "sight")}
    assert len(set(answers.values())) == 3
    # an adapter that changes pictures only
    assert ask(adapted, "sight") == ask(adapted, MODEL) != ask(adapted, "text")
    for name, told in answers.items():
        frames = adapted.post(CHAT, body_of(name, picture, stream=True)).frames
        pieces = [json.loads(frame)["choices"][0]["delta"] for frame in frames[:-1]]
        assert "".join(piece.get("content") or "" for piece in pieces) == told


def test_the_tutorial_s_example_answers_in_german(adapted):
    encoded = base64.b64encode((ROOT / "examples" / "shapes.png").read_bytes()).decode()
    url = {"url": f"data:image/png;base64,{encoded}"}
    parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": COUNT}]
    told = {}
    for name in (MODEL, "german"):
        messages = [{"role": "user", "content": parts}]
        body = {"model": name, "messages": messages, "temperature": 0}
        answer = adapted.post(CHAT, body)
        told[name] = answer.json["choices"][0]["message"]["content"]
    assert told == {MODEL: "There are two shapes.", "german": "Es gibt zwei Formen."}
    page = (ROOT / "docs/tutorial/first-adapter.md").read_text()
    assert COUNT in page
    assert all(f"`{text}`" in page for text in told.values())


def test_mixed_requests_answer_as_alone(adapted, picture):
    asked = [(name, url) for name in (MODEL, "text", "sight") for url in (None, picture)]
    alone = {one: ask(adapted, *one) for one in asked}
    with ThreadPoolExecutor(12) as pool:
        mixed = list(pool.map(lambda one: ask(adapted, *one), asked * 4))
    assert mixed == [alone[one] for one in asked * 4]


def test_loading_and_unloading_changes_no_other_answer(adapted, picture):
    alone = {name: ask(adapted, name, picture) for name in (MODEL, "text", "sight")}
    is_over = threading.Event()
    wrong: list[tuple[str, str]] = []

    def keep_asking(name: str) -> int:
        count = 0
        while not is_over.is_set():
            if (told := ask(adapted, name, picture)) != alone[name]:
                wrong.append((name, told))
            count += 1
        return count

    told = set()
    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(keep_asking, name) for name in alone]
        try:
            for _ in range(3):
                loaded = adapted.post(LOAD, {"lora_name": "both", "lora_path": "both"})
                assert loaded.body.decode() == "Success: LoRA adapter 'both' added successfully."
                told.add(ask(adapted, "both", picture))
                assert adapted.post(UNLOAD, {"lora_name": "both"}).status == 200
                for _ in range(8):  # either worker
                    assert_error(adapted.post(CHAT, body_of("both")), 404)
        finally:
            is_over.set()
        assert all(one.result() for one in asking)
    assert not wrong
    assert len(told) == 1
    assert told.isdisjoint(alone.values())


def test_an_adapter_that_does_not_fit_is_a_400_that_names_the_tensor(adapted):
    answer = adapted.post(LOAD, {"lora_name": "wrong", "lora_path": "wrong"})
    error = assert_error(answer, 400)
    assert "down_proj" in error["message"]
    assert error["param"] == "lora_path"
    assert is_gone(adapted, "wrong")


def test_a_watched_folder_is_served_while_it_changes(adapted, folders):
    source = folders / "source"
    write_adapter(folders / "fresh", 5, TEXT).rename(source / "fresh")
    assert wait_until(lambda: is_served(adapted, "fresh"))
    first = ask(adapted, "fresh")
    write_adapter(folders / "fresher", 6, TEXT)
    (folders / "fresher" / WEIGHTS).replace(source / "fresh" / WEIGHTS)
    assert wait_until(lambda: ask(adapted, "fresh") != first)
    (source / "fresh").rename(folders / "old")
    assert wait_until(lambda: is_gone(adapted, "fresh"))
    assert_error(adapted.post(CHAT, body_of("fresh")), 404)


def test_metrics_name_the_adapters_in_use(adapted):
    long = {"model": "text", "prompt": "a", "max_tokens": 3000, "ignore_eos": True, "stream": True}
    running = 'running_lora_adapters="text"'

    def is_named() -> bool:
        text = adapted.get("/metrics").body.decode()
        lines = [one for one in text.splitlines() if one.startswith("vllm:lora_requests_info{")]
        return len(lines) == 1 and 'max_lora="2"' in lines[0] and running in lines[0]

    with socket.create_connection(("127.0.0.1", adapted.server.port)) as client:
        client.sendall(raw_post(COMPLETIONS, long))
        assert wait_until(is_named)
        assert client.recv(12) == b"HTTP/1.1 200"
    assert adapted.metrics()['vlmserve_adapter_requests_total{adapter="text"}'] >= 1


@pytest.fixture
def hashing(folders, start_faulty_server) -> Standing:
    """A server whose engine hashes; an adapter changes its answers to pictures and text."""
    adapters = {"allow_lora_updates": True, "lora_root": str(folders / "root")}
    return Standing(start_faulty_server(server={"adapters": adapters}, engine={"max_loras": 2}))


@pytest.mark.parametrize("name", ["hashing", pytest.param("adapted", marks=pytest.mark.slow)])
def test_a_new_engine_has_the_adapters_that_were_loaded(request, name):
    server = request.getfixturevalue(name)
    # The hashing engine knows by its name what an adapter changes.
    loaded = {"lora_name": "kept-both", "lora_path": "both"}
    assert server.post(LOAD, loaded).status == 200
    before = ask(server, "kept-both")
    assert before != ask(server, MODEL)
    engine = server.engine_pid
    os.kill(engine, signal.SIGKILL)
    assert wait_until(lambda: server.get("/v1/health/ready").status == 503)
    assert wait_until(lambda: server.get("/v1/health/ready").status == 200)
    assert server.engine_pid != engine
    assert wait_until(lambda: server.post(CHAT, body_of("kept-both")).status == 200)
    assert ask(server, "kept-both") == before
