"""The fifteen tasks against their definitions, each computed another way than the generator does."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch

from posattn.experiments.chomsky_tasks import MODULUS, TASKS, Task, evaluate, expression, sample, symbol_text


def draws(name: str, lengths: range = range(1, 30), each: int = 20) -> list[tuple[int, list[int], list[int]]]:
    task, random = TASKS[name], Random(name)
    return [(n, *task.draw(random, n)) for n in lengths if n >= task.shortest for _ in range(each)]


def as_text(symbols: list[int]) -> str:
    return "".join(symbol_text(symbol) for symbol in symbols)


def unended(answer: list[int]) -> list[int]:
    """Up to the end symbol; only zeros may follow it."""
    cut = answer.index(2)
    assert not any(answer[cut + 1 :])
    return answer[:cut]


@pytest.mark.parametrize("name", TASKS)
def test_sizes(name: str) -> None:
    task = TASKS[name]
    for length, text, answer in draws(name):
        assert length - 1 <= len(text) <= length
        assert len(text) == length or name == "modular arithmetic (simple)"
        assert set(text) <= set(range(task.symbols))
        assert len(answer) == task.answer_length(length)
        assert set(answer) <= set(range(task.answers))


@pytest.mark.parametrize("name", TASKS)
def test_every_class_occurs(name: str) -> None:
    assert {symbol for _, _, answer in draws(name) for symbol in answer} == set(range(TASKS[name].answers))


@pytest.mark.parametrize("name", TASKS)
def test_long_strings_are_drawn(name: str) -> None:
    batch = sample(TASKS[name], 2, 500, torch.Generator().manual_seed(0))
    assert batch.inputs.shape[0] == 2
    assert batch.scored.any(1).all()


def test_even_pairs() -> None:
    for _, text, answer in draws("even pairs"):
        string = "".join(map(str, text))
        count = sum(string[i : i + 2] in ("01", "10") for i in range(len(string)))
        assert answer == [count % 2]
        assert answer == [int(string[0] != string[-1])]


def test_parity_check() -> None:
    assert all(answer == [text.count(1) % 2] for _, text, answer in draws("parity check"))


def test_cycle_navigation() -> None:
    for _, text, answer in draws("cycle navigation"):
        place = 0
        for step in text:
            place = (place + {0: 4, 1: 0, 2: 1}[step]) % 5
        assert answer == [place]


@pytest.mark.parametrize("name", ["modular arithmetic", "modular arithmetic (simple)"])
def test_arithmetic_is_pythons(name: str) -> None:
    for _, text, answer in draws(name):
        assert answer == [eval(as_text(text)) % MODULUS], as_text(text)


def test_simple_arithmetic_has_no_brackets_and_all_operators() -> None:
    seen = set("".join(as_text(text) for _, text, _ in draws("modular arithmetic (simple)")))
    assert seen == set("01234+-*")


@pytest.mark.parametrize(
    "text", ["-3", "(-3)", "((2-(-4))+1)", "2*3-4*4", "-(1-2)*3", "((((3))))", "(2--3)", "2+-3*-4", "1-1-1"]
)
def test_evaluate(text: str) -> None:
    assert evaluate(list(text)) == eval(text) % MODULUS


def test_expressions_have_the_length_asked_for() -> None:
    random = Random(1)
    for length in range(1, 80):
        text = as_text(expression(random, length))
        assert len(text) == length
        assert set(text) <= set("01234+-()")
        eval(text)


def test_deep_brackets_are_no_recursion() -> None:
    depth = 5000
    assert evaluate(["("] * depth + ["3"] + [")"] * depth) == 3


def test_solve_equation_has_one_answer() -> None:
    for _, text, answer in draws("solve equation"):
        left, right = as_text(text).split("=")
        solutions = [x for x in range(MODULUS) if eval(left.replace("x", str(x))) % MODULUS == int(right)]
        assert solutions == answer


def test_stack_manipulation() -> None:
    for _, text, answer in draws("stack manipulation"):
        stack: list[int] = []
        for symbol in text:
            if symbol == 2:
                del stack[-1:]
            else:
                stack.append(symbol % 3 if symbol > 2 else symbol)
        assert unended(answer) == stack[::-1]


def test_strings() -> None:
    assert all(answer == list(reversed(text)) for _, text, answer in draws("reverse string"))
    assert all(answer == 2 * text for _, text, answer in draws("duplicate string"))
    assert all(answer == sorted(text) for _, text, answer in draws("bucket sort"))
    for _, text, answer in draws("odds first"):
        odd, even = ([symbol for i, symbol in enumerate(text) if i % 2 == parity] for parity in (1, 0))
        assert answer == odd + even


def test_missing_duplicate() -> None:
    for length, text, answer in draws("missing duplicate"):
        assert (text[-1] == 3) == (length % 2 == 1)
        half = length // 2
        whole = text[: 2 * half]
        (place,) = [i for i, symbol in enumerate(whole) if symbol == 2]
        whole[place] = answer[0]
        assert whole[:half] == whole[half:]
        assert set(whole) <= {0, 1}


@pytest.mark.parametrize("name", ["binary addition", "binary multiplication"])
def test_binary_arithmetic(name: str) -> None:
    for _, text, answer in draws(name):
        first, second = "".join(map(str, text)).split("2")
        a, b = int(first[::-1], 2), int(second[::-1], 2)
        wanted = a + b if name == "binary addition" else a * b
        assert int("".join(map(str, unended(answer)))[::-1], 2) == wanted


def test_compute_sqrt() -> None:
    for _, text, answer in draws("compute sqrt"):
        number, root = (int("".join(map(str, digits)), 2) for digits in (text, answer))
        assert root == math.isqrt(number)


def permuted_answers(task: Task, name: str) -> bool:
    """Whether an answer ever changes when the input is put in order."""
    by_input: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    random = Random(2)
    for _ in range(4000):
        text, answer = task.draw(random, 8)
        by_input.setdefault(tuple(sorted(text)), set()).add(tuple(answer))
    return any(len(answers) > 1 for answers in by_input.values())


@pytest.mark.parametrize("name", TASKS)
def test_which_tasks_do_not_depend_on_the_order(name: str) -> None:
    assert permuted_answers(TASKS[name], name) != TASKS[name].permutable


def test_what_follows_an_end_is_not_scored() -> None:
    batch = sample(TASKS["binary addition"], 50, 12, torch.Generator().manual_seed(3))
    for answer, scored in zip(batch.answers.tolist(), batch.scored.tolist()):
        assert scored == [i <= answer.index(2) for i in range(len(answer))]
    assert sample(TASKS["reverse string"], 5, 12, torch.Generator()).scored.all()


def test_equal_seeds_draw_equal_strings() -> None:
    first, second, third = (sample(TASKS["bucket sort"], 8, 20, torch.Generator().manual_seed(n)) for n in (5, 5, 6))
    assert torch.equal(first.inputs, second.inputs)
    assert not torch.equal(first.inputs, third.inputs)
