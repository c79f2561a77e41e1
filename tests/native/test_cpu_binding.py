"""The struct that the CPU module takes: its layout is the compiler's, and what does not fit is an error."""

from __future__ import annotations

import ctypes
import re

import pytest

from posattn import _cpu
from posattn.backends.common.structs import Header

PLAIN = """
enum class Kind : int32_t { first = 0, second = 3 };
struct Inner {
  const float* data = nullptr;  // [H]
  bool flag = false;
  Kind kind = Kind::first;
  bool any() const { return data; }
};
struct Outer {
  bool early;
  Inner inner;
  double late;
};
"""


@pytest.fixture
def structs():
    return Header("problem.h", _cpu.PROBLEM_H).structs


def test_a_blank_problem_reads_as_the_header_initialises_it(structs):
    """Members all over the struct, beyond every nested one: an offset that differs would show another value."""
    problem = structs["Problem"].from_buffer_copy(_cpu.BLANK)
    assert ctypes.sizeof(problem) == len(_cpu.BLANK)
    assert (problem.scale, problem.softcap, problem.left, problem.right) == (1.0, 0.0, -1, -1)
    assert (problem.boolean_key, problem.threads, problem.delta) == (1, 1, 0)
    for bias in (problem.bias, problem.head_mix.inner):
        assert (bias.slope, bias.dense_key, bias.grad_dense_row, bias.grad_dense_key) == (0, 1, 0, 1)


def test_members_lie_where_the_compiler_puts_them():
    header = Header("plain.h", PLAIN)
    inner, outer = header.structs["Inner"], header.structs["Outer"]
    assert (inner.data.offset, inner.flag.offset, inner.kind.offset, header.size("Inner")) == (0, 8, 12, 16)
    assert (outer.early.offset, outer.inner.offset, outer.late.offset, header.size("Outer")) == (0, 8, 24, 32)
    assert list(header.names("Inner")) == ["data", "flag", "kind"]
    packed = header.pack("Outer", {"inner": {"kind": 3}, "late": 0.5})
    assert outer.from_buffer_copy(packed).inner.kind == 3
    assert outer.from_buffer_copy(packed).late == 0.5


def test_a_misspelt_member_is_an_error(structs):
    problem = structs["Problem"]()
    with pytest.raises(AttributeError):
        problem.head_dims = 3
    with pytest.raises(AttributeError):
        problem.bias.slopes = 3


@pytest.mark.parametrize("run", [_cpu.forward, _cpu.backward])
def test_a_problem_of_another_size_is_refused(run):
    size = len(_cpu.BLANK)
    for packed in (b"", _cpu.BLANK[:-8], _cpu.BLANK + bytes(8)):
        with pytest.raises(ValueError, match=f"problem: expected {size} bytes, got {len(packed)}"):
            run(packed)
    with pytest.raises(TypeError):
        run(size)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("  Unknown value;", "struct Outer has a member of unknown type Unknown"),
        ("  int64_t one, two;", "expected one member a line in struct Outer, got 'int64_t one, two;'"),
        ("  float many[3];", "expected one member a line in struct Outer, got 'float many[3];'"),
    ],
)
def test_a_header_that_cannot_be_read_is_an_error(line, message):
    with pytest.raises(ValueError, match=re.escape(f"plain.h: {message}")):
        Header("plain.h", PLAIN.replace("  bool early;", line))
