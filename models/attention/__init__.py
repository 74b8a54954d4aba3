"""Attention backends: one interface, several kernels."""
