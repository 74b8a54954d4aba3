"""vlmserve: an async inference server for Llama-3.2-Vision (Mllama)."""

__version__ = "0.1.0"
