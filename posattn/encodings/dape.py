"""DAPE: logits x + b + f([x; b]), f an MLP over the heads of each (i, j) (Zheng 2024, arXiv 2405.14722), or two
convolutions along the keys (DAPE V2, Zheng 2024, arXiv 2410.04798)."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from posattn.encodings._checks import check_choice, check_positive_int
from posattn.encodings._linear import weight_and_bias
from posattn.encodings.alibi import ALiBi
from posattn.encodings.base import Context, Encoding
from posattn.encodings.fire import FIRE
from posattn.encodings.kerple import Kerple
from posattn.encodings.rope import RoPE
from posattn.errors import described
from posattn.plan import EDGES, FORMS, Bias, HeadMix, Plan


class DAPE(Encoding):
    """Data-adaptive: the logits of all heads and an inner bias go through an MLP that corrects the logits.

    x are the scaled logits before the mask, b the inner bias, and f = Linear -> LeakyReLU(0.01) -> Linear is `mlp`.
    A rotary part of the inner encoding turns q and k as it would alone. Without an inner bias every form is x + f(x).

    Args:
        inner: the encoding of b, or None.
        num_heads: number of query heads H.
        width: hidden units of the MLP.
        form: "concat-residual" x + b + f([x; b]), the paper's best; "concat" x + f([x; b]); "add" x + b + f(x + b).
        kernel: 1, or the odd number k of keys that both layers of f see, as convolutions over z = [x; b], which is zero
            for keys that a query does not see (DAPE V2, k = 3). No fused kernel does that yet: backend="reference".
        edge: where the convolution of the hidden layer ends. "causal": that layer goes on past the last key, as if
            zeros followed, so that a query's result is the same whether or not keys after it are there, and a cache
            gives what the whole does. "paper": it is zero past the last key, as in the authors' code, whose last query
            differs for that from what it is in a longer text.

    Raises:
        ValueError: an even kernel, or what does not go together.
    """

    def __init__(
        self,
        inner: Encoding | None,
        num_heads: int,
        width: int = 32,
        form: str = "concat-residual",
        kernel: int = 1,
        edge: str = "causal",
    ) -> None:
        super().__init__()
        if inner is not None and not isinstance(inner, Encoding):
            raise TypeError(f"inner: expected an Encoding or None, got {described(inner)}")
        self.num_heads = check_positive_int("num_heads", num_heads)
        if inner is not None and inner.num_heads not in (None, num_heads):
            raise ValueError(f"inner: expected an encoding with num_heads={num_heads}, got {inner.num_heads}")
        if inner is not None and any(isinstance(m, DAPE) for m in inner.modules()):
            raise ValueError("inner: expected an encoding without a DAPE in it, got one; the heads can be mixed once")
        self.form = check_choice("form", form, FORMS)
        self.width = check_positive_int("width", width)
        self.inner = inner
        self.fractional = inner is None or inner.fractional
        self.needs_positions = inner is not None and inner.needs_positions
        # A profile inside is the mix's own; one beside it has the plan's place.
        self.sole_operands = frozenset({"mix"}) | (frozenset() if inner is None else inner.sole_operands - {"profile"})
        both = inner is not None and inner.has_bias and form != "add"
        self.kernel, self.edge = check_positive_int("kernel", kernel), check_choice("edge", edge, EDGES)
        self.fused = kernel == 1
        if kernel % 2 == 0:
            raise ValueError(f"kernel: expected an odd number of keys, got {kernel}")
        inputs = 2 * num_heads if both else num_heads
        self.mlp = nn.Sequential(self._layer(inputs, width), nn.LeakyReLU(0.01), self._layer(width, num_heads))

    def _layer(self, inputs: int, outputs: int) -> nn.Module:
        if self.kernel == 1:
            return nn.Linear(inputs, outputs)
        return nn.Conv2d(inputs, outputs, (1, self.kernel), padding=(0, self.kernel // 2))

    def build(self, context: Context) -> Plan:
        inner = Plan(bias=Bias()) if self.inner is None else self.inner(context)
        (w1, b1), (w2, b2) = weight_and_bias(self.mlp[0]), weight_and_bias(self.mlp[2])
        if self.kernel > 1:
            w1, w2 = w1[:, :, 0], w2[:, :, 0]
        dtype = context.table_dtype(w1)
        mix = HeadMix(w1.to(dtype), b1.to(dtype), w2.to(dtype), b2.to(dtype), self.form, inner.bias, self.edge)
        return replace(inner, mix=mix, bias=Bias())

    @classmethod
    def examples(cls, num_heads: int, head_dim: int, tokens: int) -> dict[str, Encoding]:
        fire = FIRE(num_heads, initial_length=max(tokens / 2.0, 1.0))
        return {
            "DAPE": cls(None, num_heads),
            "DAPE-RoPE": cls(RoPE(head_dim), num_heads),
            "DAPE-ALiBi add": cls(ALiBi(num_heads, learnable=True), num_heads, form="add"),
            "DAPE-Kerple": cls(Kerple(num_heads), num_heads),
            "DAPE-Kerple concat": cls(Kerple(num_heads), num_heads, form="concat"),
            "DAPE-RoPE-FIRE": cls(RoPE(head_dim) + fire, num_heads),
        }

    def extra_repr(self) -> str:
        convolved = f", kernel={self.kernel}, edge={self.edge!r}" if self.kernel > 1 else ""
        return f"{self.num_heads}, width={self.width}, form={self.form!r}{convolved}"
