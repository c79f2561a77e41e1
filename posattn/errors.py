"""What posattn raises for an argument that it cannot take: ValueError or TypeError, and RuntimeError besides, which is
what torch's own functions raise, so that code around them catches these too."""


class ArgumentValueError(ValueError, RuntimeError):
    """An argument with the wrong shape, device or value, or no backend that can run the call."""


class ArgumentTypeError(TypeError, RuntimeError):
    """An argument of the wrong type or dtype."""
