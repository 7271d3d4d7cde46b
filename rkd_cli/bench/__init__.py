"""Benchmarks of rkd against textbook code."""
