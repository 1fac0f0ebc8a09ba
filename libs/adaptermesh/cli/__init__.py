"""The `adaptermesh` command."""
