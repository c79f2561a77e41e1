"""Attention over 8 to 4,096 ranks, on paper: posattn.distributed.cost with the GPU kernels' modelled cycles, its
pictures, and a check of it against processes that run here."""
