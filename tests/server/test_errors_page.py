"""docs/errors.md against the program: status, type and code of every error."""

import re
from pathlib import Path

from sanic.exceptions import (
    HeaderExpectationFailed,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
)

from vlmserve.server.errors import ApiError, type_of_status
from vlmserve.server.worker import app

PAGE = Path(__file__).resolve().parents[2] / "docs" / "errors.md"
# Sanic raises these itself; `answer_error` gives them the API's form.
OF_SANIC = (NotFound, MethodNotAllowed, PayloadTooLarge, HeaderExpectationFailed)


def rows_of_page():
    found = []
    for line in PAGE.read_text("utf-8").splitlines():
        row = re.fullmatch(r"\| (\d{3}) \| `(\w+)` \| (null|`\w+`) \| \S.* \| \S.* \|", line)
        if row:
            status, kind, code = row.groups()
            found.append((int(status), kind, None if code == "null" else code.strip("`")))
    return found


def kinds_of(error):
    """An error and all that are derived from it, in the server's own modules."""
    yield error
    for derived in error.__subclasses__():
        yield from kinds_of(derived)


def rows_of_program():
    assert app.answer_error, "importing the app imports every module that declares an error"
    own = {(kind.status, kind.type, kind.code) for kind in kinds_of(ApiError)}
    statuses = [error.status_code for error in OF_SANIC]
    return own | {(status, type_of_status(status), None) for status in statuses}


def test_the_page_has_every_error_and_no_other():
    rows = rows_of_page()
    assert len(rows) == len(set(rows)), "an error stands twice on the page"
    assert set(rows) == rows_of_program()
    assert rows == sorted(rows, key=lambda row: row[0])
