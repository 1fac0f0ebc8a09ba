"""Ways through the base model: the modules of transformers, or a lean path for a family."""
