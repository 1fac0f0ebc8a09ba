"""The guided demonstration: a mesh of its own, real adapters, checked answers."""
