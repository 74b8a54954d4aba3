"""The exceptions of models/.

    ModelError (ValueError)        the model cannot be loaded or sized with these options; one line
      StepTooLargeError            a step within the limits runs out of memory
    GrammarError (ValueError)      a grammar that cannot be compiled
    AdapterError (ValueError)      a LoRA adapter that cannot be served on this model; one line
    StepError (RuntimeError)       one step failed; the engine ends the requests of that step
      NonFiniteLogitsError         the model's logits were NaN or infinite

DeviceLostError is in `batch.py`, since the engine handles it.
"""

from __future__ import annotations


class ModelError(ValueError):
    """The model cannot be loaded or sized with these options; one line with the remedy."""


class StepTooLargeError(ModelError):
    """The costliest step within the limits runs out of memory beside the weights."""


class GrammarError(ValueError):
    """A grammar that cannot be compiled; the message is one line, fit for a client."""


class AdapterError(ValueError):
    """A LoRA adapter that cannot be served; one line that names the file, field or tensor."""


class StepError(RuntimeError):
    """One step could not be computed; later steps can."""


class NonFiniteLogitsError(StepError):
    """The model produced NaN or infinite logits for some rows of a step."""
