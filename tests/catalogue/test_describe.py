"""Flat rows: what they hold, by hand for Mixtral; and that the catalogue stays light."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from moebench.catalogue.describe import describe, list_models, render
from moebench.catalogue.models import models


def flat(rows: list[dict[str, object]]) -> bool:
    return all(value is None or isinstance(value, (str, int, float)) for row in rows for value in row.values())


def test_mixtral_by_hand() -> None:
    (row,) = describe("mixtral-8x7b", tokens=1, precision="bf16")
    expert = 3 * 4096 * 14336
    assert row["expert_params"] == expert
    assert row["layer_params"] == 8 * expert + 8 * 4096
    assert row["flops_per_token"] == 2 * (2 * expert + 8 * 4096)
    assert row["moe_flops_per_token"] == 32 * row["flops_per_token"]
    assert row["touched_weight_bytes"] == 2 * (2 * expert + 8 * 4096)
    assert row["active_expert_fraction"] == 0.25
    assert row["total_params"] == pytest.approx(46.7e9, rel=1e-3)
    assert row["total_over_published"] == pytest.approx(1.0, abs=1e-3)
    assert row["model_bytes_fp32"] == 4 * row["total_params"]
    assert row["model_bytes_bf16"] == 2 * row["total_params"]
    assert row["model_bytes_fp8"] == row["total_params"]
    assert row["model_bytes_int4"] == row["total_params"] / 2
    assert row["runnable"] is True


def test_what_is_of_the_model_sums_over_its_kinds() -> None:
    stage3, stage4 = describe("swin-moe-s-64")
    expected = 9 * stage3["flops_per_token"] + stage4["flops_per_token"]
    assert stage3["moe_flops_per_token"] == stage4["moe_flops_per_token"] == expected
    assert stage3["moe_bytes_bf16"] == 2 * (9 * stage3["layer_params"] + stage4["layer_params"])


def test_more_tokens_touch_more_experts() -> None:
    one, many = describe("mixtral-8x7b", 1)[0], describe("mixtral-8x7b", 64)[0]
    assert one["expected_active_experts"] == pytest.approx(2)
    assert many["expected_active_experts"] == pytest.approx(8, abs=0.001)
    assert many["touched_weight_bytes_per_token"] < one["touched_weight_bytes_per_token"]


def test_kinds_and_files_and_the_undisclosed(tmp_path: Path) -> None:
    assert [row["layer"] for row in describe("swin-moe-s-64")] == ["stage3", "stage4"]
    assert [row["layer"] for row in describe("swin-moe-s-64:stage4")] == ["stage4"]
    (row,) = describe("gpt-4")
    assert row["runnable"] is False
    assert "rumour" in row["reason"]
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "mixtral"}')
    assert describe(str(path))[0]["layer_params"] == describe("mixtral-8x7b")[0]["layer_params"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("mixtral",), "did you mean mixtral-8x7b"),
        (("./none.json",), "no such file"),
        (("mixtral-8x7b", 0), "tokens is 0"),
        (("mixtral-8x7b", 1, "fp12"), "precision 'fp12' is not one of fp32"),
    ],
)
def test_bad_words(arguments: tuple[object, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        describe(*arguments)  # type: ignore[arg-type]


def test_list_models_shows_every_row_once_a_kind() -> None:
    rows = list_models()
    assert {row["id"].partition(":")[0] for row in rows} == set(models())
    assert len(rows) == len(models()) + 4  # two Swin-MoE, two DeepSeek-V4
    for row in rows:
        assert (row["reason"] is None) == (row["hidden_size"] is not None)
        assert row["runnable"] is False or row["reason"] is None
    by_id = {row["id"]: row for row in rows}
    assert all(row["runnable"] == (row["reason"] is None) for row in rows)
    assert by_id["deepseek-r1"]["alias_of"] == "deepseek-v3"
    assert by_id["qwen3-next-80b-a3b"]["total_params_from"] == "published"


def test_rows_are_flat_and_json() -> None:
    every = [describe(row["id"]) for row in list_models()]
    assert flat(list_models())
    assert all(flat(rows) for rows in every)
    json.dumps([list_models(), every], allow_nan=False)
    assert len({tuple(row) for row in list_models()}) == 1


def test_text_is_never_markup(tmp_path: Path) -> None:
    from rich.console import Console

    folder = tmp_path / "[red]evil[bold]"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "mixtral"}')
    console = Console(width=400, record=True, force_terminal=True, color_system="truecolor", file=io.StringIO())
    console.print(render(describe(str(folder / "config.json"))))
    shown = console.export_text(styles=True)
    assert "[red]evil[bold]" in shown
    assert "\x1b[31m" not in shown


def test_the_catalogue_is_light_and_torch_free() -> None:
    code = (
        "import sys, moebench.catalogue.describe as d, moebench.catalogue.cost; d.list_models(); d.describe('dbrx');"
        "heavy = {'torch','transformers','pandas','pydantic','rich','plotly','numpy'} & set(sys.modules); print(heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
