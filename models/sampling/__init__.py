"""Chooses each row's next token from its logits, and computes log-probabilities.

Read sampler.py first: it applies masks, penalties.py, then temperature and filters. logprobs.py
uses the unchanged logits. token_counts.py counts an answer's tokens for the penalties.
verification.py accepts drafts that are the tokens sampled in their places.
"""
