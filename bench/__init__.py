"""Benchmarks: each checks its result before it times anything. bench/RESULTS.md says how to repeat them."""
