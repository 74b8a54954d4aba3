"""Llama 3's published tokenizer, as the files of a checkpoint would have it.

Owns where it comes from, the wheel of a package that pip downloads into `build/`, and how its
ranks become a `tokenizer.json`. Nothing of it is kept in this repository.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from .client_environments import INSTALL_TIMEOUT_S, ROOT, made_by_one

PACKAGE = "llama-models==0.0.63"
SHA256 = "7ee43e1f07cb125c64e8514825cd0ba40f2358915fb7207285dc1ff693214423"
FOLDER = ROOT / "build" / "published-tokenizer"
INSIDE = "llama_models/llama3/api/"
NUM_SPECIAL = 256
IMAGE = "<|image|>"


class _RanksConverter(TikTokenConverter):
    """transformers' converter of ranks to merges, without the tiktoken package."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        lines = Path(tiktoken_url).read_bytes().split(b"\n")
        pairs = [line.split() for line in lines if line]
        return {base64.b64decode(token): int(rank) for token, rank in pairs}


def published_wheel() -> Path:
    """The package's wheel, downloaded once; raises if it is another than was pinned."""
    with made_by_one(FOLDER):
        found = list(FOLDER.glob("llama_models-*.whl"))
        if not found:
            command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", PACKAGE]
            subprocess.run([*command, "-d", FOLDER], check=True, timeout=INSTALL_TIMEOUT_S)
            found = list(FOLDER.glob("llama_models-*.whl"))
    (wheel,) = found
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{wheel.name} has the hash {digest}, not the pinned {SHA256}")
    return wheel


def published_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer with the ids of the published Llama-3.2-Vision checkpoints.

    folder: where its ranks may be written to. The package's own table gives `<|image|>` an id among
    the reserved ones; a checkpoint's has it behind them.
    """
    with zipfile.ZipFile(published_wheel()) as wheel:
        ranks = folder / "tokenizer.model"
        ranks.write_bytes(wheel.read(INSIDE + "tokenizer.model"))
        named = special_tokens_of(wheel.read(INSIDE + "tokenizer.py").decode())
    named.remove(IMAGE)
    reserved = [f"<|reserved_special_token_{2 + i}|>" for i in range(NUM_SPECIAL - len(named))]
    tokenizer = _RanksConverter(vocab_file=str(ranks)).converted()
    tokens = [*named, *reserved, IMAGE]
    tokenizer.add_special_tokens([AddedToken(one, special=True) for one in tokens])
    return tokenizer


def special_tokens_of(source: str) -> list[str]:
    """The list of names that the package's tokenizer assigns to `special_tokens`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List):
            (target,) = node.targets
            if isinstance(target, ast.Name) and target.id == "special_tokens":
                return [str(name) for name in ast.literal_eval(node.value)]
    raise ValueError("the package's tokenizer.py names no special_tokens")


def write_published(folder: Path) -> Path:
    """Put the tokenizer into a checkpoint's folder, in place of the one that is there."""
    published_tokenizer(folder).save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder
