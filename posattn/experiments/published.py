"""What the articles report, beside which our orderings stand: perplexity by input length, 125 M parameters on arXiv.

Zheng 2024, "DAPE: Data-Adaptive Positional Encoding for Length Extrapolation" (arXiv 2405.14722), and "DAPE V2: Process
Attention Score as Feature Map for Length Extrapolation" (2410.04798).
"""

from __future__ import annotations

# By training length, then by contestant, then by input length.
PERPLEXITY: dict[int, dict[str, dict[int, float]]] = {
    512: {
        "Kerple": {512: 4.57, 8192: 9.08},
        "DAPE-Kerple": {512: 4.49, 8192: 3.70},
        "DAPE V2 (1 x 3)": {512: 4.44, 8192: 3.58},
        "RoPE": {512: 4.57, 8192: 256.0},
    },
    128: {"Kerple": {8192: 31.93}, "DAPE-Kerple": {8192: 5.00}},
}
