"""What the kernels of both families share: operands, masks, dropout, layouts, and the dQ semaphore."""
