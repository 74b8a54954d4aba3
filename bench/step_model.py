"""A model of a step's time on a GPU: bytes, launches and the host. All of it is an estimate.

    python bench/step_model.py              # at commit 33f2d30 and today, on four cards

No figure was measured on a GPU. Each term is what a row of `bench/gpu.py` measures:

    products     bytes over the copy bandwidth, or operations; a product's start   products/...
    attention    keys over the bandwidth, or the longest program's rounds          decode/.../long
    small        launches of the other kernels                                     profile/...
    sampling     argmax and copies, or top-p's passes over the vocabulary          decode/.../top-p
    host         the device waits for the next step's launch                       idle_ms

Sources: data sheets, and the desk check of commit 33f2d30, which is where the times of a launch
come from. What a step launches is counted in the code (`tests/bench/test_step_model.py`). The
host's time is that from a step's tokens to the next launch, on two slow cores; a pass that starts
before the tokens does not wait for it. A step with a chunk is launched operation by operation:
where that takes the host longer than the device computes, the device waits for the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

if __package__:
    from .bounds import decode_work
    from .checkpoints import layout
else:
    from bounds import decode_work
    from checkpoints import layout


@dataclass(slots=True, frozen=True)
class Card:
    """A card: bytes of a copy and operations of a large product a second, in float64 too.

    quantize: the weights that fit it. encode_ms: an image of any number of tiles, before and
    today, without a mask.
    """

    name: str
    bytes_per_s: float
    flops_per_s: float
    float64_per_s: float
    quantize: str
    encode_ms: tuple[float, float]


# nine tenths of the data sheet's bandwidth, six tenths of its dense operations in 16 bits
CARDS = (
    Card("H100", 3.0e12, 590e12, 34e12, "none", (110, 65)),
    Card("A10", 0.54e12, 75e12, 0.98e12, "int8", (430, 254)),
    Card("L4", 0.27e12, 72e12, 0.47e12, "int8", (600, 355)),
    Card("4090", 0.91e12, 99e12, 1.3e12, "int8", (190, 112)),
)


@dataclass(slots=True, frozen=True)
class Code:
    """A state of the code.

    has_pieces: long rows are cut for all programs. round_us: of 64 keys in a program. fused_rows:
    the most of an int8 product that unpacks no weight; int8_share: of the bandwidth. Top-p reads
    and writes the vocabulary top_p_passes times in float32, with top_p_float64 operations an entry
    in float64, and takes window_ms for the best tokens. sampling_starts: kernels and copies of a
    greedy step outside its recorded pass. host_ms, host_row_ms: the host's work between two
    recorded steps, and for each row. starts_early: the pass of the next one is started before, so
    that the device waits only for what takes longer than that pass; else for all of it.
    starts_chunks_early: also if the next step continues a prompt.
    """

    name: str
    has_pieces: bool
    round_us: float
    fused_rows: int
    int8_share: float
    top_p_passes: float
    top_p_float64: float
    window_ms: float
    sampling_starts: int
    host_ms: float
    host_row_ms: float
    starts_early: bool
    starts_chunks_early: bool


# what a recorded pass of text launches: for each layer with self-attention, and once
LAYER_LAUNCHES = {
    "aten::linear": 4,
    "add_norm_kernel": 2,
    "rotate_and_write_kernel": 1,
    "attend_kernel": 1,
    "merge_kernel": 1,
    "silu_gated_kernel": 1,
}
STEP_LAUNCHES = {
    "aten::embedding": 1,
    "aten::to": 3,
    "aten::mul": 3,
    "aten::cat": 1,
    "aten::cos": 1,
    "aten::sin": 1,
    "aten::rms_norm": 1,
}
# a greedy step's, after its pass and the product of the head
SAMPLING_LAUNCHES = {
    "aten::to": 1,
    "aten::max": 1,
    "aten::sub": 1,
    "aten::ne": 1,
    "aten::masked_fill_": 1,
}
# with which a started pass reads the tokens that are still on the device
FEED_LAUNCHES = {"aten::index_select": 1, "aten::clamp_": 1, "aten::copy_": 1}
NUM_COPIES = 2  # the inputs up, the tokens down

BEFORE = Code("33f2d30", False, 1.5, 64, 0.7, 40, 150, 0.6, 13, 0.34, 0.01, False, False)
TODAY = Code(
    name="today",
    has_pieces=True,
    round_us=0.6,
    fused_rows=256,
    int8_share=0.75,
    top_p_passes=12,
    top_p_float64=0,
    window_ms=0.15,
    sampling_starts=sum((SAMPLING_LAUNCHES | FEED_LAUNCHES).values()) + NUM_COPIES,
    host_ms=0.09,
    host_row_ms=0.0025,
    starts_early=True,
    starts_chunks_early=True,
)

PRODUCT_US, SMALL_US, ATTENTION_US = 4.3, 2.7, 3.0  # starts and ends of kernels in a graph
PRODUCTS_A_LAYER = LAYER_LAUNCHES["aten::linear"]
SMALL_A_LAYER = sum(LAYER_LAUNCHES.values()) - PRODUCTS_A_LAYER - LAYER_LAUNCHES["attend_kernel"]
# a step that is planned after the last one's tokens; all that the host does in a step that is not
# recorded
HOST_MS, HOST_ROW_MS, EAGER_MS = 0.34, 0.01, 9.0
# of the desk check's 0.1 ms for sampling, copies and a graph's launch: all but the 13 starts
SAMPLING_MS = 0.1 - 13 * SMALL_US / 1e3


@dataclass(slots=True, frozen=True)
class Step:
    """A decode step. context: keys of a row, one of them `longest`; chunk: a prompt's tokens."""

    rows: int
    context: int = 256
    longest: int = 0
    chunk: int = 0
    top_p: bool = False

    @property
    def num_keys(self) -> int:
        return self.rows * self.context + max(0, self.longest - self.context)


STEPS = {
    "decode/1": Step(1),
    "decode/64": Step(64),
    "decode/64/chunk": Step(64, chunk=192),
    "decode/64/top-p": Step(64, top_p=True),
    "decode/32/long": Step(32, longest=32_768),
}


def terms(card: Card, code: Code, step: Step, quantize: str | None = None) -> dict[str, float]:
    """Milliseconds of each term of a step of text of Llama-3.2-11B-Vision."""
    text: Any = layout("11b").text_config
    is_int8 = (quantize or card.quantize) == "int8"
    num_layers = text.num_hidden_layers - len(text.cross_attention_layers)
    tokens = step.rows + step.chunk
    work = decode_work(text, tokens, 0, 0, 2, 1 if is_int8 else None)
    num_products = num_layers * PRODUCTS_A_LAYER + 1
    num_bytes = work.num_bytes
    if is_int8:
        head = 2 * text.vocab_size * text.hidden_size
        # bytes moved for each byte of a weight: unpacked, or read for each line of 64 rows
        moved = 5 if tokens > code.fused_rows else -(-tokens // 64)
        num_bytes = head + (num_bytes - head) * moved / code.int8_share
    products = max(num_bytes / card.bytes_per_s, work.flops / card.flops_per_s)
    products += num_products * PRODUCT_US / 1e6
    key_bytes = 4 * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
    longest = max(step.context, step.longest)
    if code.has_pieces:
        piece = max(128.0, step.num_keys / max(step.rows, 32))
    else:
        piece = longest / max(1, 32 // step.rows)
    rounds = min(longest, piece) / 64
    reading = step.num_keys * key_bytes / card.bytes_per_s
    attention = num_layers * (ATTENTION_US / 1e6 + max(reading, rounds * code.round_us / 1e6))
    small = (num_layers * SMALL_A_LAYER + sum(STEP_LAUNCHES.values())) * SMALL_US / 1e6
    small += num_layers * tokens * 10 * text.hidden_size * 2 / card.bytes_per_s
    sampling = SAMPLING_MS / 1e3 + code.sampling_starts * SMALL_US / 1e6
    sampling += step.rows * text.vocab_size * 4 / card.bytes_per_s
    if step.top_p:
        entries = step.rows * text.vocab_size
        sampling += code.top_p_passes * entries * 4 / card.bytes_per_s + code.window_ms / 1e3
        sampling += code.top_p_float64 * entries / card.float64_per_s
    found = {"products": products, "attention": attention, "small": small, "sampling": sampling}
    milliseconds = {name: 1e3 * seconds for name, seconds in found.items()}
    host = code.host_ms + code.host_row_ms * step.rows
    if code.starts_early:
        host = max(0.0, host - sum(milliseconds.values()))
    if step.chunk:  # an eager step: the device waits where the host launches more slowly
        host = 0.0 if code.starts_chunks_early else HOST_MS + HOST_ROW_MS * step.rows
        host = max(host, EAGER_MS - sum(milliseconds.values()))
    return milliseconds | {"host": host}


def bound_ms(card: Card, step: Step, quantize: str | None = None) -> float:
    """What a step must read, over the bandwidth."""
    text: Any = layout("11b").text_config
    size = 1 if (quantize or card.quantize) == "int8" else None
    context = step.num_keys // step.rows
    return 1e3 * decode_work(text, step.rows, context, 0, 2, size).num_bytes / card.bytes_per_s


def estimate_ms(device: str, quantize: str, name: str) -> float | None:
    """Today's estimate of a row of `STEPS` or "encode", on a device of that name; None: unknown."""
    card = next((card for card in CARDS if card.name in device), None)
    if card is None or name not in (*STEPS, "encode"):
        return None
    if name == "encode":
        return card.encode_ms[1]
    return round(sum(terms(card, TODAY, STEPS[name], quantize).values()), 2)


def aims() -> list[tuple[str, float, bool]]:
    """Each aim with today's estimate on an H100, and whether that meets it."""
    names = ("decode/1", "decode/64", "decode/64/chunk")
    one, many, chunk = (sum(terms(CARDS[0], TODAY, STEPS[name]).values()) for name in names)
    share, times = bound_ms(CARDS[0], STEPS["decode/1"]) / one, chunk / many
    return [
        ("one sequence of text: share of the bound, at least 0.8", share, share >= 0.8),
        ("64 rows and a chunk of 192 tokens: times without, at most 1.3", times, times <= 1.3),
    ]


def main() -> None:
    for card in CARDS:
        print(f"\n{card.name}, weights: {card.quantize} (estimates, ms)")
        print(f"{'':<18}{'bound':>8}{BEFORE.name:>9}{TODAY.name:>9}   today's terms")
        for name, step in STEPS.items():
            before, today = terms(card, BEFORE, step), terms(card, TODAY, step)
            parts = " ".join(f"{key} {value:.2f}" for key, value in today.items())
            print(
                f"{name:<18}{bound_ms(card, step):>8.2f}{sum(before.values()):>9.2f}"
                f"{sum(today.values()):>9.2f}   {parts}"
            )
        print(f"{'encode':<18}{'':>8}{card.encode_ms[0]:>9.0f}{card.encode_ms[1]:>9.0f}")
    print("\nH100, by these estimates:")
    for aim, value, is_met in aims():
        print(f"  {aim}: {value:.2f}, {'met' if is_met else 'not met'}")


if __name__ == "__main__":
    main()
