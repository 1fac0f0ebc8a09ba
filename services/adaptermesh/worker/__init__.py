"""The GPU worker: one frozen base model on one device, and the adapters that are asked for."""
