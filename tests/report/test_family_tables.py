"""The tables of a page: right cells, ours against the best other arm, flags, replicates, what is left out."""

import re

from analyse.tables import record, table

from moebench.report import family_tables
from moebench.report.family_tables import MOST_ARMS, MOST_LINES, MOST_STAGE_LINES, MOST_TABLES

ROUNDS = 8


def cells(lines):
    """The rows of a table as lists of cells; none may have more or fewer than its head."""
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines if line.startswith("|")
    ]
    assert {len(row) for row in rows} == {len(rows[0])}
    return [rows[0], *rows[2:]]


def tables_of(*records, ours=("triton",), marks=None):
    found, total = family_tables.family_tables(table(*records), ours, marks or {})
    return [(each.title, cells(each.lines), each.lines) for each in found], total


def arm(provider, ms, **over):
    """A measured row of constant latency, with an interval of 2 % to either side."""
    bounds = {"latency_ms_low": 0.98 * ms, "latency_ms_high": 1.02 * ms}
    return record(provider, [ms] * ROUNDS, **{**bounds, **over})


def test_tokens_are_lines_and_arms_are_columns_ours_first():
    block = {"tokens": 16, "block_id": "b1"}
    ((_, (head, line), _),), total = tables_of(
        arm("torch-grouped", 3.0, **block), arm("torch-loop", 5.0, **block), arm("triton", 2.0, **block)
    )
    assert total == 1
    assert head == ["tokens", "triton", "torch-grouped", "torch-loop", "triton against best other"]
    assert line == ["16", "**2.00** ±2.0 %", "3.00 ±2.0 %", "5.00 ±2.0 %", "1.50× (1.50–1.50)"]


def test_where_ours_loses_the_ratio_is_under_one():
    ((_, (_, line), _),), _ = tables_of(arm("triton", 4.0), arm("torch-loop", 5.0), arm("torch-grouped", 3.0))
    assert line == ["16", "4.00 ±2.0 %", "5.00 ±2.0 %", "**3.00** ±2.0 %", "0.750× (0.750–0.750)"]


def test_a_tie_and_too_few_rounds_are_said():
    swing = [1.0, 1.1] * 4
    ((_, (_, line), _),), _ = tables_of(record("triton", swing), record("torch-loop", swing[::-1]))
    assert line[-1].endswith(", tie")
    ((_, (_, line), _),), _ = tables_of(record("triton", [1.0, 1.0]), record("torch-loop", [2.0, 2.0]))
    assert line[-1] == "— (shared rounds: 2)"


def test_of_one_or_two_samples_there_is_no_interval():
    ((_, (_, line), _),), _ = tables_of(
        arm("triton", 1.0), arm("torch-loop", 2.0, samples_ms=[2.0, 2.0], sample_round=[0, 1])
    )
    assert line[1:3] == ["**1.00** ±2.0 %", "2.00"]


def test_arms_of_different_blocks_have_no_ratio():
    ((_, (_, line), _),), _ = tables_of(arm("triton", 1.0, block_id="b1"), arm("torch-loop", 2.0, block_id="b2"))
    assert line[-1] == "—"


def test_without_ours_the_fastest_stands_against_the_second():
    verified = record("triton", status="verified", checked_on="T4")
    ((_, (head, line), _),), _ = tables_of(verified, arm("torch-loop", 4.0), arm("torch-bmm", 2.0))
    assert head[-1] == "fastest against second"
    assert line == ["16", "verified", "4.00 ±2.0 %", "**2.00** ±2.0 %", "2.00× (2.00–2.00)"]


def test_the_runs_own_provider_is_ours():
    ((_, (head, line), _),), _ = tables_of(arm("k.py:f", 1.0), arm("triton", 2.0), ours=("k.py:f",))
    assert (head[1], head[-1], line[-1]) == ("k.py:f", "k.py:f against best other", "2.00× (2.00–2.00)")


def test_scopes_precisions_and_capacities_never_share_a_table():
    both = [arm("triton", 2.0, precision=precision) for precision in ("bf16", "fp8:row")]
    capped = arm("triton", 1.0, precision="bf16", capacity_factor=1.25)
    found, total = tables_of(*both, capped, arm("triton", 3.0, precision="bf16", scope="experts"))
    assert total == 4
    assert [title for title, *_ in found] == [
        "olmoe-1b-7b · layer · bf16",
        "olmoe-1b-7b · layer · fp8:row",
        "olmoe-1b-7b · layer · bf16 · capacity 1.25 (ceil, position)",
        "olmoe-1b-7b · experts · bf16",
    ]


def test_stages_of_a_layer_are_lines_of_one_table():
    stages = [arm("triton", 1.0, scope=stage, tokens=T) for T in (8, 64) for stage in ("plan", "gate", "combine")]
    ((title, (head, *lines), _),), _ = tables_of(*stages)
    assert (title, head[:2]) == ("olmoe-1b-7b", ["tokens", "scope"])
    assert [line[:2] for line in lines] == [[T, stage] for T in ("8", "64") for stage in ("gate", "plan", "combine")]


def test_what_was_not_timed_says_so_in_its_cell():
    lost = record("torch-bmm", status="out_of_memory", reason="no room")
    ((_, (_, line), _),), _ = tables_of(arm("triton", 1.0), lost)
    assert line == ["16", "**1.00** ±2.0 %", "out of memory"]


def test_of_replicates_the_middle_one_with_all_their_flags_and_losses():
    rows = [
        arm("triton", ms, replicate=n, flags=flags)
        for n, (ms, flags) in enumerate([(1.0, []), (3.0, ["throttled"]), (2.0, ["outliers:5"])])
    ]
    lost = record("triton", status="crashed", reason="signal 11", replicate=3)
    ((_, (_, line), _),), _ = tables_of(*rows, lost, marks={"throttled": "ᵃ", "outliers": "ᵇ"})
    assert line == ["16", "**2.00** ±2.0 % (1 of 4 crashed) ᵃᵇ"]


def test_of_the_ratios_of_replicates_the_middle_one_each_in_its_own_process():
    rows = [arm("triton", 1.0, replicate=n) for n in range(3)]
    rows += [arm("torch-loop", ms, replicate=n) for n, ms in enumerate([4.0, 2.0, 3.0])]
    ((_, (_, line), _),), _ = tables_of(*rows)
    assert line == ["16", "**1.00** ±2.0 %", "3.00 ±2.0 %", "3.00× (3.00–3.00)"]


def test_utilisation_and_share_of_the_ceiling_are_the_fastest_arms():
    use = {"s_mbu": 0.777, "s_mfu": 0.0123, "limit_fraction": 0.9}
    ((_, (head, line), _),), _ = tables_of(arm("triton", 1.0, **use), arm("torch-loop", 2.0, s_mbu=0.1))
    assert head[3:6] == ["S-MBU %", "S-MFU %", "of ceiling %"]
    assert line[3:6] == ["77.7", "1.23", "90.0"]
    ((_, (head, line), _),), _ = tables_of(arm("triton", 1.0, tflops=123.4))
    assert (head[-1], line[-1]) == ("TFLOP/s", "123")


def test_long_tables_are_cut_and_say_so():
    many = [arm("triton", 1.0, tokens=T, block_id=f"b{T}") for T in range(1, 31)]
    ((_, (_, *lines), written),), _ = tables_of(*many)
    assert len(lines) == MOST_LINES
    assert (lines[0][0], lines[-1][0]) == ("1", "30")
    assert written[-1] == "Not shown here: 20 lines of other token counts."
    stages = [arm("triton", 1.0, scope=stage, tokens=T) for T in range(1, 31) for stage in ("gate", "plan")]
    ((_, (_, *lines), _),), _ = tables_of(*stages)
    assert len(lines) == MOST_STAGE_LINES


def test_of_many_arms_the_slowest_are_named_and_left_out():
    many = [arm(f"a{n}", 10.0 - n) for n in range(9)]
    ((_, (head, _), written),), _ = tables_of(*many)
    assert head[1 : 1 + MOST_ARMS] == [f"a{n}" for n in range(3, 9)]
    assert written[-1] == "Not shown here: arms: a0, a1, a2."


def test_of_many_families_the_whole_layers_come_first():
    scopes = ["plan"] * 20 + ["layer"] * 20
    found, total = tables_of(*(arm("triton", 1.0, scope=scope, model=f"m{n}") for n, scope in enumerate(scopes)))
    assert (len(found), total) == (MOST_TABLES, 40)
    assert all("layer" in title for title, *_ in found)


def test_names_with_pipes_and_markup_keep_the_columns():
    ((_, (head, line), _),), _ = tables_of(arm("triton", 1.0), arm("a|b\n<c>", 2.0))
    assert head[2] == r"a\|b \<c\>"
    assert len(line) == len(head) == 4
