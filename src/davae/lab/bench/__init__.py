"""Benchmarks: ratios taken in one run, on whatever machine this is."""
