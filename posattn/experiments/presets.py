"""How large an experiment is: `smoke` takes seconds, `laptop` an evening of two cores, `paper-125m` a GPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A transformer's sizes."""

    layers: int
    heads: int
    head_dim: int

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Training:
    """Steps of AdamW on batches of `batch` sequences; the rate warms up and falls by half a cosine to a tenth."""

    steps: int
    batch: int
    rate: float
    warmup: int
    weight_decay: float = 0.01
    checkpoint_seconds: float = 30.0  # between two checkpoints; results do not depend on it


@dataclass(frozen=True)
class Extrapolation:
    """Language models: `training` by training length, evaluation lengths, and how many places of the text are scored
    on their last `scored` tokens."""

    shape: Shape
    training: dict[int, Training]
    lengths: tuple[int, ...]
    windows: int
    scored: int


@dataclass(frozen=True)
class Chomsky:
    """The formal languages: training lengths are drawn up to `train_length`, accuracies are of `tested` strings at each
    of `lengths`."""

    shape: Shape
    training: Training
    train_length: int
    lengths: tuple[int, ...]
    tested: int


@dataclass(frozen=True)
class Ablation:
    """What DAPE's ablations vary, trained at the first training length of the extrapolation."""

    widths: tuple[int, ...]
    shapes: dict[str, Shape]


@dataclass(frozen=True)
class Preset:
    name: str
    seeds: int
    extrapolation: Extrapolation
    chomsky: Chomsky
    ablation: Ablation


def _smoke() -> Preset:
    shape = Shape(layers=1, heads=4, head_dim=8)
    training = Training(steps=4, batch=2, rate=3e-3, warmup=2)
    return Preset(
        "smoke",
        seeds=2,
        extrapolation=Extrapolation(shape, {16: training}, (16, 32, 64), windows=3, scored=16),
        chomsky=Chomsky(shape, training, train_length=8, lengths=(9, 16), tested=4),
        ablation=Ablation((4, 16), {"small": shape}),
    )


def _laptop() -> Preset:
    shape = Shape(layers=3, heads=8, head_dim=16)
    lengths = (128, 512, 1024, 2048, 4096, 8192, 16384)
    return Preset(
        "laptop",
        seeds=3,
        extrapolation=Extrapolation(
            shape,
            {
                128: Training(steps=600, batch=16, rate=3e-3, warmup=20),
                512: Training(steps=600, batch=4, rate=3e-3, warmup=20),
            },
            lengths,
            windows=16,
            scored=256,
        ),
        chomsky=Chomsky(
            Shape(layers=3, heads=8, head_dim=8),
            Training(steps=3000, batch=64, rate=1e-3, warmup=50, weight_decay=0.0),
            train_length=40,
            lengths=(41, 60, 80, 100, 150, 200, 300, 400, 500),
            tested=64,
        ),
        ablation=Ablation(
            (4, 16, 32, 64), {"small": Shape(2, 8, 8), "medium": shape, "large": Shape(layers=4, heads=8, head_dim=32)}
        ),
    )


def _paper() -> Preset:
    shape = Shape(layers=12, heads=12, head_dim=64)
    training = Training(steps=50_000, batch=32, rate=6e-4, warmup=500, weight_decay=0.01, checkpoint_seconds=600.0)
    longest = (512, 1024, 2048, 4096, 8192, 16384)
    return Preset(
        "paper-125m",
        seeds=3,
        extrapolation=Extrapolation(shape, {128: training, 512: training}, (128, *longest), windows=256, scored=256),
        chomsky=Chomsky(
            Shape(layers=5, heads=8, head_dim=8),
            Training(steps=200_000, batch=128, rate=1e-3, warmup=1000, weight_decay=0.0, checkpoint_seconds=600.0),
            train_length=40,
            lengths=tuple(range(41, 501)),
            tested=512,
        ),
        ablation=Ablation(
            (4, 16, 32, 64),
            {"125m": shape, "350m": Shape(layers=24, heads=16, head_dim=64)},
        ),
    )


PRESETS = {preset.name: preset for preset in (_smoke(), _laptop(), _paper())}
