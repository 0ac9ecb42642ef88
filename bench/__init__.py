"""Commands that measure; results are written to `bench/results/`."""
