"""The settings of a model's runner: types, defaults, bounds and command-line options.

The engine's settings extend these (router/config.py). Never imports torch.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from ..batch import NonNegative, Positive
from .option import Limit, Option

MODEL, ENGINE, ADAPTERS = "Model", "Engine", "Adapters"


class RunnerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything `create_runner` needs besides the checkpoint.

    max_memory: bytes by "0", "1", ... and "cpu". num_sharers: how many engines share a CPU's
    memory. None leaves the choice to the runner.
    """

    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Option(
            "Compute type. auto: bfloat16 if the device supports it, float16 on GPUs of compute "
            "capability 7.0 to 7.5, else float32.",
            MODEL,
        ),
    ] = "auto"
    device: Annotated[
        str, Option("auto, cpu, cuda or cuda:N. auto: CUDA if there is a GPU.", MODEL)
    ] = "auto"
    device_map: Annotated[
        str | None,
        Option(
            "Place the model on several devices. auto: one GPU if the model fits. balanced: all "
            "GPUs evenly. A JSON file maps modules to a GPU number, cpu or disk. Several GPUs are "
            "unverified.",
            MODEL,
            metavar="auto|balanced|FILE",
        ),
    ] = None
    max_memory: Annotated[
        dict[str, Positive] | None,
        Option(
            "Maximum memory for the model per device, such as 0=20GiB,cpu=40GiB. Devices not named "
            "are not used. The rest goes to disk.",
            MODEL,
            metavar="DEVICE=BYTES,...",
        ),
    ] = None
    quantize: Annotated[
        Literal["int8", "fp8", "bitsandbytes", "bitsandbytes-nf4"] | None,
        Option(
            "Quantize the decoder's weights: 8 bits (int8, fp8, or bitsandbytes for LLM.int8) or 4 "
            "bits (bitsandbytes-nf4). Quantized checkpoints need no option.",
            MODEL,
        ),
    ] = None
    max_model_len: Annotated[
        Positive | None,
        Option(
            "Maximum tokens of prompt and answer together. Default: the model's context, or less "
            "if memory is short.",
            ENGINE,
        ),
    ] = None
    max_num_seqs: Annotated[
        Positive, Option("Maximum number of requests that run at once.", ENGINE)
    ] = 64
    max_num_batched_tokens: Annotated[
        Positive,
        Option(
            "Maximum tokens per step. While answers stream, an image counts as the tokens that it "
            "costs to encode.",
            ENGINE,
        ),
    ] = 2048
    max_num_batched_images: Annotated[
        Positive, Option("Maximum number of images encoded per step.", ENGINE)
    ] = 4
    cpu_products: Annotated[
        Literal["auto", "torch"],
        Option(
            "A CPU's matrix products, and what lies between them. auto: this project's C in large "
            "models, if gcc is installed and a trial finds it faster; it is compiled once into the "
            "user's cache folder. torch: torch's operations.",
            MODEL,
        ),
    ] = "auto"
    attention_backend: Annotated[
        Literal["auto", "sdpa", "cpu", "flash_attn", "triton", "varlen"],
        Option(
            "Attention implementation. sdpa runs on any device; cpu needs gcc; flash_attn, triton "
            "and varlen need CUDA. auto: the fastest that works; the log shows the reason.",
            ENGINE,
        ),
    ] = "auto"
    block_size: Annotated[
        Positive | None,
        Option("Tokens per text block. Default: 16, or 256 for flash_attn and varlen.", ENGINE),
    ] = None
    cuda_graphs: Annotated[
        bool,
        Option(
            "Record decode steps as CUDA graphs and replay them. Needs a GPU and triton attention "
            "(unverified).",
            ENGINE,
        ),
    ] = True
    kv_cache_bytes: Annotated[
        Positive | None,
        Option(
            "Memory for the text and image caches of each replica, such as 8GiB. Default: the "
            "memory left by the weights and the largest step.",
            ENGINE,
            name="kv-cache-memory",
            metavar="BYTES",
        ),
    ] = None
    gpu_memory_utilization: Annotated[
        Annotated[float, msgspec.Meta(ge=0.01, le=1.0)],
        Option(
            "Maximum fraction of a GPU's memory in use, including memory of other processes.",
            ENGINE,
        ),
    ] = 0.9
    max_loras: Annotated[
        NonNegative,
        Option(
            "Maximum number of different LoRA adapters in one step. Each takes device memory for "
            "its weights. Default: the number of --lora, at most 8; 8 if more may come, else 0.",
            ADAPTERS,
        ),
    ] = 0
    max_lora_rank: Annotated[
        Annotated[int, msgspec.Meta(ge=1, le=512)],
        Option(
            "Maximum rank of an adapter. The memory of all --max-loras adapters grows with it.",
            ADAPTERS,
        ),
    ] = 64
    lora_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Option(
            "Type of the adapters' weights. auto: the compute type; float32 on a CPU that does not "
            "multiply it.",
            ADAPTERS,
        ),
    ] = "auto"
    num_text_blocks: Annotated[
        Positive | None, Limit("Number of text blocks. Default: computed from the memory.")
    ] = None
    num_image_blocks: Annotated[
        Positive | None, Option("Image tiles that the image cache can store.", ENGINE)
    ] = None
    image_cache_dtype: Annotated[
        Literal["auto", "int8"],
        Option(
            "Type of cached keys and values of images. auto: the compute type. int8: about half "
            "the memory of bfloat16, at a small error. Needs sdpa, cpu or triton attention.",
            ENGINE,
        ),
    ] = "auto"
    num_threads: Annotated[
        Positive | None,
        Option(
            "CPU threads for the model. Default: OMP_NUM_THREADS, or the cores not used by the "
            "HTTP side.",
            ENGINE,
        ),
    ] = None
    num_sharers: Positive = 1

    @property
    def has_int8_images(self) -> bool:
        """Whether images are cached in int8."""
        return self.image_cache_dtype == "int8"
