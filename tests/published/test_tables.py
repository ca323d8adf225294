"""The headline, the index and the Mixtral table, from runs of straw."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from moebench_suites.published.headline import MOST_LINES, headline_block, layer_block
from moebench_suites.published.index import index_block
from moebench_suites.published.mixtral import mixtral_block, public_figures, use_of
from moebench_suites.published.pages import NOTHING
from published.straw_runs import CPU, H100, H200, MIXTRAL, QWEN, described, publish, read, timed, untimed

from moebench.catalogue.hardware import hardware_table

TOP = Path()


def cells(text, start):
    """Cells of the lines of a table that begin so."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def arms(ours=1.0, grouped=2.0, peer=1.5, block_id="b", **at):
    at = {"block_id": block_id, **at}
    return [
        timed("triton", ours, **{"s_mbu": 0.777, "s_mfu": 0.591, **at}),
        timed("torch-grouped", grouped, **at),
        timed("liger", peer, **at),
        timed("copy", 0.1, **{**at, "role": "yardstick"}),
    ]


# The headline


def test_ours_stands_against_the_fastest_other_arm_and_torch_grouped():
    runs = [read("h200-decode", arms(tokens=16)), read("h200-prefill", arms(tokens=4096, block_id="c"))]
    text = headline_block(runs, TOP)
    assert cells(text, "qwen3-30b-a3b") == [
        ["qwen3-30b-a3b", "16", "1.00 ms", "liger 1.50 ms", "1.50× (1.50–1.50)", "2.00× (2.00–2.00)", "S-MBU 77.7 %"],
        ["qwen3-30b-a3b", "4,096", "1.00 ms", "liger 1.50 ms", "1.50× (1.50–1.50)", "2.00× (2.00–2.00)",
         "S-MFU 59.1 %"],
    ]  # fmt: skip
    assert "NVIDIA H200, bf16, 2026-11-27, torch 2.11.0, triton 3.6.0, commit 1a2b3c4d5e: " in text
    assert "`moebench run suite h200-decode`, `moebench run suite h200-prefill`." in text
    assert "(reports/README.md)" in text
    assert "†" not in text


def test_a_tie_is_called_one():
    rows = arms(peer=1.0)
    rows[2] = rows[2].model_copy(update={"samples_ms": [0.99, 1.02, 0.98, 1.03, 1.0, 1.01, 0.99]})
    assert cells(headline_block([read("h200-decode", rows)], TOP), "qwen3-30b-a3b")[0][4].startswith("tie, ")


def test_slower_is_said_too():
    assert cells(headline_block([read("h200-decode", arms(peer=0.5))], TOP), "qwen3-30b-a3b")[0][4].startswith("0.500×")


def test_our_failed_row_stays_and_so_does_the_best_other():
    rows = [untimed("triton", "out_of_memory", block_id="b"), *arms()[1:]]
    (line,) = cells(headline_block([read("h200-decode", rows)], TOP), "qwen3-30b-a3b")
    assert line[2:] == ["out of memory", "liger 1.50 ms", "—", "—", "—"]


def test_flags_are_marked_and_named():
    rows = arms()
    rows[0] = rows[0].model_copy(update={"flags": ["throttled:sw_power_cap", "not_settled"]})
    text = headline_block([read("h200-decode", rows)], TOP)
    assert cells(text, "qwen3-30b-a3b")[0][2] == "1.00 ms †"
    assert "† flagged: not\\_settled, throttled:sw\\_power\\_cap." in text


def test_arms_of_another_block_precision_scope_or_capacity_are_none():
    others = [timed("liger", 0.1, **at) for at in (
        {"block_id": "other"}, {"block_id": "b", "precision": "fp8:row"}, {"block_id": "b", "scope": "experts"},
        {"block_id": "b", "capacity_factor": 1.0}, {"block_id": "b", "direction": "forward_backward"},
        {"block_id": "b", "replicate": 1},
    )]  # fmt: skip
    (line,) = cells(headline_block([read("h200-decode", arms() + others)], TOP), "qwen3-30b-a3b")
    assert line[3] == "liger 1.50 ms"


def test_gpus_are_never_mixed_and_the_one_with_both_suites_leads():
    rows = arms(tokens=16)
    older = {"started": "2026-11-01T00:00:00+00:00"}
    runs = [
        read("h200-decode", arms(tokens=16, ours=3.0), H100),
        read("h200-decode", rows, H200, **older), read("h200-prefill", arms(tokens=4096), H200, **older),
    ]  # fmt: skip
    text = headline_block(runs, TOP)
    assert "3.00 ms" not in text
    assert text.endswith("also of NVIDIA H100 80GB HBM3.")
    h100, h200 = layer_block(runs).split("### NVIDIA H200")
    assert h100.startswith("### NVIDIA H100 80GB HBM3\n")
    assert ("3.00 ms" in h100, "3.00 ms" in h200) == (True, False)


def test_the_readme_shows_a_dozen_rows_and_the_reports_all():
    tokens = (8, 16, 4096, 16384)
    models = [f"model-{each}" for each in range(6)]
    rows = [row for model in models for each in tokens
            for row in arms(model=model, tokens=each, block_id=f"{model}{each}")]  # fmt: skip
    runs = [read("h200-decode", rows)]
    text = headline_block(runs, TOP)
    assert sum(line.startswith("| model") for line in text.splitlines()) == MOST_LINES
    assert len(text.splitlines()) <= MOST_LINES + 4
    assert [line[1] for line in cells(text, "model-3")] == ["16", "4,096"]
    assert sum(line.startswith("| model") for line in layer_block(runs).splitlines()) == 24
    one = [row for row in rows if row.model == "model-3"]
    assert [line[1] for line in cells(headline_block([read("h200-decode", one)], TOP), "model-3")] == [
        f"{each:,}" for each in tokens
    ]


def test_on_a_cpu_the_two_fastest_stand_there():
    fp32 = {"precision": "fp32", "block_id": "b"}
    again = timed("liger", 1.0, **fp32, replicate=1)  # another process: no second arm
    rows = [untimed("triton", "verified", **fp32), *arms(**fp32)[1:], again]
    text = headline_block([read("quick", rows, CPU)], TOP)
    assert cells(text, "qwen3-30b-a3b") == [
        ["qwen3-30b-a3b", "16", "liger 1.50 ms", "torch-grouped 2.00 ms", "1.33× (1.33–1.33)"]
    ]
    assert "our Triton kernels are verified and not timed" in text
    assert layer_block([read("quick", rows, CPU)]) == "No whole layer on a GPU is published yet."


def test_a_gpu_leads_before_a_cpu_and_other_suites_make_no_headline():
    cpu = read("quick", arms(precision="fp32"), CPU, started="2026-11-28T00:00:00+00:00")
    assert "H200" in headline_block([cpu, read("h200-decode", arms())], TOP)
    assert headline_block([read("h200-gemm", arms())], TOP) == headline_block([], TOP) == NOTHING


def test_a_run_in_which_nothing_was_timed():
    text = headline_block([read("h200-decode", [untimed("triton"), untimed("liger")])], TOP)
    assert text.endswith("No whole layer was timed there.")


def test_shapes_without_a_model_and_several_traffics_are_told_apart():
    plain = {**QWEN, "model": "custom"}
    rows = [*arms(**plain, block_id="u"), *arms(**plain, block_id="z", traffic="zipf:1.2")]
    text = headline_block([read("h200-decode", rows)], TOP)
    assert len(cells(text, "E 128 K 8 D 2048 F 768 uniform")) == 1
    assert len(cells(text, "E 128 K 8 D 2048 F 768 zipf:1.2")) == 1


# The index


def test_the_index_counts_rows_and_flags(tmp_path):
    flagged = timed("liger", 1.0, flags=["contended"])
    rows = [*arms()[:2], flagged, untimed("fbgemm", "unavailable"), untimed("torch-bmm", "timeout")]
    publish(tmp_path / "reports", "h200-decode", rows)
    from moebench_suites.published.runs import read_published

    text = index_block(read_published(tmp_path / "reports"), tmp_path / "reports")
    assert text.splitlines()[2] == (
        "| 2026-11-27 | NVIDIA H200 | [h200-decode](2026-11-27-h200-h200-decode-0/) | 3 | 0 | 1 | 1 | 1 (33.3 %) "
        "| 1a2b3c4d5e | 2.11.0 | 3.6.0 |"
    )


def test_the_index_of_failed_rows_of_older_and_of_unfinished_runs():
    run = read("h200-decode", [untimed("triton")], finished="interrupted", git_dirty=True, versions={})
    line = index_block([replace(run, counts=False)], Path("reports")).splitlines()[2]
    assert " (older, interrupted) | 0 | 0 | 1 | 0 | — | 1a2b3c4d5e + changes | — | — |" in line
    assert index_block([], TOP) == NOTHING


HOSTILE = '<img src=x onerror="a()"> | `b` [c](d)\n<!-- end of published -->'


def test_text_of_a_manifest_is_never_markup():
    found = read("h200-decode", arms(), git_commit=HOSTILE, versions={"torch": HOSTILE, "triton": HOSTILE})
    hostile = described(HOSTILE, "GPU " + HOSTILE)
    odd = replace(found, run=replace(found.run, manifest=hostile))
    text = "\n".join([index_block([found, odd], TOP), headline_block([found], TOP), mixtral_block([found, odd])])
    assert "<img" not in text.replace("\\<", "")
    assert "<!-- end of published -->" not in text.splitlines()
    lines = [line for line in text.splitlines() if line.startswith("| 2026")]
    assert len(lines) == 2
    assert all(line.replace("\\|", "").count("|") == 12 for line in lines)


# Mixtral


def test_public_utilisation_is_what_the_facts_say():
    """77.7/0.38, 88.7/1.72, 3.0/59.1 % with 4.8 TB/s and 989.5 TFLOP/s, half of the sparse peak of 1,979.

    The catalogue rounds that peak to 989 as the data sheet does: then the last is 59.15, which two digits would show as
    59.2. So the table shows two decimals.
    """
    row = hardware_table()["H200-SXM-141GB"]
    uses = [use_of(each.latency_ms, each.tokens, replace(row, bf16_dense_tflops=989.5)) for each in public_figures()]
    assert [f"{100 * use.s_mbu:.1f}" for use in uses] == ["77.7", "88.7", "3.0"]
    assert [f"{100 * use.s_mfu:.3g}" for use in uses] == ["0.377", "1.72", "59.1"]
    assert f"{100 * uses[0].s_mfu:.2f}" == "0.38"
    assert f"{100 * use_of(19.735, 16384, row).s_mfu:.2f}" == "59.15"


PUBLIC = ["vLLM 0.14, public", "0.1889", "0.6619", "19.73", "77.7", "88.7", "3.0", "0.38", "1.72", "59.15"]


def test_without_a_run_the_public_rows_stand_alone():
    text = mixtral_block([])
    assert cells(text, "vLLM 0.14, public") == [PUBLIC]
    assert cells(text, "ours (`triton`)")[0][1:4] == ["not measured"] * 3


def mixtral_rows(**over):
    at = [{"tokens": tokens, "block_id": f"b{tokens}", **MIXTRAL, "scope": "experts", "traffic": "balanced", **over}
          for tokens in (1, 16, 16384)]  # fmt: skip
    ours = [timed("triton", 0.2, s_mbu=0.734, s_mfu=0.0036, **each) for each in at[:2]]
    return [
        *(timed("torch-grouped", 0.3, s_mbu=0.5, **each) for each in at),
        *ours,
        untimed("triton", "failed", **at[2]),
    ]


def test_ours_and_every_other_arm_stand_beside_them():
    rows = mixtral_rows()
    rows[3] = rows[3].model_copy(update={"flags": ["contended"]})
    text = mixtral_block([read("h200-mixtral", rows)])
    order = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert order[2:] == ["vLLM 0.14, public", "ours (`triton`)", "torch-grouped"]
    assert cells(text, "vLLM 0.14, public") == [PUBLIC]
    assert cells(text, "ours (`triton`)") == [
        ["ours (`triton`)", "0.2000 †", "0.2000", "failed", "73.4", "73.4", "", "0.36", "0.36", ""]
    ]
    assert cells(text, "torch-grouped")[0][-1] == "—"


def test_other_layers_traffics_and_scopes_stay_out():
    rows = [*mixtral_rows(traffic="uniform"), *mixtral_rows(scope="layer"), *mixtral_rows(model="dbrx")]
    assert "not measured" in mixtral_block([read("h200-mixtral", rows)])


def test_another_gpu_has_a_table_without_the_h200_figures():
    h200, h100 = mixtral_block([read("h200-mixtral", mixtral_rows(), H100)]).split("**NVIDIA H100")
    assert "not measured" in h200
    assert "vLLM 0.14, public" not in h100
    assert cells(h100, "ours (`triton`)")[0][1] == "0.2000"


@pytest.mark.parametrize("make", [mixtral_block, layer_block])
def test_the_same_runs_make_the_same_text(make):
    runs = [read("h200-mixtral", mixtral_rows()), read("h200-decode", arms())]
    assert make(runs) == make(runs)
