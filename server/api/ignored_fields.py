"""Reports the fields of a request that the server dropped: in a header, in the log and in a metric.

Owns the header's form and which names were logged already. Knows no schema.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from urllib.parse import quote

from sanic import HTTPResponse, Request

from ..schemas.decoding import MAX_NAMED_FIELDS
from ..telemetry.request_record import record_of

logger = logging.getLogger(__name__)

HEADER = "X-Ignored-Fields"
MAX_LOGGED_NAMES = 1_000

_INDEX = re.compile(r"\[[0-9]+\]")
_logged: set[str] = set()


def report_ignored(request: Request, fields: Sequence[str], count: Callable[[str], None]) -> None:
    """Remember the fields for the answer's header, count them, and log each new name once.

    fields: paths such as `messages[0].foo`. count: called with the name of each.
    """
    known = getattr(request.ctx, "ignored_fields", ())
    request.ctx.ignored_fields = [*known, *fields][:MAX_NAMED_FIELDS]
    for field in fields:
        name = _INDEX.sub("[]", field)
        count(name.rpartition(".")[2])
        if name not in _logged and len(_logged) < MAX_LOGGED_NAMES:
            _logged.add(name)
            logger.warning(
                "ignored the unknown field %r; further requests with it are not logged", name
            )


def name_ignored(request: Request, response: HTTPResponse, count: Callable[[str], None]) -> None:
    """Name in the answer's header the fields that this request had and the server dropped.

    Those of a form are reported here, as they are found when its grammar is made.
    """
    record = record_of(request)
    if record is not None and record.ignored_fields:
        report_ignored(request, record.ignored_fields[:MAX_NAMED_FIELDS], count)
        record.ignored_fields = []
    fields = getattr(request.ctx, "ignored_fields", ())
    if fields:
        # A name may have any character; a header may not.
        names = (quote(field, safe="[].$:@/ ") or '""' for field in fields)
        response.headers[HEADER] = ", ".join(names)
