"""Configuration files for TorchServe and the engine, one per model size."""
