"""The fifteen tasks of the Chomsky hierarchy (Deletang 2022, arXiv 2207.02098; Ruoss 2023, 2305.16843).

A task draws strings of a length and says what is asked of each. `sample(task, n, length, generator)` makes tensors of
them. Answers that may be shorter than their place end with a symbol of their own, and what follows it is not scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from random import Random

import torch
from torch import Tensor

MODULUS = 5
OPERATORS = "+-*"
Strings = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Task:
    """`draw(random, length)` gives an input, at most `length` symbols below `symbols`, and its answer,
    `answer_length(length)` classes below `answers`. Scored are all of them, or those up to the `end` symbol and it.
    `permutable`: the answer does not depend on the order of the input."""

    level: str
    symbols: int
    answers: int
    draw: Callable[[Random, int], Strings]
    answer_length: Callable[[int], int] = lambda length: 1
    end: int | None = None
    shortest: int = 1
    permutable: bool = False


def bits(random: Random, length: int) -> list[int]:
    return random.choices((0, 1), k=length)


def even_pairs(random: Random, length: int) -> Strings:
    """Whether the pairs 01 and 10 are even in number together: 0; odd: 1."""
    text = bits(random, length)
    return text, [sum(a != b for a, b in pairwise(text)) % 2]


def parity_check(random: Random, length: int) -> Strings:
    """Whether the number of ones is odd."""
    text = bits(random, length)
    return text, [sum(text) % 2]


def cycle_navigation(random: Random, length: int) -> Strings:
    """Where on a circle of five places one ends after steps of -1 (0), 0 (1) and 1 (2)."""
    text = random.choices((0, 1, 2), k=length)
    return text, [sum(step - 1 for step in text) % MODULUS]


def modular_arithmetic_simple(random: Random, length: int) -> Strings:
    """An expression of digits and +, -, * without brackets, of odd length; its value modulo five."""
    digits = (length + 1) // 2
    numbers = random.choices(range(MODULUS), k=digits)
    signs = random.choices(range(len(OPERATORS)), k=digits - 1)
    text = [numbers[0]]
    for sign, number in zip(signs, numbers[1:]):
        text += [MODULUS + sign, number]
    return text, [evaluate([symbol_text(symbol) for symbol in text])]


def symbol_text(symbol: int) -> str:
    """The character of an arithmetic symbol: digits, operators, brackets, the unknown, the equals sign."""
    return str(symbol) if symbol < MODULUS else (OPERATORS + "()x=")[symbol - MODULUS]


def evaluate(characters: list[str]) -> int:
    """An arithmetic expression's value modulo five, by the usual precedence; it may be as long as one likes."""
    # A stack in place of recursion: brackets may be hundreds deep. Each frame is [sum so far, sign, product so far].
    frames = [[0, 1, 1]]
    for place, character in enumerate(characters):
        if character.isdigit():
            frames[-1][2] = frames[-1][2] * int(character) % MODULUS
        elif character == "(":
            frames.append([0, 1, 1])
        elif character == ")":
            total, sign, product = frames.pop()
            frames[-1][2] = frames[-1][2] * (total + sign * product) % MODULUS
        elif character in "+-":
            total, sign, product = frames[-1]
            step = 1 if character == "+" else -1
            if place == 0 or characters[place - 1] in "(+-*":  # the sign of what follows
                frames[-1][1] *= step
            else:
                frames[-1] = [(total + sign * product) % MODULUS, step, 1]
    total, sign, product = frames[0]
    return (total + sign * product) % MODULUS


def expression(random: Random, length: int) -> list[int]:
    """Symbols of an expression with brackets over + and - of exactly `length`: a digit, its negative, one in brackets,
    or (left op right)."""
    text: list[int] = []
    open_, close, minus = MODULUS + 3, MODULUS + 4, MODULUS + 1
    todo: list[int] = [-length]  # what is to be written, from the end: a symbol, or minus the length of an expression
    while todo:
        what = todo.pop()
        if what >= 0:
            text.append(what)
            continue
        size = -what
        if size <= 4:
            digit = random.randrange(MODULUS)
            text += {1: [digit], 2: [minus, digit], 3: [open_, digit, close], 4: [open_, minus, digit, close]}[size]
            continue
        left = random.randint(1, size - 4)
        todo += [close, -(size - 3 - left), MODULUS + random.randrange(2), -left, open_]
    return text


def modular_arithmetic(random: Random, length: int) -> Strings:
    """An expression with brackets over + and -; its value modulo five."""
    text = expression(random, length)
    return text, [evaluate([symbol_text(symbol) for symbol in text])]


def solve_equation(random: Random, length: int) -> Strings:
    """An equation, an expression of which one digit is the unknown, = and its value; the unknown's value. Only + and -
    occur, so there is one answer."""
    text = expression(random, length - 2)
    value = evaluate([symbol_text(symbol) for symbol in text])
    places = [place for place, symbol in enumerate(text) if symbol < MODULUS]
    place = random.choice(places)
    answer = text[place]
    text[place] = MODULUS + 5
    return [*text, MODULUS + 6, value], [answer]


def stack_manipulation(random: Random, length: int) -> Strings:
    """A stack of bits from its bottom, then POP (2), PUSH 0 (3) and PUSH 1 (4); the stack from its top, then its end.
    POP of an empty stack does nothing."""
    size = random.randint(1, max(length - 1, 1))
    stack = bits(random, size)
    actions = random.choices((2, 3, 4), k=length - size)
    text = [*stack, *actions]
    for action in actions:
        if action > 2:
            stack.append(action - 3)
        elif stack:
            stack.pop()
    return text, _ended(stack[::-1], length + 1)


def reverse_string(random: Random, length: int) -> Strings:
    text = bits(random, length)
    return text, text[::-1]


def duplicate_string(random: Random, length: int) -> Strings:
    text = bits(random, length)
    return text, text + text


def missing_duplicate(random: Random, length: int) -> Strings:
    """A string twice over with one bit hidden (2); that bit, the one that occurs an odd number of times. An odd length
    ends with an empty symbol (3)."""
    half = bits(random, length // 2)
    text = half + half
    place = random.randrange(len(text))
    answer = text[place]
    text[place] = 2
    return text + [3] * (length % 2), [answer]


def odds_first(random: Random, length: int) -> Strings:
    """The symbols in places 1, 3, 5 and so on, counted from 0, then those in places 0, 2, 4."""
    text = bits(random, length)
    return text, text[1::2] + text[::2]


def bucket_sort(random: Random, length: int) -> Strings:
    text = random.choices(range(MODULUS), k=length)
    return text, sorted(text)


def binary_addition(random: Random, length: int) -> Strings:
    """Two numbers, lowest bit first, with a sign (2) between; their sum, lowest bit first, then its end."""
    text, first, second = _two_numbers(random, length)
    return text, _ended(_lowest_first(first + second), length + 1)


def binary_multiplication(random: Random, length: int) -> Strings:
    """As the sum, their product."""
    text, first, second = _two_numbers(random, length)
    return text, _ended(_lowest_first(first * second), length + 1)


def compute_sqrt(random: Random, length: int) -> Strings:
    """A number, highest bit first; the floor of its square root, highest bit first, in half as many bits."""
    number = random.randint(1, 2**length - 1)
    root = math.isqrt(number)
    return _fixed(number, length), _fixed(root, (length + 1) // 2)


def _two_numbers(random: Random, length: int) -> tuple[list[int], int, int]:
    sizes = random.randint(1, length - 2)
    first, second = bits(random, sizes), bits(random, length - 1 - sizes)
    return [*first, 2, *second], _value(first), _value(second)


def _value(text: list[int]) -> int:
    return sum(bit << place for place, bit in enumerate(text))


def _lowest_first(number: int) -> list[int]:
    return [int(bit) for bit in reversed(f"{number:b}")]


def _fixed(number: int, length: int) -> list[int]:
    return [int(bit) for bit in f"{number:0{length}b}"]


def _ended(answer: list[int], length: int) -> list[int]:
    return [*answer, 2, *([0] * (length - 1 - len(answer)))]


def _same(length: int) -> int:
    return length


def _one_more(length: int) -> int:
    return length + 1


ARITHMETIC = MODULUS + 7
TASKS: dict[str, Task] = {
    "even pairs": Task("regular", 2, 2, even_pairs),
    "modular arithmetic (simple)": Task("regular", ARITHMETIC, MODULUS, modular_arithmetic_simple),
    "parity check": Task("regular", 2, 2, parity_check, permutable=True),
    "cycle navigation": Task("regular", 3, MODULUS, cycle_navigation, permutable=True),
    "stack manipulation": Task("context-free", 5, 3, stack_manipulation, _one_more, end=2),
    "reverse string": Task("context-free", 2, 2, reverse_string, _same),
    "modular arithmetic": Task("context-free", ARITHMETIC, MODULUS, modular_arithmetic),
    "solve equation": Task("context-free", ARITHMETIC, MODULUS, solve_equation, shortest=3),
    "duplicate string": Task("context-sensitive", 2, 2, duplicate_string, lambda length: 2 * length),
    "missing duplicate": Task("context-sensitive", 4, 2, missing_duplicate, shortest=2, permutable=True),
    "odds first": Task("context-sensitive", 2, 2, odds_first, _same),
    "binary addition": Task("context-sensitive", 3, 3, binary_addition, _one_more, end=2, shortest=3),
    "binary multiplication": Task("context-sensitive", 3, 3, binary_multiplication, _one_more, end=2, shortest=3),
    "compute sqrt": Task("context-sensitive", 2, 2, compute_sqrt, lambda length: (length + 1) // 2),
    "bucket sort": Task("context-sensitive", MODULUS, MODULUS, bucket_sort, _same, permutable=True),
}


@dataclass(frozen=True)
class Batch:
    """inputs [n, T] and answers [n, A] int64, and which of the answers are scored, [n, A] bool."""

    inputs: Tensor
    answers: Tensor
    scored: Tensor


def sample(task: Task, n: int, length: int, generator: torch.Generator) -> Batch:
    """`n` strings of a length; equal generators give equal strings."""
    random = Random(int(torch.randint(2**62, (), generator=generator)))
    inputs, answers = zip(*(task.draw(random, length) for _ in range(n)))
    wanted = torch.tensor(answers)
    scored = torch.ones_like(wanted, dtype=torch.bool)
    if task.end is not None:
        place = torch.arange(wanted.shape[1])
        scored = place <= (wanted == task.end).int().argmax(1, keepdim=True)
    return Batch(torch.tensor(inputs), wanted, scored)
