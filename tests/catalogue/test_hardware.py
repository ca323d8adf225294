"""The hardware table, a user's rows, and which device is which."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moebench.catalogue.hardware import DEVICE_NAMES, hardware_table, match

TABLE = hardware_table()


@pytest.mark.parametrize(
    ("device", "row"),
    [
        ("NVIDIA H200", "H200-SXM-141GB"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM-80GB"),
        ("NVIDIA H100 PCIe", "H100-PCIe-80GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-SXM-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIe-80GB"),
        ("NVIDIA B200", "B200-SXM-180GB"),
        ("NVIDIA GB200", "GB200-NVL72"),
        ("NVIDIA H20", "H20-96GB"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("AMD Instinct MI300X", "MI300X"),
        ("nvidia  h200 ", "H200-SXM-141GB"),
        # Neighbours by name that are other devices.
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A100-PCIE-40GB", None),
        ("NVIDIA H800 PCIe", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A10", None),
        ("NVIDIA L40", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("AMD EPYC 7763 64-Core Processor", None),
        ("Intel(R) Xeon(R) Platinum 8480+", None),
        ("", None),
    ],
)
def test_match(device: str, row: str | None) -> None:
    found = match(device, TABLE)
    assert (found.name if found else None) == row


def test_every_row_is_reachable_by_a_device_name() -> None:
    assert set(DEVICE_NAMES.values()) == set(TABLE)


def test_the_shipped_numbers() -> None:
    h200 = TABLE["H200-SXM-141GB"]
    assert (h200.mem_bw_gbs, h200.power_w, h200.usd_per_gpu_hour) == (4800, 700, 3.5)
    assert "2025" in h200.price_basis
    assert (h200.peak_tflops("bf16"), h200.peak_tflops("fp16"), h200.peak_tflops("fp8:row")) == (989, 989, 1979)
    assert h200.peak_tflops("fp32") is None
    assert h200.peak_tflops("int8") is None
    assert all(row.source for row in TABLE.values())
    assert all(row.price_basis for row in TABLE.values() if row.usd_per_gpu_hour is not None)


def test_a_users_csv_row_for_the_cpu(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("name,match,power_w,price_usd,life_years,utilisation\nmy-epyc,AMD EPYC,280,8000,4,0.6\n")
    row = match("AMD EPYC 7763 64-Core Processor", hardware_table(path))
    assert row is not None
    assert (row.name, row.price_usd, row.utilisation, row.bf16_dense_tflops) == ("my-epyc", 8000, 0.6, None)
    assert match("NVIDIA H200", hardware_table(path)) == TABLE["H200-SXM-141GB"]


def test_a_users_toml_row_stands_above_the_shipped_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[[hardware]]\nname = "H200-SXM-141GB"\nusd_per_gpu_hour = 2\nfp32_dense_tflops = 67\n')
    row = match("NVIDIA H200", hardware_table(path))
    assert row is not None
    assert (row.usd_per_gpu_hour, row.peak_tflops("fp32"), row.mem_gb) == (2, 67, None)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "name,power_w\nx,nan\n", "row 2: power_w is 'nan'; it must be a number, at least 0"),
        ("a.csv", "name,power_w\nx,-3\n", "power_w is '-3'; it must be a number, at least 0"),
        ("a.csv", "name,power_w\nx,much\n", "power_w is 'much'"),
        ("a.csv", "name,power_w\nx,1e999\n", "power_w is '1e999'"),
        ("a.csv", "name,utilisation\nx,1.5\n", "utilisation is '1.5'; it must be a number, more than 0, at most 1"),
        ("a.csv", "name,utilisation\nx,0\n", "utilisation is '0'"),
        ("a.csv", "name,pue\nx,0.5\n", "pue is '0.5'; it must be a number, at least 1"),
        ("a.csv", "name,watts\nx,3\n", "unknown column 'watts'"),
        ("a.csv", "name,power\nx,3\n", "unknown column 'power'; did you mean power_w"),
        ("a.csv", "power_w\n3\n", "name is missing"),
        ("a.csv", "name,power_w\nx,3,4\n", "row 2: more cells than columns"),
        ("a.csv", "name\nx\nx\n", "row 3: name 'x' appears twice"),
        ("a.csv", "", "no hardware rows"),
        ("a.csv", 'name\n"x', "not CSV"),
        ("a.toml", "hardware = 3", "expected [[hardware]] tables"),
        ("a.toml", "[[hardware]]\nname = 'x'\npower_w = nan\n", "row 1: power_w is 'nan'"),
        ("a.toml", "[[hardware]]\nname = 'x'\npower_w = true\n", "power_w is 'True'"),
        ("a.toml", "[[hardware]]\nname = 'x'\npower_w = [3]\n", "power_w is '[3]'"),
        ("a.toml", "[[hardware]]\nname = 3\n", "name is 3; it must be text"),
        ("a.toml", "[[hardware]\n", "not TOML"),
        ("a.json", "{}", "a hardware file is .csv or .toml"),
    ],
)
def test_a_bad_file_gets_one_clear_line(name: str, text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        hardware_table(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        hardware_table(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"name\n\xff\xfe\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        hardware_table(tmp_path / "b.csv")
    (tmp_path / "d.csv").mkdir()
    with pytest.raises(ValueError, match="is a directory"):
        hardware_table(tmp_path / "d.csv")
