"""Logs, traces: what the services say about themselves."""
