"""Adapter formats in, the canonical form out, and every check in between. No torch, no services."""
