"""What posattn raises for an argument that it cannot take: ValueError or TypeError, and RuntimeError besides, which is
what torch's own functions raise, so that code around them catches these too."""

# The end of a message where head and token counts would fit the other way round.
SWAPPED = "; q, k and v are [batch, heads, tokens, head_dim]: from [batch, tokens, heads, head_dim], transpose(1, 2)"


class ArgumentValueError(ValueError, RuntimeError):
    """An argument with the wrong shape, device or value, or no backend that can run the call."""


class ArgumentTypeError(TypeError, RuntimeError):
    """An argument of the wrong type or dtype."""


def described(value: object) -> str:
    """What came instead of an instance of a class, for messages: its type, or that it is the class itself."""
    if isinstance(value, type):
        return f"the class {value.__name__}; make an instance of it, {value.__name__}(...)"
    return type(value).__name__
