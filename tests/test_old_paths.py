"""No text names a file, folder or module by a name that it had before the folders were laid out.

Owns the list of old names. CHANGELOG.md may use them: it tells of releases that had them.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLD_MODULES = {
    "models": (
        "amounts assembly cache fit footprint fused fused_kernels fused_launch heap image_cost "
        "inputs kernel_trial launch layer_count loading logprobs lost_device memory offload "
        "operations packed peak penalties placement pools products progress quantization "
        "random_weights reference replica runner sampling skeleton split transfer triton_launch "
        "turn_ends vision vision_parts weight_files"
    ),
    "models/bundled": (
        "auxiliary client config data evaluate exam grading initial questions small_talk "
        "tokenizer train"
    ),
    "models/graphs": "choice decode layout recorder",
    "models/int8": "int8_kernels linear product quantizer",
    "models/parallel": "group layers plan rank_process ranks runner wire",
    "router": (
        "admission block_manager blocks client engine engine_process engine_server grammar_jobs "
        "pace parent prefix queue replica_pool replicas rows runner scheduler segments sequence "
        "step step_watch text_pool"
    ),
    "server": (
        "access access_log answers children cli conversation deadlines detokenizer drain "
        "engine_figures engine_link engine_watch environment generation grammar_checks "
        "grammar_child grammars guards http_chunks http_head http_protocol listening logprobs "
        "loop_lag managed_child meta_format metrics model_card model_files openapi options "
        "preparation prompt pulse recording records requests restart_counts restarts sentinels "
        "spare_engine start_checks supervisor template tls tracing units watch_time"
    ),
    "server/pages": "page",
    "server/routes": "declared services streaming",
    "server/schemas": (
        "chat chat_answers chat_messages completion_answers completions llama_stack "
        "llama_stack_answers stack_tools token_columns"
    ),
    "server/tools": "grammar parser pieces python_arguments",
}
OLD_FOLDERS = ("models/graphs", "models/int8", "models/parallel", "server/pages", "server/tools")
OLD_TESTS = ("helpers_models", "test_rows_server", "test_rows_images", "test_rows_access")
KINDS = {".py", ".md", ".cfg", ".toml", ".txt", ".yaml", ".yml", ".sh", ".js", ".service", ".json"}
TOPS = ("server", "router", "models", "tests", "bench", "docs", "examples", "deploy", ".ci")


def texts() -> list[Path]:
    """Every text of the repository but this list and the change log."""
    found = [path for path in ROOT.iterdir() if path.is_file()]
    found += [path for top in TOPS for path in (ROOT / top).rglob("*") if path.is_file()]
    plain = ("Makefile", "Dockerfile", "run")
    skipped = (Path(__file__).resolve(), ROOT / "CHANGELOG.md")
    return [
        path
        for path in found
        if (path.suffix in KINDS or path.name in plain) and path not in skipped
    ]


def old_names() -> list[str]:
    """`models/heap` and the like, but for names that mean a file or a folder again."""
    modules = [
        f"{folder}/{name}" for folder, names in OLD_MODULES.items() for name in names.split()
    ]
    found = [*modules, *OLD_FOLDERS]
    return [one for one in found if not (ROOT / one).exists() and not (ROOT / f"{one}.py").exists()]


def test_no_text_names_a_module_by_its_old_path():
    paths = "|".join(map(re.escape, old_names()))
    dotted = paths.replace("/", r"\.")
    tests = "|".join(OLD_TESTS)
    pattern = re.compile(
        rf"(?<![\w/.-])(?:vlmserve/)?(?:{paths})(?:\.(?:py|js))?(?![\w])"
        rf"|\bvlmserve\.(?:{dotted})\b|\b(?:{tests})\b"
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match.group()}"
        for path in texts()
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        for match in pattern.finditer(line)
    ]
    assert found == []


def test_the_names_that_are_looked_for_are_found():
    names = old_names()
    assert len(names) > 100
    assert {"models/heap", "router/pace", "server/sentinels", "models/parallel"} <= set(names)
