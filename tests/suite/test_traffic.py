"""The traffic grammar: what it reads, how it is spelt back, what it refuses."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebench.traffic import Traffic, parse_traffic


@pytest.mark.parametrize(
    ("text", "traffic", "canonical"),
    [
        ("balanced", Traffic("balanced"), "balanced"),
        ("uniform", Traffic("uniform"), "uniform"),
        ("router", Traffic("router"), "router"),
        ("zipf:1.20", Traffic("zipf", alpha=1.2), "zipf:1.2"),
        ("zipf:1.0", Traffic("zipf", alpha=1.0), "zipf:1"),
        ("zipf:-0.0", Traffic("zipf", alpha=0.0), "zipf:0"),
        ("active:0.451@16", Traffic("active", fraction=0.451, at_tokens=16), "active:0.451@16"),
        ("active:1@1", Traffic("active", fraction=1.0, at_tokens=1), "active:1@1"),
        ("trace:a:b.npz", Traffic("trace", path="a:b.npz"), "trace:a:b.npz"),
    ],
)
def test_reads_and_spells(text, traffic, canonical):
    assert parse_traffic(text) == traffic
    assert str(parse_traffic(text)) == canonical


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("balancd", "did you mean 'balanced'"),
        ("", "allowed: balanced, uniform, zipf:ALPHA"),
        ("zipf", "zipf:ALPHA"),
        ("zipf:", "zipf:ALPHA"),
        ("zipf:-1", "finite number >= 0"),
        ("zipf:nan", "finite number >= 0"),
        ("zipf:inf", "finite number >= 0"),
        ("zipf:1_0", "finite number >= 0"),
        ("zipf: 1", "finite number >= 0"),
        ("active:0@16", "0 < FRACTION <= 1"),
        ("active:1.5@16", "0 < FRACTION <= 1"),
        ("active:0.5", "T is a whole number"),
        ("active:0.5@0", "T is a whole number"),
        ("active:0.5@2.5", "T is a whole number"),
        ("active:0.5@1e999", "T is a whole number"),
        ("uniform:2", "takes no argument"),
        ("trace:", "needs a file"),
        ("x" * 10_000, "..."),
    ],
)
def test_refuses(text, says):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        parse_traffic(text)
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)


@given(st.floats(0, 1e300, allow_nan=False))
def test_zipf_reads_back_to_the_same_number(alpha):
    traffic = Traffic("zipf", alpha=alpha)
    assert parse_traffic(str(traffic)) == traffic


@given(st.floats(0, 1, exclude_min=True), st.integers(1, 2**40))
def test_active_reads_back_to_the_same_numbers(fraction, tokens):
    traffic = Traffic("active", fraction=fraction, at_tokens=tokens)
    assert parse_traffic(str(traffic)) == traffic


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text):
    try:
        traffic = parse_traffic(text)
    except ValueError:
        return
    assert parse_traffic(str(traffic)) == traffic
