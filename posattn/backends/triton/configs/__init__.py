"""Launch configurations of the Triton kernels, with the reason for each number."""
