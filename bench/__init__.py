"""`posattn bench`: posattn beside its peers on this machine, parity first, every row with its share of the peak."""
