"""Side-by-side measurements: each is `python -m benchmarks.NAME`, run in the root of the repository."""
