"""LogitScale: the logits of the query at position p times a(p): 1 + 0.1 ln(1 + floor((p + 1) / 8192)) (Llama 4), s_h
ln(p + 1) (scaled softmax: Nakanishi 2025, arXiv 2501.19399), or (0.1 m ln(factor) + 1)^2 (YaRN as DeepSeek has it)."""

from __future__ import annotations

import math

import torch
from torch import nn

from posattn.encodings._checks import check_choice, check_float32, check_positive, check_positive_int
from posattn.encodings.base import Context, Encoding
from posattn.plan import Bias, Plan

FORMS = ("llama4", "log", "yarn")


class LogitScale(Encoding):
    """A factor on q k^T that goes by the query's position, before any softcap or bias: `RoPE(64) + LogitScale("log")`.

    It costs a pass over q, and nothing where a rotation turns the whole head.

    Args:
        form: "llama4": 1 + strength * ln(1 + floor((p + 1) / length)), for Llama 4's layers without RoPE.
            "log": strength * ln(p + 1): p + 1 is the number of keys that a causal query sees.
            "yarn": (0.1 * strength * ln(factor) + 1)^2 at every position (the scale of DeepSeek-V3's softmax, with
            mscale_all_dim as strength).
        strength: 0.1 for "llama4", 1 / ln(length) for "log", which is 1 at `length` keys, and 1 for "yarn" by default.
        length: 8192 by default.
        factor: for "yarn" alone: the length wanted over the length trained.
        num_heads: for "log" alone: learn a strength for each of so many query heads, `strength` [H].
    """

    has_bias = False
    fractional = True

    def __init__(
        self,
        form: str = "llama4",
        strength: float | None = None,
        length: int = 8192,
        factor: float | None = None,
        num_heads: int | None = None,
    ) -> None:
        super().__init__()
        self.form = check_choice("form", form, FORMS)
        self.length = check_positive_int("length", length)
        if form == "log" and strength is None and length == 1:
            raise ValueError("length: expected at least 2 for the default strength 1 / ln(length), got 1")
        defaults = {"llama4": 0.1, "log": 0.0 if length == 1 else 1.0 / math.log(length), "yarn": 1.0}
        self.initial = check_float32("strength", defaults[form] if strength is None else strength)
        if (factor is None) != (form != "yarn"):
            expected = "a number" if form == "yarn" else "None"
            raise ValueError(f"factor: expected {expected} with form={form!r}, got {factor}")
        self.factor = None if factor is None else check_positive("factor", factor)
        if num_heads is None:
            return
        if form != "log":
            raise ValueError(f"num_heads: expected None with form={form!r}, where nothing is learned, got {num_heads}")
        self.num_heads = check_positive_int("num_heads", num_heads)
        self.strength = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.num_heads is not None:
            nn.init.constant_(self.strength, self.initial)

    def build(self, context: Context) -> Plan:
        positions, _ = context.token_positions()
        seen = positions.clamp(min=0).double() + 1.0  # a query before the first key sees none
        dtype = context.table_dtype(*self.parameters())
        if self.form == "llama4":
            amplitude = 1.0 + self.initial * torch.log1p((seen / self.length).floor())
        elif self.factor is not None:
            amplitude = torch.full_like(seen, (0.1 * self.initial * math.log(max(self.factor, 1.0)) + 1.0) ** 2)
        else:
            amplitude = seen.log()
            if self.num_heads is not None:
                return Plan(bias=Bias(), amplitude=self.strength.to(dtype)[:, None] * amplitude[:, None].to(dtype))
            amplitude = self.initial * amplitude
        return Plan(bias=Bias(), amplitude=amplitude[:, None].to(dtype))

    @classmethod
    def examples(cls, num_heads: int, head_dim: int, tokens: int) -> dict[str, Encoding]:
        return {
            "LogitScale": cls(length=max(tokens // 3, 1)),
            "LogitScale log": cls("log", length=max(tokens, 2), num_heads=num_heads),
        }

    def extra_repr(self) -> str:
        return f"{self.form!r}, strength={self.initial:g}, length={self.length}, factor={self.factor}"
