"""What is compared, by name: each is made anew for every layer of a model, from its shape and training length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

import posattn
from posattn.encodings.base import Encoding
from posattn.experiments.presets import Shape
from posattn.experiments.static_mix import StaticMix

Make = Callable[[Shape, int], Encoding | None]


@dataclass(frozen=True)
class Contestant:
    """`make(shape, train_length)` gives a layer's encoding, None for none; `sinusoidal` adds sines to the embeddings.

    With `trained_as`, nothing is trained: the model is that contestant's, and `make` is called with the length that is
    evaluated, beside the one trained: `make_longer(shape, train_length, length)`.
    """

    make: Make
    sinusoidal: bool = False
    trained_as: str | None = None
    make_longer: Callable[[Shape, int, int], Encoding] | None = None


def dape(inner: Make, width: int = 32, form: str = "concat-residual") -> Make:
    return lambda shape, length: posattn.DAPE(inner(shape, length), shape.heads, width, form)


def _rope(shape: Shape, length: int) -> Encoding:
    return posattn.RoPE(shape.head_dim)


def _alibi(shape: Shape, length: int) -> Encoding:
    return posattn.ALiBi(shape.heads)


def _kerple(shape: Shape, length: int) -> Encoding:
    return posattn.Kerple(shape.heads)


def _fire(shape: Shape, length: int) -> Encoding:
    return posattn.FIRE(shape.heads, initial_length=float(length))


def _yarn(shape: Shape, train_length: int, length: int) -> Encoding:
    factor = max(1.0, length / train_length)
    return posattn.RoPE(shape.head_dim, scaling=posattn.YaRN(factor, train_length))


def _ntk(shape: Shape, train_length: int, length: int) -> Encoding:
    """NTK-aware: the base grows so that the slowest pair turns as far at `length` as it did at the training length."""
    factor = max(1.0, length / train_length)
    exponent = shape.head_dim / (shape.head_dim - 2)
    return posattn.RoPE(shape.head_dim, base=10000.0 * factor**exponent)


# Decoders of text. Causal, so that even NoPE knows how many tokens came before.
DECODERS: dict[str, Contestant] = {
    "NoPE": Contestant(lambda shape, length: None),
    "sinusoidal": Contestant(lambda shape, length: None, sinusoidal=True),
    "RoPE": Contestant(_rope),
    "RoPE, YaRN": Contestant(_rope, trained_as="RoPE", make_longer=_yarn),
    "RoPE, NTK": Contestant(_rope, trained_as="RoPE", make_longer=_ntk),
    "T5": Contestant(lambda shape, length: posattn.T5Bias(shape.heads)),
    "ALiBi": Contestant(_alibi),
    "Kerple": Contestant(_kerple),
    "FIRE": Contestant(_fire),
    "Sandwich": Contestant(lambda shape, length: posattn.Sandwich(shape.heads)),
    "DAPE-ALiBi": Contestant(dape(_alibi)),
    "DAPE-Kerple": Contestant(dape(_kerple)),
    "DAPE-FIRE": Contestant(dape(_fire)),
}

# Encoders, which see both sides: the forms that tell left from right where there is one.
ENCODERS: dict[str, Contestant] = {
    "NoPE": Contestant(lambda shape, length: None),
    "sinusoidal": Contestant(lambda shape, length: None, sinusoidal=True),
    "RoPE": Contestant(_rope),
    "T5": Contestant(lambda shape, length: posattn.T5Bias(shape.heads, bidirectional=True)),
    "ALiBi": Contestant(lambda shape, length: posattn.ALiBi(shape.heads, signed=True)),
    "Kerple": Contestant(_kerple),
    "FIRE": Contestant(lambda shape, length: posattn.FIRE(shape.heads, initial_length=length, bidirectional=True)),
    "DAPE-Kerple": Contestant(dape(_kerple)),
    "DAPE-FIRE": Contestant(
        dape(lambda shape, length: posattn.FIRE(shape.heads, initial_length=length, bidirectional=True))
    ),
}

# Which of two is the data-adaptive form of the other.
PAIRS = (("DAPE-ALiBi", "ALiBi"), ("DAPE-Kerple", "Kerple"), ("DAPE-FIRE", "FIRE"))


def ablations(widths: tuple[int, ...]) -> dict[str, Contestant]:
    """DAPE over Kerple by hidden width and by form; f(B), a network of the bias alone; and Kerple by itself."""
    by_width = {f"width {width}": Contestant(dape(_kerple, width)) for width in widths}
    by_form = {f"form {form}": Contestant(dape(_kerple, form=form)) for form in ("concat-residual", "concat", "add")}
    static = Contestant(lambda shape, length: StaticMix(posattn.Kerple(shape.heads), shape.heads))
    return {"Kerple": Contestant(_kerple), "f(B)": static, **by_form, **by_width}


def encodings_of(model: nn.Module) -> list[Encoding]:
    """The encodings of a model's layers, outermost ones alone."""
    inner = {id(child) for module in model.modules() if isinstance(module, Encoding) for child in module.children()}
    return [module for module in model.modules() if isinstance(module, Encoding) and id(module) not in inner]
