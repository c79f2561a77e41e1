"""What is timed: cases, each a few variants on one shape in interleaved runs, with the ratios that they should reach.

The shapes and targets are those of a B=1, H=12, D=64 layer on two cores; on a GPU the same cases run its backends.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Mode = Literal["forward", "backward", "both"]
Measure = Literal["speed", "cost", "share", "overhead", "growth", "bits", "memory"]

HEADLINE = ("none", "RoPE", "ALiBi", "Kerple", "T5Bias", "FIRE")
LENGTHS = tuple(128 << n for n in range(9))  # 128 to 32768: a sweep's
# The same, with parameters to train where gradients are wanted.
TRAINED = ("none", "RoPE", "ALiBi learnable", "Kerple", "T5Bias", "FIRE")
BIASES = 2  # where the additive ones of either begin


@dataclass(frozen=True)
class Variant:
    """One contender. `length` and `threads` replace the case's, so that a case can hold several."""

    peer: str  # a name of peers.PEERS
    encoding: str = "none"
    backend: str = "auto"
    length: int | None = None
    threads: int | None = None

    @property
    def name(self) -> str:
        parts = [self.peer]
        if self.encoding != "none" or self.peer == "posattn":
            parts.append(self.encoding)
        if self.backend != "auto":
            parts.append(self.backend)
        name = ":".join(parts)
        if self.length is not None:
            name += f" N={self.length}"
        return name if self.threads is None else f"{name} threads={self.threads}"


@dataclass(frozen=True)
class Target:
    """A figure to reach, by variant names.

    speed: time of `against` over time of `variant`, at least `bound`. cost: the inverse, at most. share: of the
    measured peak, at least. overhead: seconds over `against`, at most. growth: relative departure of time (or memory)
    over its law from `against`, at most. bits: equal results, 1 or 0. memory: megabytes, at most.
    """

    measure: Measure
    variant: str
    bound: float
    against: str = ""

    @property
    def at_least(self) -> bool:
        return self.measure in ("speed", "share", "bits")


@dataclass(frozen=True)
class Case:
    """Variants on q [batch, heads, q_len, head_dim] and keys [.., k_len, ..], run in turn for about `seconds`."""

    name: str
    variants: tuple[Variant, ...]
    targets: tuple[Target, ...] = ()
    mode: Mode = "forward"
    dtype: str = "float32"
    batch: int = 1
    heads: int = 12
    kv_heads: int | None = None  # as many as heads
    q_len: int = 2048
    k_len: int = 2048
    head_dim: int = 64
    causal: bool = True
    seconds: float = 25.0
    memory: bool = False  # measure peak memory, each variant in its own process, in place of time

    def shaped(self, variant: Variant) -> Case:
        """This case at the variant's own length."""
        return self if variant.length is None else replace(self, q_len=variant.length, k_len=variant.length)


def standard() -> tuple[Case, ...]:
    """What `make bench` runs, in under 15 minutes on two cores: every figure that the project has set itself."""
    return (
        _forward("float32", speed=1.7, flex=2.6, share=0.83),
        _forward("bfloat16", speed=2.9, flex=6.0, share=0.72),
        _forward("float16"),
        _full("float32", share=0.83),
        _full("bfloat16", share=0.72),
        _both("float32", speed=1.6, mask=7.0),
        _both("bfloat16", speed=2.4, mask=13.0),
        _backward("float32", share=0.76),
        _backward("bfloat16", share=0.58),
        *_head_mixing(),
        _decoding("float32"),
        _decoding("bfloat16"),
        *_decoding_batch(),
        *_encoders(),
        *_threads(),
        _growth(),
        *_memory(),
        _short(),
    )


def sweep(encodings: tuple[str, ...], lengths: tuple[int, ...], seconds: float = 30.0) -> tuple[Case, ...]:
    """Every encoding beside SDPA without a bias and, up to 4096, SDPA with a mask and eager PyTorch."""
    modes: tuple[Mode, ...] = ("forward", "backward", "both")
    cases = []
    for mode in modes:
        for dtype in ("float32", "bfloat16", "float16"):
            for length in lengths:
                variants = [Variant("posattn", name) for name in encodings]
                variants.append(Variant("sdpa"))
                if length <= 4096:
                    masked = "sdpa-mask" if mode == "forward" else "sdpa-mask-grad"
                    variants += [Variant(masked, "Kerple"), Variant("eager", "Kerple")]
                name = f"sweep-{mode}-{dtype}-{length}"
                cases.append(
                    Case(name, tuple(variants), mode=mode, dtype=dtype, q_len=length, k_len=length, seconds=seconds)
                )
    return tuple(cases)


def quick() -> tuple[Case, ...]:
    """The standard cases so small that they show only that everything runs; there is nothing to reach."""
    small = []
    for case in standard():
        # torch.compile takes longer than everything else together.
        variants = tuple(_shorten(variant) for variant in case.variants if variant.peer != "flex")
        kv_heads = None if case.kv_heads is None else 2
        tiny = replace(case, heads=4, kv_heads=kv_heads, batch=min(case.batch, 2), head_dim=32)
        tiny = replace(tiny, q_len=min(case.q_len, 96), k_len=96)
        small.append(replace(tiny, variants=variants, targets=(), seconds=0.05))
    return tuple(small)


def _shorten(variant: Variant) -> Variant:
    return variant if variant.length is None else replace(variant, length=max(variant.length // 64, 16))


def _posattn(*encodings: str) -> tuple[Variant, ...]:
    return tuple(Variant("posattn", name) for name in encodings)


def _name(encoding: str) -> str:
    return Variant("posattn", encoding).name


def _forward(dtype: str, speed: float | None = None, flex: float | None = None, share: float | None = None) -> Case:
    peers = (
        Variant("sdpa"),
        Variant("sdpa-mask", "Kerple"),
        Variant("sdpa-mask-build", "Kerple"),
        Variant("flex", "ALiBi"),
    )
    targets = [Target("speed", _name(name), speed, "sdpa") for name in HEADLINE] if speed else []
    targets += [Target("cost", _name(name), 1.05, _name("none")) for name in HEADLINE[1:]]
    targets += [Target("speed", _name(name), 1.0, "sdpa-mask:Kerple") for name in HEADLINE[BIASES:]]
    if flex:
        targets.append(Target("speed", _name("ALiBi"), flex, "flex:ALiBi"))
    if share:
        targets.append(Target("share", _name("none"), share))
    return Case(f"forward-{dtype}", (*_posattn(*HEADLINE), *peers), tuple(targets), dtype=dtype, seconds=30.0)


def _full(dtype: str, share: float) -> Case:
    target = Target("share", _name("none"), share)
    return Case(
        f"full-{dtype}", (*_posattn("none"), Variant("sdpa")), (target,), dtype=dtype, causal=False, seconds=12.0
    )


def _both(dtype: str, speed: float, mask: float) -> Case:
    peers = (Variant("sdpa"), Variant("sdpa-mask-grad", "Kerple"))
    targets = [Target("speed", _name(name), speed, "sdpa") for name in TRAINED]
    targets += [Target("speed", _name(name), mask, "sdpa-mask-grad:Kerple") for name in TRAINED[BIASES:]]
    return Case(f"both-{dtype}", (*_posattn(*TRAINED), *peers), tuple(targets), mode="both", dtype=dtype, seconds=50.0)


def _backward(dtype: str, share: float) -> Case:
    target = Target("share", _name("none"), share)
    variants = (*_posattn("none", "ALiBi learnable"), Variant("sdpa"))
    return Case(f"backward-{dtype}", variants, (target,), mode="backward", dtype=dtype, seconds=20.0)


def _head_mixing() -> tuple[Case, ...]:
    variants = (*_posattn("none", "DAPE-Kerple"), Variant("eager", "DAPE-Kerple"))
    forward = (
        Target("speed", _name("DAPE-Kerple"), 14.0, "eager:DAPE-Kerple"),
        Target("cost", _name("DAPE-Kerple"), 2.1, _name("none")),
        Target("share", _name("DAPE-Kerple"), 0.65),
    )
    both = (Target("speed", _name("DAPE-Kerple"), 11.0, "eager:DAPE-Kerple"),)
    return (
        Case("dape-forward-float32", variants, forward, seconds=20.0),
        Case("dape-forward-bfloat16", variants, forward[:2], dtype="bfloat16", seconds=20.0),
        Case("dape-both-float32", variants, both, mode="both", seconds=35.0),
    )


def _decoding(dtype: str) -> Case:
    target = Target("share", _name("none"), 0.80)
    variants = (*_posattn("none", "ALiBi"), Variant("sdpa"))
    return Case(f"decode-{dtype}", variants, (target,), dtype=dtype, q_len=1, k_len=32768, seconds=8.0)


def _decoding_batch() -> tuple[Case, ...]:
    """A server's step: 32 sequences, four heads to a key head."""
    variants = (*_posattn("none", "RoPE", "ALiBi"), Variant("sdpa"))
    shape = Case("", variants, batch=32, heads=32, kv_heads=8, q_len=1, k_len=1024, head_dim=128, seconds=8.0)
    return tuple(replace(shape, name=f"decode-batch-{dtype}", dtype=dtype) for dtype in ("float32", "bfloat16"))


def _encoders() -> tuple[Case, ...]:
    """The base sizes of T5's encoder, whose peer has its bias as a mask already built, and of BERT."""
    t5 = (*_posattn("T5Bias", "none"), Variant("sdpa"), Variant("sdpa-mask", "T5Bias"))
    bert = (*_posattn("none"), Variant("sdpa"))
    shape = Case("", (), batch=8, q_len=512, k_len=512, causal=False, seconds=6.0)
    return tuple(
        replace(shape, name=f"{name}-{dtype}", variants=variants, dtype=dtype)
        for name, variants in (("t5-encoder", t5), ("bert", bert))
        for dtype in ("float32", "bfloat16")
    )


def _threads() -> tuple[Case, ...]:
    one, two = (Variant("posattn", "ALiBi learnable", threads=count) for count in (1, 2))
    targets = (Target("speed", two.name, 1.85, one.name), Target("bits", two.name, 1.0, one.name))
    return (
        Case("threads-forward", (one, two), targets, seconds=10.0),
        Case("threads-both", (one, two), targets, mode="both", seconds=20.0),
    )


def _growth() -> Case:
    variants = tuple(Variant("posattn", "FIRE", length=length) for length in (2048, 4096, 8192, 16384))
    targets = tuple(Target("growth", variant.name, 0.15, variants[0].name) for variant in variants[1:])
    return Case("growth", variants, targets, seconds=30.0)


def _memory() -> tuple[Case, ...]:
    fire = tuple(Variant("posattn", "FIRE", length=length) for length in (8192, 16384, 32768))
    dape = Variant("posattn", "DAPE-Kerple", length=8192)
    linear = Target("growth", fire[2].name, 0.15, fire[1].name)
    return (
        Case("memory-forward", fire, (Target("memory", fire[2].name, 200.0), linear), memory=True),
        Case("memory-dape", (dape,), (Target("memory", dape.name, 200.0),), mode="both", memory=True),
    )


def _short() -> Case:
    variants = (*_posattn("none", "ALiBi"), Variant("sdpa"))
    targets = (Target("speed", _name("none"), 1.0, "sdpa"), Target("overhead", _name("none"), 30e-6, "sdpa"))
    return Case("short", variants, targets, batch=16, q_len=128, k_len=128, seconds=8.0)


def on_gpu(case: Case) -> Case:
    """The case with posattn's GPU backends side by side and flash-attn among the peers; the CPU's targets are gone."""
    variants = []
    for variant in case.variants:
        if variant.threads is not None:
            continue
        if variant.peer == "posattn":
            variants += [replace(variant, backend=backend) for backend in ("cuda", "triton")]
        else:
            variants.append(variant)
    if not case.memory and all(variant.length is None for variant in case.variants):
        variants += [Variant("flash-attn"), Variant("flash-attn", "ALiBi")]
    return replace(case, variants=tuple(variants), targets=())
