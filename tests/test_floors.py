"""The fence between floors and folders: who may import whom, sizes, and where torch may not go."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest
from support.import_graph import (
    FLOORS,
    ROOT,
    all_sources,
    imported_modules,
    is_module,
    module_name,
    sources,
    within,
)

# The part of the lower floors that `server` may see: the client side and plain types.
SERVER_MAY_IMPORT = {
    "vlmserve.router",
    "vlmserve.router.client.engine_client",
    "vlmserve.router.config",
    "vlmserve.router.errors",
    # Whose turn it is: one rule for the engine and for the lanes of the HTTP side.
    "vlmserve.router.fair_shares",
    "vlmserve.router.processes",
    "vlmserve.router.processes.logs",
    "vlmserve.router.processes.memory_folder",
    "vlmserve.router.messages",
    "vlmserve.router.processes.tasks",
    "vlmserve.router.processes.parent_death",
    # One rule of affinity for engines on one machine and for those of Ray Serve.
    "vlmserve.router.client.replica_chooser",
    "vlmserve.router.client.replica_pool",
    "vlmserve.router.state_table",
    "vlmserve.router.processes.wire",
    "vlmserve.models",
    "vlmserve.models.batch",
    "vlmserve.models.bundled",
    # The settings of the runner and how settings declare their options: plain types.
    "vlmserve.models.settings",
    "vlmserve.models.settings.byte_text",
    "vlmserve.models.settings.option",
    "vlmserve.models.settings.option_parser",
    "vlmserve.models.settings.runner_config",
    # Whether a config.json is of a model that is served: known before weights are downloaded.
    "vlmserve.models.checkpoint",
    "vlmserve.models.errors",
    # What the machine and its control groups leave, for a worker's limit: no tensors.
    "vlmserve.models.memory",
    "vlmserve.models.memory.host_memory",
    # What a worker does with freed bodies: settings of the C library's allocator.
    "vlmserve.models.malloc",
    # What identifies an adapter, and its settings: no tensors.
    "vlmserve.models.lora",
    "vlmserve.models.lora.config",
    "vlmserve.models.lora.files",
    # Headers of weights, so that a damaged file is refused before torch is imported.
    "vlmserve.models.weights.config_files",
    "vlmserve.models.weights.formats.recognition",
    # What a child of the worker compiles grammars with, as the engine does: no tensors.
    "vlmserve.models.grammar",
    # Which tokens end a turn: one rule for prompts and grammars.
    "vlmserve.models.eos_tokens",
    # What the load generator draws: pictures, with numpy and Pillow.
    "vlmserve.models.bundled.pictures",
}
# What `router` may see of `models`: the plain types that cross between them.
ROUTER_MAY_IMPORT = {
    "vlmserve.models",
    "vlmserve.models.batch",
    # A sequence's blocks, in memory that numpy can read: no tensors.
    "vlmserve.models.kv_cache",
    "vlmserve.models.kv_cache.block_table",
    # How often an answer has each token: no tensors.
    "vlmserve.models.sampling",
    "vlmserve.models.sampling.token_counts",
    "vlmserve.models.settings",
    "vlmserve.models.settings.option",
    "vlmserve.models.settings.runner_config",
}
# The engine's process alone loads a model, and what must be set before torch is imported.
ENGINE_PROCESS = ROOT / "router" / "engine" / "process.py"
ENGINE_PROCESS_MAY_IMPORT = ROUTER_MAY_IMPORT | {
    "vlmserve.models.malloc",
    "vlmserve.models.settings.byte_text",
    "vlmserve.models.create_runner",
    "vlmserve.models.distributed.parallel_runner",
    "vlmserve.models.distributed.replica",
    "vlmserve.models.execution.runner",
    "vlmserve.models.settings.threads",
}
TENSORS = {"torch", "transformers", "accelerate", "safetensors"}
# `router` knows nothing of tensors, text, pictures or HTTP.
NOT_IN_ROUTER = TENSORS | {"numpy", "tokenizers", "llguidance", "PIL", "sanic", "httpx2"}
# Rooms (folders and modules) at a floor's root, and modules in a folder.
MOST_ROOMS = {"server": 20, "router": 10, "models": 22}
LEAST_MODULES, MOST_MODULES = 2, 13
# Folders with fewer modules, and why.
SMALL_FOLDERS = {
    "models/bundled": "its parts are folders: the dataset, the training, the exam",
}
NEEDS_RAY = ("vlmserve.server.ray.", "vlmserve.server.cli.on_ray")
FORBIDDEN_CALLS = {"eval", "exec"}
# multiprocessing sends its objects as pickles.
FORBIDDEN_MODULES = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "multiprocessing",
    "sanic_ext",
}  # fmt: skip


def folders(floor: str) -> list[Path]:
    return sorted({path.parent for path in sources(floor)} - {ROOT / floor})


def modules_in(folder: Path) -> list[Path]:
    """A folder's own modules; not those of the folders in it."""
    return [path for path in sorted(folder.glob("*.py")) if not path.name.startswith("__")]


@pytest.mark.parametrize("floor", FLOORS)
def test_no_circle_runs_through_the_rooms_of_a_floor(floor):
    """Then the rooms have an order in which each imports only rooms below it, children included."""
    graph = within(floor)
    try:
        TopologicalSorter({room: set(below) for room, below in graph.items()}).prepare()
    except CycleError as error:
        circle = error.args[1][::-1]  # graphlib lists a room behind those that it imports
        ways = [f"{a} -> {b} ({graph[a][b]})" for a, b in pairwise(circle)]
        pytest.fail("rooms import each other in a circle: " + ", ".join(ways))


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_has_few_rooms_at_its_root(floor):
    rooms = {path.relative_to(ROOT / floor).parts[0] for path in sources(floor)}
    rooms = {room for room in rooms if not room.startswith("__")}
    assert len(rooms) <= MOST_ROOMS[floor], f"a room more than agreed in {floor}/: {sorted(rooms)}"


@pytest.mark.parametrize("floor", FLOORS)
def test_a_folder_is_a_package_of_two_to_thirteen_modules(floor):
    for folder in folders(floor):
        name, count = folder.relative_to(ROOT).as_posix(), len(modules_in(folder))
        assert (folder / "__init__.py").is_file(), f"{name} has no __init__.py"
        assert count <= MOST_MODULES, f"{name} has {count} modules: split it"
        if name not in SMALL_FOLDERS:
            assert count >= LEAST_MODULES, f"{name} has {count} modules: merge it into its parent"


@pytest.mark.parametrize("floor", FLOORS)
def test_a_folder_names_its_files_in_its_init(floor):
    """The docstring of `__init__.py` is where a reader learns what to open, and in which order."""
    for folder in [ROOT / floor, *folders(floor)]:
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8"))) or ""
        children = [path.stem for path in modules_in(folder)]
        children += [path.name for path in folders(floor) if path.parent == folder]
        missing = [name for name in children if not re.search(rf"\b{name}\b", text)]
        assert not missing, f"{folder.relative_to(ROOT)}/__init__.py does not name {missing}"


@pytest.mark.parametrize("floor", FLOORS)
def test_nothing_imports_upward(floor):
    for path in sources(floor):
        for name in imported_modules(path):
            parts = name.split(".")
            if parts[0] == "vlmserve" and len(parts) > 1 and parts[1] in FLOORS:
                is_upward = FLOORS[parts[1]] > FLOORS[floor]
                assert not is_upward, f"{path} imports {name}, which lies above it"


def test_server_imports_only_the_client_side_of_the_lower_floors():
    for path in sources("server"):
        for name in imported_modules(path):
            below = name.startswith(("vlmserve.router", "vlmserve.models")) and is_module(name)
            assert not below or name in SERVER_MAY_IMPORT, f"{path} imports {name}"


def test_the_router_knows_the_plain_types_of_the_models_and_no_tensor():
    for path in sources("router"):
        allowed = ENGINE_PROCESS_MAY_IMPORT if path == ENGINE_PROCESS else ROUTER_MAY_IMPORT
        names = imported_modules(path)
        below = {name for name in names if name.startswith("vlmserve.models") and is_module(name)}
        assert below <= allowed, path
        assert not {name.split(".")[0] for name in names} & NOT_IN_ROUTER, path


def test_the_plain_types_know_no_tensor():
    tops = {name.split(".")[0] for name in imported_modules(ROOT / "models" / "batch.py")}
    assert not tops & NOT_IN_ROUTER


def test_the_server_floor_never_names_torch_or_transformers():
    for path in sources("server"):
        tops = {name.split(".")[0] for name in imported_modules(path)}
        assert not tops & TENSORS, path


def test_row_43_nothing_evaluates_code_or_unpickles():
    for path in all_sources():
        calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        called = {one.id for one in calls if isinstance(one, ast.Name)}
        methods = [one for one in calls if isinstance(one, ast.Attribute) and one.attr == "load"]
        assert not called & FORBIDDEN_CALLS, path
        assert "torch.load" not in {ast.unparse(one) for one in methods}, path
        imported = {name.split(".")[0] for name in imported_modules(path)}
        assert not imported & FORBIDDEN_MODULES, path


def heavy_of(modules: Iterable[str], heavy: set[str]) -> str:
    """Which of these packages a fresh interpreter has loaded with the modules, or an error."""
    code = "import importlib, sys\n"
    code += "".join(f"importlib.import_module({name!r})\n" for name in modules)
    code += f"print(*sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    return (done.stdout + done.stderr).strip()


def test_importing_the_http_side_loads_no_torch():
    own = {module_name(path) for path in sources("server") if path.name != "__main__.py"}
    # What needs Ray is imported where it is installed: tests/whole/test_ray.py.
    own = {name for name in own if not name.startswith(NEEDS_RAY)}
    assert heavy_of(sorted(own | SERVER_MAY_IMPORT), TENSORS | {"sanic_ext"}) == ""


def test_importing_the_router_loads_neither_tensors_nor_text():
    assert heavy_of(map(module_name, sources("router")), NOT_IN_ROUTER) == ""


def test_the_load_generator_knows_nothing_of_the_server_it_measures():
    """It works with any other server: from here it takes pictures, and how options are declared."""
    own = "vlmserve.server.bench"
    for path in sources("server/bench"):
        inside = {n for n in imported_modules(path) if n.startswith("vlmserve.") and is_module(n)}
        others = {name for name in inside if not name.startswith(own)}
        options = {"vlmserve.models.settings.option", "vlmserve.models.settings.option_parser"}
        assert others <= options | {"vlmserve.models.settings", "vlmserve.models.bundled.pictures"}


def test_the_command_line_starts_without_what_only_a_load_needs():
    assert heavy_of(["vlmserve.server.cli.main"], {"numpy", "httpcore2", "matplotlib"}) == ""
