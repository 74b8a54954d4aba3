"""What the documentation and the comments refer to exists: links, files of the source, tests.

mkdocs checks the links inside docs/ (`make check`); this file checks the pages outside of it, and
every path of a Python file that a page, comment, string or docstring names. The picture of the
architecture is the one that the imports give.
"""

import re
from pathlib import Path

import pytest
from support import architecture_picture

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(ROOT.glob("*.md"))
FOLDERS = ("server", "router", "models", "tests", "bench", "docs", "examples", "deploy")
# Names in texts that are no files of this repository: of libraries, and made up by tests.
OTHERS = {
    "flash_attn_interface.py",
    "sitecustomize.py",
    "utils.py",
    "tests/api_resources/test_responses.py",
    "torch/_inductor/mkldnn_lowerings.py",
    "models/mllama/image_processing_pil_mllama.py",
    "vlmserve/__init__.py",
    "test_some.py",
    "test_broken.py",
    "evil.py",
    "cli.py",
    "_state.py",
}


def texts() -> list[Path]:
    kinds = ("*.py", "*.md", "*.toml", "*.cfg", "*.yml", "*.yaml", "*.sh")
    found = [path for kind in kinds for path in ROOT.glob(kind)]
    found += [path for top in FOLDERS for kind in kinds for path in (ROOT / top).rglob(kind)]
    return [ROOT / "Makefile", ROOT / "Dockerfile", *sorted(found)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_of_a_page_leads_to_a_file(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_python_file_that_a_text_names_exists():
    found = [path for top in FOLDERS for path in (ROOT / top).rglob("*.py")]
    files = {path.relative_to(ROOT).as_posix() for path in [*found, *ROOT.glob("*.py")]}
    tails = {"/".join(name.split("/")[at:]) for name in files for at in range(name.count("/") + 1)}
    missing = [
        f"{path.relative_to(ROOT)} names {name}"
        for path in texts()
        for name in re.findall(r"(?<![\w./*-])[\w-]+(?:/[\w-]+)*\.py\b", path.read_text("utf-8"))
        if name not in tails | OTHERS
    ]
    assert not missing, "\n".join(missing)


def test_every_module_that_a_text_names_exists():
    """`vlmserve.router.errors.Busy` needs router/errors.py; a package's name needs the folder."""
    missing = []
    for path in texts():
        for name in re.findall(r"\bvlmserve(?:\.[a-z_0-9]+){2,}", path.read_text("utf-8")):
            steps = name.split(".")[1:]
            modules = [ROOT.joinpath(*steps[:end]) for end in range(1, len(steps) + 1)]
            is_module = any(module.with_suffix(".py").is_file() for module in modules)
            if not is_module and not modules[-1].is_dir():
                missing.append(f"{path.relative_to(ROOT)} names {name}")
    assert not missing, "\n".join(missing)


def test_the_picture_of_the_architecture_is_drawn_from_the_imports_as_they_are():
    drawn = architecture_picture.PAGE.read_text("utf-8")
    assert drawn == architecture_picture.draw(), "the imports have changed: run `make picture`"
