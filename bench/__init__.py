"""Benchmarks: baseline and candidate in one process run; every result is a line in bench/results/."""
