"""Side-by-side measurements; run `python -m benchmarks.NAME` in the root of the repository."""
