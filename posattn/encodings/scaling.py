"""Rules that stretch RoPE past its training length: each gives new frequencies and an attention factor.

theta_c = base^(-2c/rotary_dim) are RoPE's own frequencies; the attention factor multiplies every cosine and sine.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posattn.encodings._checks import (
    check_factor,
    check_flag,
    check_float32,
    check_positive,
    check_positive_int,
    check_sequence,
)


def rotary_frequencies(rotary_dim: int, base: float, device: torch.device | str) -> Tensor:
    """theta_c = base^(-2c/rotary_dim), float64 [rotary_dim / 2], radians per position."""
    return torch.exp(rotary_exponents(rotary_dim, device) * -math.log(base))


def rotary_exponents(rotary_dim: int, device: torch.device | str) -> Tensor:
    """2c/rotary_dim, float64 [rotary_dim / 2]."""
    return torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device) / rotary_dim


class Scaling(ABC):
    """A rule for the frequencies. `dynamic` says that they depend on the length of the sequence at hand.

    That length is the largest position in use and one, as in Hugging Face's rules, but of each sequence: a member of a
    batch or a packed document turns as it would alone. (Hugging Face takes the longest of a batch or pack for all:
    `length` of the rules that have it says so, and then they are not dynamic.)
    """

    @property
    def dynamic(self) -> bool:
        return False

    @abstractmethod
    def frequencies(
        self, rotary_dim: int, base: float, length: int | Tensor, device: torch.device | str
    ) -> tuple[Tensor, float | Tensor]:
        """The frequencies, float64 [rotary_dim / 2], and the attention factor, for a sequence of `length` tokens.

        A dynamic rule also takes lengths int64 [...] and gives frequencies [..., rotary_dim / 2], and perhaps factors
        [..., 1], with no look at their values: they are on the device.
        """


@dataclass(frozen=True)
class Linear(Scaling):
    """Position interpolation (Chen 2023, arXiv 2306.15595): theta / factor, the length wanted over the one trained."""

    factor: float

    def __post_init__(self) -> None:
        check_factor(self.factor)

    def frequencies(
        self, rotary_dim: int, base: float, length: int | Tensor, device: torch.device | str
    ) -> tuple[Tensor, float]:
        return rotary_frequencies(rotary_dim, base, device) / self.factor, 1.0


@dataclass(frozen=True)
class DynamicNTK(Scaling):
    """Dynamic NTK: base * (f * L / L0 - (f - 1))^(rot / (rot - 2)) past the length L0 (YaRN, section 3.3).

    Args:
        factor: f, the length wanted over the length trained.
        original_length: L0, tokens: the length trained.
        length: taken for L instead of each sequence's own.
    """

    factor: float
    original_length: int
    length: int | None = None

    def __post_init__(self) -> None:
        check_factor(self.factor)
        check_positive_int("original_length", self.original_length)
        if self.length is not None:
            check_positive_int("length", self.length)

    @property
    def dynamic(self) -> bool:
        return self.length is None

    def frequencies(
        self, rotary_dim: int, base: float, length: int | Tensor, device: torch.device | str
    ) -> tuple[Tensor, float]:
        if rotary_dim < 4:
            raise ValueError(f"rotary_dim: DynamicNTK expects at least 4, got {rotary_dim}")
        exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device) / rotary_dim
        power = rotary_dim / (rotary_dim - 2)
        length = length if self.length is None else self.length
        if not isinstance(length, Tensor):  # no tensor of it: that would be a copy to the device in every call
            stretch = self.factor * max(length / self.original_length, 1.0) - (self.factor - 1.0)
            return torch.exp(exponent * -(math.log(base) + math.log(stretch) * power)), 1.0
        times = length.to(device).clamp(min=self.original_length).double() / self.original_length
        log_base = math.log(base) + (self.factor * times - (self.factor - 1.0)).log() * power
        return torch.exp(exponent * -log_base[..., None]), 1.0


@dataclass(frozen=True)
class YaRN(Scaling):
    """YaRN (Peng 2023, arXiv 2309.00071): fast pairs keep theta, slow ones get theta / factor, with a ramp between.

    A pair that turns beta_fast times or more within original_length is fast, beta_slow times or fewer slow; with
    beta_fast < beta_slow the ramp falls, as in Hugging Face's code. Attention factor: attention_factor if given,
    else mscale(mscale) / mscale(mscale_all_dim) if both are given, else mscale(1), where mscale(m) =
    0.1 * m * ln(factor) + 1.

    Args:
        factor: the length wanted over the length trained.
        original_length: the length trained, tokens.
        beta_fast, beta_slow: turns within original_length.
        mscale, mscale_all_dim, attention_factor: as above.
        truncate: round the ends of the ramp to whole pairs, as the authors do.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        check_factor(self.factor)
        check_flag("truncate", self.truncate)
        check_positive_int("original_length", self.original_length)
        check_positive("beta_fast", self.beta_fast)
        check_positive("beta_slow", self.beta_slow)
        for name in ("mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                check_float32(name, getattr(self, name))
        if self.attention_factor is not None:
            check_positive("attention_factor", self.attention_factor)
        if self.mscale and self.mscale_all_dim and self._mscale(self.mscale_all_dim) <= 0.0:
            raise ValueError(
                "mscale_all_dim: expected a positive 0.1 * mscale_all_dim * ln(factor) + 1, got "
                f"{self._mscale(self.mscale_all_dim)} with {self.mscale_all_dim}"
            )

    def frequencies(
        self, rotary_dim: int, base: float, length: int | Tensor, device: torch.device | str
    ) -> tuple[Tensor, float]:
        if base == 1.0:
            raise ValueError("base: YaRN tells fast pairs from slow ones and expects a base other than 1, got 1.0")
        theta = rotary_frequencies(rotary_dim, base, device)
        low, high = self._pair(self.beta_fast, rotary_dim, base), self._pair(self.beta_slow, rotary_dim, base)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)
        if low == high:
            high += 0.001
        pair = torch.arange(rotary_dim // 2, dtype=torch.float64, device=device)
        ramp = ((pair - low) / (high - low)).clamp(0.0, 1.0)
        return theta * (ramp / self.factor + (1.0 - ramp)), self._attention_factor()

    def _pair(self, turns: float, rotary_dim: int, base: float) -> float:
        """The (fractional) pair that turns so many times within the original length."""
        return rotary_dim * math.log(self.original_length / (2.0 * math.pi * turns)) / (2.0 * math.log(base))

    def _mscale(self, weight: float) -> float:
        return 1.0 if self.factor <= 1.0 else 0.1 * weight * math.log(self.factor) + 1.0

    def _attention_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)


@dataclass(frozen=True)
class Llama3(Scaling):
    """Llama 3.1's rule: long wavelengths are divided by factor, short ones kept, those between interpolated.

    Args:
        factor: what the frequencies of long wavelengths are divided by.
        original_length: the length trained, tokens.
        low_freq_factor, high_freq_factor: a pair that turns fewer than low_freq_factor times within original_length is
            long, more than high_freq_factor times short.
    """

    factor: float
    original_length: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        check_factor(self.factor)
        check_positive_int("original_length", self.original_length)
        check_positive("low_freq_factor", self.low_freq_factor)
        check_positive("high_freq_factor", self.high_freq_factor)
        if self.high_freq_factor < self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor: expected at least low_freq_factor={self.low_freq_factor}, "
                f"got {self.high_freq_factor}"
            )

    def frequencies(
        self, rotary_dim: int, base: float, length: int | Tensor, device: torch.device | str
    ) -> tuple[Tensor, float]:
        theta = rotary_frequencies(rotary_dim, base, device)
        turns = self.original_length * theta / (2.0 * math.pi)
        if self.high_freq_factor == self.low_freq_factor:
            keep = (turns >= self.low_freq_factor).double()
        else:
            # Clamped to [0, 1], the interpolation weight is 0 for the long wavelengths and 1 for the short ones.
            keep = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0.0, 1.0)
        return theta * (keep + (1.0 - keep) / self.factor), 1.0


@dataclass(frozen=True)
class Proportional(Scaling):
    """Gemma 4's rule: the first pairs turn with the frequencies of the whole head, the others do not turn at all.

    Of rotary_dim / 2 pairs, the first floor(partial * rotary_dim / 2) keep theta_c = base^(-2c/rotary_dim), divided by
    factor; the rest have frequency 0. A shorter `rotary_dim` is something else: it pairs other dimensions with one
    another, and spreads the base over fewer pairs.
    """

    partial: float
    factor: float = 1.0

    def __post_init__(self) -> None:
        check_positive("factor", self.factor)
        if not 0.0 < check_positive("partial", self.partial) <= 1.0:
            raise ValueError(f"partial: expected a number above 0 and up to 1, got {self.partial}")

    def frequencies(
        self, rotary_dim: int, base: float, length: int | Tensor, device: torch.device | str
    ) -> tuple[Tensor, float]:
        pair = torch.arange(rotary_dim // 2, device=device)
        theta = rotary_frequencies(rotary_dim, base, device) / self.factor
        return theta * (pair < int(self.partial * rotary_dim / 2)), 1.0


@dataclass(frozen=True)
class LongRoPE(Scaling):
    """LongRoPE (Ding 2024, arXiv 2402.13753): theta_c / factor_c, from the long factors past original_length.

    Args:
        short_factor, long_factor: rotary_dim / 2 numbers each, one a pair.
        original_length: the length trained, tokens.
        factor: the maximal length over original_length.
        attention_factor: multiplies cosines and sines; sqrt(1 + ln(factor) / ln(original_length)) by default. A pair of
            numbers is for lengths up to original_length and past it (PhiMoE's short_mscale and long_mscale).
        length: chooses between short and long instead of each sequence's own.
    """

    short_factor: Sequence[float]
    long_factor: Sequence[float]
    original_length: int
    factor: float
    attention_factor: float | tuple[float, float] | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        for name in ("short_factor", "long_factor"):
            given = check_sequence(name, getattr(self, name), "numbers, one per pair")
            values = tuple(check_positive(f"{name}[{i}]", x) for i, x in enumerate(given))
            object.__setattr__(self, name, values)
        check_factor(self.factor)
        if isinstance(self.attention_factor, (tuple, list)):
            if len(self.attention_factor) != 2:
                raise ValueError(f"attention_factor: expected one number or two, got {len(self.attention_factor)}")
            pair = tuple(check_positive(f"attention_factor[{i}]", x) for i, x in enumerate(self.attention_factor))
            object.__setattr__(self, "attention_factor", pair)
        elif self.attention_factor is not None:
            check_positive("attention_factor", self.attention_factor)
        if check_positive_int("original_length", self.original_length) < 2:
            raise ValueError(f"original_length: expected at least 2, got {self.original_length}")
        if self.length is not None:
            check_positive_int("length", self.length)

    @property
    def dynamic(self) -> bool:
        return self.length is None

    def frequencies(
        self, rotary_dim: int, base: float, length: int | Tensor, device: torch.device | str
    ) -> tuple[Tensor, float | Tensor]:
        for name in ("short_factor", "long_factor"):
            count = len(getattr(self, name))
            if count != rotary_dim // 2:
                raise ValueError(f"{name}: expected {rotary_dim // 2} numbers, one per pair, got {count}")
        attention = self.attention_factor
        if attention is None:
            attention = math.sqrt(1.0 + max(math.log(self.factor), 0.0) / math.log(self.original_length))
        short, long = _numbers((self.short_factor, self.long_factor), device)
        theta = rotary_frequencies(rotary_dim, base, device)
        length = length if self.length is None else self.length
        pair = attention if isinstance(attention, tuple) else (attention, attention)
        if not isinstance(length, Tensor):
            is_longer = length > self.original_length
            return theta / (long if is_longer else short), pair[is_longer]
        is_long = (length.to(device) > self.original_length)[..., None]
        factors: float | Tensor = pair[0]
        if pair[0] != pair[1]:
            factors = torch.where(is_long, pair[1], pair[0])
        return theta / torch.where(is_long, long, short), factors


_NUMBERS: dict[tuple[object, str], Tensor] = {}


def _numbers(rows: Sequence[Sequence[float]], device: torch.device | str) -> Tensor:
    """float64 [rows, columns], sent to a device once: a graph that captures a call may not copy from the host."""
    key = (rows, str(device))
    found = None if torch.compiler.is_compiling() else _NUMBERS.get(key)
    if found is None:
        found = torch.tensor(rows, dtype=torch.float64, device=device)
        if type(found) is Tensor and not torch.compiler.is_compiling():  # not a fake one
            _NUMBERS[key] = found
    return found
