"""Measures multiply-adds, memory, time and quality of sparse training against dense baselines."""
