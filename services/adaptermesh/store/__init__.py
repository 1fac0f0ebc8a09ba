"""The adapter store: the system of record for adapters, versions, aliases and routes."""
