"""The HTTP routes: one module a group of endpoints."""
