"""One run of `benchmarks.study`, and the variants that it compares."""
