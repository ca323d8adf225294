"""Scrub: what is private goes, what is of the method stays, and no number changes."""

import getpass
import platform

import pyarrow as pa
import pytest
from analyse.tables import record
from hypothesis import given, settings
from hypothesis import strategies as st
from report.synthetic import make_manifest, make_run

from moebench.analyse.load import arrow_schema, read_results, write_results
from moebench.report.scrub import scrubbed

HOME = "/home/alice/secret-project"


def results(tmp_path, *records):
    write_results(records, tmp_path / "results.parquet")
    return read_results(tmp_path / "results.parquet")


def failed(provider, reason, **over):
    return record(provider, status="failed", reason=reason, **over)


def reason_after(tmp_path, reason, **manifest):
    _, table = scrubbed(make_manifest().model_copy(update=manifest), results(tmp_path, failed("triton", reason)))
    return table["reason"].to_pylist()[0]


@pytest.mark.parametrize(
    ("said", "left"),
    [
        (f"File {HOME}/k.py, line 3", "File k.py, line 3"),
        (f'File "{HOME}/k.py", line 3', 'File "k.py", line 3'),
        ("in '/data/my models/alice b/x.safetensors'", "in 'x.safetensors'"),
        ("/home/alice/.venv/lib/python3.12/site-packages/torch/nn/functional.py:12", "torch/nn/functional.py:12"),
        (f"{HOME}/moebench/providers/triton_layer.py raised", "triton_layer.py raised"),
        (f"{HOME}/moebench/providers/load.py raised", "moebench/providers/load.py raised"),
        (f"{HOME}/kernels/moebench_kernels/gemm.py:9", "moebench_kernels/gemm.py:9"),
        ("/tmp/torchinductor_alice/ab/cdef.py:1", "cdef.py:1"),
        ("--out=/scratch/alice/run1", "--out=run1"),
        ("file:///mnt/disk/alice/k.py", "k.py"),
        ("cd ~/work/k.py and ~alice", "cd k.py and ~"),
        ("no room in /home/alice", "no room in ~"),
        ("../../alice/k.py:f", "k.py:f"),
        ("HF_TOKEN=hf_abc123 HOME=/home/alice CUDA_VISIBLE_DEVICES=0", "HF_TOKEN=... HOME=... CUDA_VISIBLE_DEVICES=0"),
        ("mail alice.b@example.org now", "mail USER@HOST now"),
    ],
)
def test_what_is_private_goes(tmp_path, said, left):
    assert reason_after(tmp_path, said) == left


@pytest.mark.parametrize(
    "text",
    [
        "12.5 TFLOP/s, 3 GB/s and tokens /s",
        "see https://pytorch.org/docs/stable/index.html",
        "/sys/class/powercap/intel-rapl:0/energy_uj cannot be read",
        "/usr/local/cuda/lib64/libcudart.so.12: no such file",
        "tokens = 16, T = 4 and E_MAX",
        "torch.compile of k.py:f at 1/2 of ./k.py, a/b/c.py",
        "trace:olmoe.safetensors@12 active:0.5@16 fp8:128",
        "pip install torch@2.11.0",
    ],
)
def test_what_is_of_the_method_stays(tmp_path, text):
    assert reason_after(tmp_path, text) == text


def test_users_and_the_host_are_no_words_of_the_text(tmp_path):
    said = f"{HOME}/k.py: alice may not write, alice2 may; on node-17 triton fails"
    assert "USER may not write, alice2 may" in reason_after(tmp_path, said)


def test_this_host_and_user_go_but_no_word_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "node-17.cluster.example")
    monkeypatch.setattr(getpass, "getuser", lambda: "triton")
    said = "triton on node-17.cluster.example (node-17) is not node-170"
    assert reason_after(tmp_path, said) == "triton on HOST (HOST) is not node-170"


def test_a_user_without_a_name_is_no_error(tmp_path, monkeypatch):
    def unknown():
        raise KeyError("uid not found: 1001")

    monkeypatch.setattr(getpass, "getuser", unknown)
    assert reason_after(tmp_path, "fine") == "fine"


def test_the_manifest_is_cleaned_and_says_where(tmp_path):
    manifest = make_manifest().model_copy(
        update={
            "command": f"moebench run suite {HOME}/s.toml --out /tmp/run1 --provider {HOME}/k.py:f",
            "suite_text": f'# {HOME}/s.toml\ntraffic = "trace:{HOME}/t.safetensors@3"\n',
            "joined": [f"{HOME}/k.py:f"],
            "files": {f"{HOME}/t.safetensors": "abc"},
            "providers": {f"{HOME}/k.py:f": {"version": None, "hash": "ab"}, "triton": {"unavailable": f"{HOME}/x.so"}},
            "machine": {"cpu": "CPU", "held_cores": [0, 1], "note": f"{HOME}/y", "hostname": "x", "gpu_uuid": "GPU-1"},
        }
    )
    rows = results(tmp_path, record(f"{HOME}/k.py:f", [1.0, 2.0], traffic=f"trace:{HOME}/t.safetensors@3"))
    clean, table = scrubbed(manifest, rows)
    assert "alice" not in clean.model_dump_json()
    assert "secret" not in clean.model_dump_json()
    assert clean.command == "moebench run suite s.toml --out run1 --provider k.py:f"
    assert clean.joined == ["k.py:f"] == [name for name in clean.providers if name != "triton"]
    assert clean.machine == {"cpu": "CPU", "held_cores": [0, 1], "note": "y"}
    assert clean.files == {"t.safetensors": "abc"}
    assert table["provider"].to_pylist() == ["k.py:f"]
    assert table["traffic"].to_pylist() == ["trace:t.safetensors@3"]
    cleaned = ["suite_text", "joined", "files", "command", "machine", "providers", "column provider", "column traffic"]
    assert clean.published == cleaned
    assert (clean.suite_hash, clean.run_id) == (manifest.suite_hash, manifest.run_id)


def test_arms_of_files_of_one_name_stay_apart(tmp_path):
    names = ["/home/alice/k.py:f", "/home/bob/k.py:f", "k.py:f"]
    rows = [record(name, [1.0, 2.0]) for name in names]
    _, table = scrubbed(make_manifest(), results(tmp_path, *rows, failed("triton", "/home/bob/k.py broke")))
    assert table["provider"].to_pylist() == ["2/k.py:f", "3/k.py:f", "k.py:f", "triton"]
    assert table["reason"].to_pylist()[-1] == "3/k.py broke"


def test_numbers_and_rows_are_as_measured(tmp_path):
    make_run(tmp_path / "run", hostile=True, stages=True, priced=True)
    before = read_results(tmp_path / "run" / "results.parquet")
    texts = [name for name in before.column_names if before.schema.field(name).type == pa.string()]
    private = before.set_column(
        before.column_names.index("model"), before.schema.field("model"), [[f"{HOME}/config.json"] * len(before)]
    )
    _, after = scrubbed(make_manifest(), private)
    assert after.schema == arrow_schema()
    assert after.drop_columns([*texts, "flags"]).equals(before.drop_columns([*texts, "flags"]))
    assert set(after["model"].to_pylist()) == {"config.json"}
    assert after["flags"].equals(before["flags"])


def test_what_is_clean_is_left_as_it_is(tmp_path):
    rows = results(tmp_path, record("triton", [1.0, 2.0], flags=["outliers"]))
    manifest = make_manifest()
    clean, table = scrubbed(manifest, rows)
    assert clean.published == []
    assert clean.model_copy(update={"published": None}) == manifest
    assert table.equals(rows)
    again, _ = scrubbed(clean.model_copy(update={"published": ["command"]}), table)
    assert again.published == ["command"], "what was cleaned before is still said"


@settings(max_examples=50, deadline=None)
@given(st.text("/~.:ab'\" \n@=-_A", max_size=40))
def test_cleaning_twice_changes_nothing_more(text):
    empty = arrow_schema().empty_table()
    once = scrubbed(make_manifest().model_copy(update={"command": text}), empty)[0]
    assert scrubbed(once, empty)[0].command == once.command
