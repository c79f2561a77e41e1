"""Every model family that the installed transformers holds, run with posattn: what is fused, dense, or its own."""
