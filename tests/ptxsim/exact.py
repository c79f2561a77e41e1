"""Floating-point formats in exact arithmetic: the reference that the machine's roundings are held to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

NAN = "nan"
Exact = Fraction | float | str  # a finite value, an infinity, or NAN


@dataclass(frozen=True)
class Format:
    """An IEEE-like binary format: sign, `exponent` bits, `mantissa` stored bits."""

    exponent: int
    mantissa: int

    @property
    def bias(self) -> int:
        return (1 << (self.exponent - 1)) - 1

    @property
    def sign(self) -> int:
        return 1 << (self.exponent + self.mantissa)

    @property
    def infinity(self) -> int:
        return ((1 << self.exponent) - 1) << self.mantissa

    def decode(self, bits: int) -> Exact:
        """The value of `bits`; the sign of a zero is lost."""
        sign = -1 if bits & self.sign else 1
        magnitude = bits & (self.sign - 1)
        if magnitude > self.infinity:
            return NAN
        if magnitude == self.infinity:
            return sign * math.inf
        exponent, fraction = magnitude >> self.mantissa, magnitude & ((1 << self.mantissa) - 1)
        significand = fraction if exponent == 0 else fraction | 1 << self.mantissa
        return sign * Fraction(significand) * Fraction(2) ** (max(exponent, 1) - self.bias - self.mantissa)

    def encode(self, value: Exact, mode: str = "rn") -> int:
        """The bits of `value` rounded by "rn" (to even), "rz", "rm" (down) or "rp" (up); +0 for zero."""
        if value == NAN:
            return self.sign - 1  # the canonical NaN: all ones but the sign
        if isinstance(value, float):
            return self.infinity | (self.sign if value < 0 else 0)
        sign = self.sign if value < 0 else 0
        size = abs(value)
        if not size:
            return 0
        away = {"rz": False, "rm": value < 0, "rp": value > 0}.get(mode)
        # The unit in the last place: fixed below the smallest normal number.
        exponent = size.numerator.bit_length() - size.denominator.bit_length()
        if Fraction(2) ** exponent > size:
            exponent -= 1
        exponent = max(exponent, 1 - self.bias)
        units = size / Fraction(2) ** (exponent - self.mantissa)
        whole = math.floor(units)
        rest = units - whole
        if (away and rest) or (away is None and (rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2))):
            whole += 1
        # Carrying into the exponent is what adding the significand, with its leading one, to the bits does.
        bits = ((exponent + self.bias - 1) << self.mantissa) + whole
        largest = self.infinity - 1
        if bits > largest:
            bits = self.infinity if away is None or away else largest
        return sign | bits


F16 = Format(5, 10)
BF16 = Format(8, 7)
F32 = Format(8, 23)
F64 = Format(11, 52)
FORMATS = {"f16": F16, "bf16": BF16, "f32": F32, "f64": F64}
