"""Side-by-side measurements; each module runs alone: ``python -m benchmarks.bench_selection``."""
