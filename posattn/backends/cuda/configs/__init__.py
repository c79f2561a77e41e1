"""Launch configurations of the CUDA kernels, with the reason for each number."""
