"""Benchmarks: the asv suite, and the same workloads as plain Python (``python -m benchmarks``)."""
