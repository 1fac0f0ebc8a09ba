"""The inference engine: one base model, many adapters, one batch. A library: no gRPC, no store."""
