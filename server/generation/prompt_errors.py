"""The errors that a client gets where a conversation does not become a prompt.

Knows nothing of prompts but their exceptions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ..errors import BadRequestError, NotReadyError
from ..prompts.chat_template import TemplateRefusedError
from ..prompts.processor import PromptTooLongError
from ..prompts.templates.processes import LostChildError


@contextlib.contextmanager
def prompt_errors(field: str = "messages", limit: str | None = None) -> Iterator[None]:
    """Raise the errors of preparing a prompt as errors of the API.

    field: where the conversation is in the client's body. limit: what to write behind the number of
    tokens of a prompt that is too long; None: that it does not fit the context. Raises
    BadRequestError, or NotReadyError if the server was short of resources.
    """
    try:
        yield
    except PromptTooLongError as error:
        text = str(error) if limit is None else f"prompt has {error.num_tokens} tokens; {limit}"
        raise BadRequestError(text, param=field) from error
    except TemplateRefusedError as error:
        raise BadRequestError(
            f"the chat template does not accept this conversation: {error}", param=field
        ) from error
    except LostChildError as error:
        raise NotReadyError(f"{error}: try again", retry_after_s=1.0) from error
