"""Vocabulary of the mesh: refs, digests, errors, sampling. Standard library only."""
