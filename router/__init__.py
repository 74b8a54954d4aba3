"""Which tokens run next: request queue, token-level batching, blocks, engine process."""
