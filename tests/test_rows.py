"""Every row of docs/security.md has a test of its name, in the files that the page names."""

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "security.md"
ROWS = set(range(1, 58)) - {45} | {70, 71, 72, 73, 74, 75, 76, 77}

# Of processes: a later list, in a table of its own.
ROWS |= set(range(60, 70))


def files_by_row() -> dict[int, set[str]]:
    """The files that hold a test of each row."""
    found: dict[int, set[str]] = {}
    for file in TESTS.rglob("test_*.py"):
        for number in re.findall(
            r"^(?:async )?def test_row_(\d+)_", file.read_text(), re.MULTILINE
        ):
            found.setdefault(int(number), set()).add(str(file.relative_to(TESTS)))
    return found


def rows_of_page() -> dict[int, set[str]]:
    """The files that the page names for each row."""
    lines = re.findall(r"^\| (\d+) \| (.+) \| ?(.*)\|$", PAGE.read_text(), re.MULTILINE)
    return {int(number): set(re.findall(r"`([\w/]+\.py)`", files)) for number, _, files in lines}


def test_every_row_has_a_test_of_its_name():
    assert set(files_by_row()) == ROWS


def test_the_page_has_every_row_and_names_files_that_hold_it():
    page, tests = rows_of_page(), files_by_row()
    assert set(page) == ROWS
    for number, files in page.items():
        assert files, f"row {number} names no test"
        assert files <= tests[number], f"row {number}"
