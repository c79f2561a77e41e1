"""CUDA device code as package data (posattn.cuda_source): compiled at first use by posattn.backends.cuda.compiler."""
