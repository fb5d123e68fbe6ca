"""Proposing and verifying draft tokens. A leaf: knows nothing of HTTP, Ray, scheduling or KV blocks."""
