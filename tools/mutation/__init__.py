"""Mutation testing of the CPU kernels and of the Python code: single faults, as data, that a test must notice."""
