"""What clients send and what they are sent: one module an API, and strict JSON."""
