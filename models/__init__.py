"""How tokens are computed: Mllama wrapper, attention, caches, sampling."""
