"""Static evidence about GPU kernels: registers, spills, occupancy and modelled cycles, read from the machine code."""
