"""`posattn demo`: train, extrapolate and measure a small byte-level decoder with several encodings on real text."""
