"""`where`: means what Python would mean, and lets nothing else in."""

import math
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.where import parse_where

ROW = {
    "model": "custom",
    "experts": 8,
    "top_k": 2,
    "tokens": 16,
    "granularity": 1,
    "capacity_factor": math.inf,
    "provider": "torch-bmm",
    "traffic": "zipf:1",
    "phase": "",
    "scope": "layer",
    "direction": "forward",
}

numbers = st.recursive(
    st.sampled_from(["experts", "top_k", "tokens", "granularity", "capacity_factor", "0", "1", "2", "0.5", "7"]),
    lambda inner: (
        st.builds("({} {} {})".format, inner, st.sampled_from(["+", "-", "*", "/", "//", "%"]), inner)
        | st.builds("-{}".format, inner)
    ),
    max_leaves=4,
)
order = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
comparisons = (
    st.builds("{} {} {}".format, numbers, order, numbers)
    | st.builds("{} {} {} {} {}".format, numbers, order, numbers, order, numbers)
    | st.builds("{} {} ({}, {})".format, numbers, st.sampled_from(["in", "not in"]), numbers, numbers)
    | st.builds("provider {} '{}'".format, st.sampled_from(["==", "!="]), st.sampled_from(["torch-bmm", "triton"]))
    | st.builds("scope {} ['layer', '{}']".format, st.sampled_from(["in", "not in"]), st.sampled_from(["gate", "plan"]))
)
conditions = st.recursive(
    comparisons,
    lambda inner: (
        st.builds("({} {} {})".format, inner, st.sampled_from(["and", "or"]), inner)
        | st.builds("{} {} {}".format, inner, st.just("and"), inner)
        | st.builds("not ({})".format, inner)
    ),
    max_leaves=5,
)


def refusal(text):
    """Why `where` refuses the text, or None where it reads it."""
    try:
        parse_where(text)
    except ValueError as error:
        return str(error)
    return None


def outcome(condition):
    try:
        return bool(condition())
    except (ZeroDivisionError, OverflowError) as error:
        return type(error)


@settings(max_examples=500, deadline=None)
@given(conditions, st.integers(1, 9), st.integers(1, 4), st.sampled_from([1.0, 1.25, math.inf]))
def test_means_what_python_means(text, experts, top_k, capacity):
    row = ROW | {"experts": experts, "top_k": top_k, "capacity_factor": capacity}
    refused = refusal(text)
    if refused:
        assert "nested" in refused
        return
    clauses = parse_where(text)
    expected = outcome(lambda: eval(text, {"__builtins__": {}}, row))  # the reference; the tests wrote the text
    assert outcome(lambda: all(clause.holds(row) for clause in clauses)) == expected
    if expected is True:
        names = frozenset().union(*(clause.names for clause in clauses))
        assert all(clause.holds({name: row[name] for name in names}) for clause in clauses)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("capacity_factor == 'dropless'", True),
        ("capacity_factor in ['dropless', 2]", True),
        ("capacity_factor < 2", False),
        ("traffic == 'zipf:1.0'", True),  # read as a value of the axis, so any spelling serves
        ("traffic in ('zipf:1.00', 'balanced')", True),
        ("'zipf:1.0' == traffic", True),
        ("model == 'custom'", True),
        ("model != 'mixtral-8x7b'", True),
        ("1 < top_k <= experts\n and tokens > 8", True),
        ("phase == direction", False),
    ],
)
def test_values_are_those_of_the_axis(text, holds):
    assert all(clause.holds(ROW) for clause in parse_where(text)) is holds


def test_a_guard_is_never_passed_over():
    guard, guarded = parse_where("capacity_factor * granularity != 0 and 1 / granularity > 0")
    assert guard.names <= guarded.names


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("topk <= experts", "unknown name 'topk'; did you mean top_k"),
        ("provider == 'torch-bm'", "did you mean 'torch-bmm'"),
        ("scope == 'expert'", "did you mean experts"),
        ("traffic == 'zipff:1'", "did you mean 'zipf'"),
        ("tokens == '16'", "tokens is never '16'"),
        ("capacity_factor == 'none'", "dropless"),
        ("tokens", "is a number, where a condition"),
        ("tokens and experts", "is a number, where a condition"),
        ("provider", "is text, where a condition"),
        ("provider < 'z'", "never 'z'"),
        ("provider < scope", "has no such comparison"),
        ("provider == tokens", "cannot be compared"),
        ("provider + 1 > 2", "is text, where a number"),
        ("tokens in 5", "is no list"),
        ("tokens in experts", "is no list"),
        ("(tokens > 1) == (experts > 1)", "no such comparison"),
        ("(tokens > 1) in [(experts > 1)]", "is in no list"),
        ("tokens > 1e999", "too large"),
        ("tokens == True", "not allowed"),
        ("tokens is 3", "not allowed"),
        ("", "no condition"),
        ("tokens >", "no condition"),
        ("tokens = 3", "no condition"),
        ("tokens > 1; experts", "no condition"),
        ("tokens \x00 > 1", "no condition"),
    ],
)
def test_faults_are_named(text, says):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        parse_where(text)
    assert "\n" not in str(error.value)


HOSTILE = [
    "__import__('os').system('true')",
    "__import__",
    "tokens.__class__",
    "().__class__.__bases__[0].__subclasses__()",
    "(lambda: 1)()",
    "lambda: 1",
    "[x for x in (1, 2)]",
    "{tokens: 1}",
    "{tokens}",
    "f'{tokens}'",
    "tokens if experts else top_k",
    "(tokens := 3) > 2",
    "9**9**9 > tokens",
    "1 << 99999999 > 2",
    "~tokens > 1",
    "tokens @ 2 > 1",
    "print(tokens)",
    "tokens[0] > 1",
    "*tokens",
    "await tokens",
    "b'a' == b'a'",
    "... == 1",
    "1j == 1",
    "None == None",
    "(" * 10_000 + "tokens" + ")" * 10_000,
    "(" * 450 + "tokens" + ")" * 450,
    "-" * 900 + "1 > 0",
    "not " * 240 + "tokens > 1",
    "+".join(["1"] * 480),
    "tokens > " + "9" * 100_000,
    "tokens > 1 and " * 100_000 + "tokens > 1",
    "(tokens in [1,1]) in [1,1,1]" + " in [1,1]" * 90,
    "tokens < " * 110 + "tokens",
    "'" + "x" * 900 + "' == provider",
    "'\\d' == provider",
    "(" * 15 + "tokens in [1]" + ") in [1, 1, 1, 1])" * 15,
]


@pytest.mark.parametrize("text", HOSTILE, ids=[text[:24] for text in HOSTILE])
def test_hostile_text_is_refused_quickly(text):
    start = time.process_time()
    refused = refusal(text)
    if text.startswith("tokens < tokens"):
        assert refused is None, "the long chain is long, and a condition"
    else:
        assert refused
        assert len(refused) < 400
        assert "\n" not in refused
    assert time.process_time() - start < 0.5


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text):
    assert "\n" not in (refusal(text) or "")
