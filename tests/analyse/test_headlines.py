"""Headlines: who wins, when it is a tie, and what is never a winner."""

import numpy as np
import pytest
from analyse.tables import record, table

from moebench.analyse import headlines
from moebench.analyse.headlines import moe_layers

RNG = np.random.default_rng(3)


def around(ms: float, spread: float = 0.01, count: int = 14) -> list[float]:
    return list(ms * np.exp(RNG.normal(0, spread, count)))


def the_only(*records):
    (headline,) = headlines(table(*records))
    return headline


def test_a_clear_winner_with_its_ratio_interval_and_model_time():
    headline = the_only(record("slow", [30.0] * 10), record("fast", [10.0] * 10), record("middle", [15.0] * 10))
    assert (headline.kind, headline.winners) == ("winner", ("fast",))
    assert "fast wins, 1.50× (1.50–1.50) faster than middle" in headline.sentence
    assert "10.0 ms a layer, 160 ms over the model's 16 MoE layers" in headline.sentence
    assert headline.row == 1


def test_a_tie_when_the_interval_includes_one():
    headline = the_only(record("a", around(10, 0.05)), record("b", around(10, 0.05)), record("c", around(30)))
    assert headline.kind == "tie"
    assert set(headline.winners) == {"a", "b"}


def test_a_bound_just_off_one_does_not_read_as_one():
    headline = the_only(record("a", [10.0] * 10), record("b", [10.02] * 10))
    assert headline.kind == "winner"
    assert "(1.002–1.002)" in headline.sentence


def test_a_yardstick_never_wins_and_prices_sparsity():
    headline = the_only(
        record("a", [10.0] * 10), record("b", [20.0] * 10), record("dense-ffn", [4.0] * 10, role="yardstick"),
        record("copy", [1.0] * 10, role="yardstick"),
    )  # fmt: skip
    assert headline.winners == ("a",)
    assert headline.remarks == (
        "Price of sparsity: 2.50× (2.50–2.50) the time of one dense FFN of the same active FLOPs.",
    )


def test_the_rows_of_other_blocks_do_not_mix():
    many = [
        record(name, [ms * (1 + block)] * 10, block_id=f"b{block}", tokens=1 + block, role=role)
        for block in range(5)
        for name, ms, role in (("a", 10.0, "arm"), ("b", 20.0, "arm"), ("dense-ffn", 5.0, "yardstick"))
    ]
    for headline in headlines(table(*many)):
        assert headline.winners == ("a",)
        assert "2.00× (2.00–2.00)" in headline.sentence
        assert "Price of sparsity: 2.00×" in headline.remarks[0]


def test_doing_less_is_no_win_but_is_named_with_its_price():
    headline = the_only(
        record("a", [10.0] * 10),
        record("b", [12.0] * 10),
        record("a", [5.0] * 10, capacity_factor=1.0, fidelity_error=0.31, drop_rate=0.125),
    )
    assert headline.winners == ("a",)
    assert "a cap 1 is 2.00× (2.00–2.00) faster" in headline.remarks[0]
    assert "fidelity error of 0.310, 12.5 % of assignments dropped" in headline.remarks[0]


def test_stages_do_not_race_against_layers():
    headline = the_only(record("a", [10.0] * 10), record("b", [12.0] * 10), record("b", [1.0] * 10, scope="gate"))
    assert headline.winners == ("a",)


def test_alone_and_none_say_so():
    alone = the_only(record("a", [10.0] * 10), record("b", status="crashed", reason="signal 11"))
    assert (alone.kind, alone.winners) == ("alone", ("a",))
    none = the_only(record("a", status="timeout", reason="60 s"), record("b", status="crashed", reason="signal 11"))
    assert (none.kind, none.row) == ("none", None)
    assert "1 timeout, 1 crashed" in none.sentence
    assert "60 s" in none.sentence


def test_few_rounds_are_confessed():
    headline = the_only(record("a", [1.0] * 4), record("b", [2.0] * 4))
    assert "range of only 4 rounds" in headline.sentence
    headline = the_only(record("a", [1.0] * 2), record("b", [2.0] * 2))
    assert (headline.kind, headline.winners) == ("undecided", ())
    assert "no verdict: a leads b by 2.00× on only 2 shared rounds" in headline.sentence


def test_a_problem_split_over_blocks_says_which_part():
    found = headlines(table(record("a", [1.0] * 8), record("b", [2.0] * 8, block_id="c")))
    assert [headline.problem.split(" · ")[-1] for headline in found] == ["block 1 of 2", "block 2 of 2"]


@pytest.mark.parametrize(
    ("model", "layers"), [("olmoe-1b-7b", 16), ("mixtral-8x7b", 32), ("custom", None), ("olmoe-1b-7b*", None)]
)
def test_layers_of_a_model(model, layers):
    assert moe_layers(model) == layers
