"""Mutation testing of the CPU kernels and of the Python code: single faults, listed as data, that a test must notice."""
