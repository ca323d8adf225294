"""Bad suites: one line for each fault, with the file, the key, what was found and what is allowed."""

import copy
import re
import time
import tomllib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moebench.suite import SuiteError, load_suite, shipped
from moebench.suite_file import MAX_BYTES, read_source

HEAD = 'name = "bad"\nquestion = "Is it refused?"\n'
SHAPE = "hidden_size = 16\nexpert_ffn_size = 8\nexperts = 4\n"
SWEEP = f'[[sweep]]\n[sweep.grid]\n{SHAPE}top_k = 2\ntokens = 4\nprovider = "torch-loop"\n'


def faults_of(tmp_path, text, overrides=None):
    path = tmp_path / "bad.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SuiteError) as error:
        load_suite([str(path)], overrides)
    assert all("\n" not in fault for fault in error.value.faults)
    assert str(error.value) == "\n".join(error.value.faults)
    return [fault.replace(f"{tmp_path}/", "") for fault in error.value.faults]


def grid(line, drop=""):
    lines = [each for each in SWEEP.splitlines() if not drop or not each.startswith(drop)]
    return HEAD + "\n".join([*lines, line]) + "\n"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (grid("tokns = 4"), "bad.toml: sweep 1: grid: unknown axis 'tokns'; did you mean tokens"),
        (grid('tokens = "four"', "tokens"), "bad.toml: sweep 1: grid.tokens: found 'four'; allowed: whole numbers"),
        (grid("tokens = 4.0", "tokens"), "sweep 1: grid.tokens: found 4.0; allowed: whole numbers"),
        (grid("tokens = true", "tokens"), "sweep 1: grid.tokens: found True"),
        (grid("tokens = 0", "tokens"), "sweep 1: grid.tokens: found 0; allowed: whole numbers from 1"),
        (grid("tokens = 99999999999999999999", "tokens"), "sweep 1: grid.tokens: found 9999999999"),
        (grid("tokens = nan", "tokens"), "sweep 1: grid.tokens: found nan"),
        (grid("tokens = [4, 8, 4]", "tokens"), "sweep 1: grid.tokens: 4 is given twice"),
        (grid("tokens = []", "tokens"), "sweep 1: grid.tokens: is empty"),
        (grid("tokens = [[4]]", "tokens"), "sweep 1: grid.tokens: found [4]"),
        (grid("tokens = 2024-01-01", "tokens"), "sweep 1: grid.tokens: found datetime.date"),
        (grid("tokens = {a = 1}", "tokens"), "sweep 1: grid.tokens: found {'a': 1}"),
        (grid("", "tokens"), "bad.toml: sweep 1: tokens: is missing"),
        (grid("", "provider"), "sweep 1: provider: is missing"),
        (grid("", "top_k"), "sweep 1: top_k: is missing"),
        (grid("capacity_factor = nan"), "sweep 1: grid.capacity_factor: found nan"),
        (grid("capacity_factor = inf"), "sweep 1: grid.capacity_factor: found inf"),
        (grid("capacity_factor = 0"), "sweep 1: capacity_factor: found 0; allowed: numbers > 0, or 'dropless'"),
        (grid('capacity_factor = "droples"'), "did you mean dropless"),
        (grid("capacity_factor = [2, 2.0]"), "sweep 1: grid.capacity_factor: 2.0 is given twice"),
        (grid('traffic = "zipf"'), "traffic 'zipf'"),
        (grid('traffic = "zipf:nan"'), "traffic 'zipf:nan'"),
        (grid('traffic = ["zipf:1", "zipf:1.0"]'), "grid.traffic: 'zipf:1' is given twice"),
        (grid('traffic = "trace:file.npz"'), "file.npz: no such file"),
        (grid('traffic = "ballanced"'), "did you mean 'balanced'"),
        (grid('precision = "fp8"'), "found 'fp8'"),
        (grid('direction = "backward"'), "grid.direction: found 'backward'; did you mean forward"),
        (grid('scope = "expert"'), "grid.scope: found 'expert'; did you mean experts"),
        (grid('layout = "ep:2"'), "grid.layout: found 'ep:2' (allowed: single)"),
        (grid('router = "softmax"'), "grid.router: found 'softmax'; did you mean"),
        (grid('activation = "swiglue"'), "grid.activation: found 'swiglue'; did you mean swiglu"),
        (grid('provider = "torch-lop"', "provider"), "did you mean 'torch-loop'"),
        (grid("provider = 3", "provider"), "grid.provider: found 3"),
        (grid('model = "mixtral-8x7b"'), "model and expert_ffn_size or hidden_size cannot both be given"),
        (grid("granularity = 3"), "leaves no point: for example, granularity 3 does not divide expert_ffn_size 8"),
        (grid("granularity = [1, 3]"), "grid.granularity: 3 is in no point: for example, granularity 3 does not"),
        (grid("top_k = [2, 5]", "top_k"), "grid.top_k: 5 is in no point: for example, top_k 5 is more than 4 experts"),
        (grid("top_k = 5", "top_k"), "sweep 1: leaves no point: for example, top_k 5 is more than 4 experts"),
        (grid("model = 'mixtral-8x77b'", "hidden_size"), "unknown model 'mixtral-8x77b'; did you mean mixtral-8x7b"),
        (grid("model = 'gpt-4'", "hidden_size"), "gpt-4"),
        (grid("model = 'swin-moe-s-64'", "hidden_size"), "name one of swin-moe-s-64:stage3"),
        (grid("[sweep.zip]\ntraffic = ['uniform']\nseed = [1, 2]"), "(traffic 1, seed 2); all must be equally long"),
        (grid("[sweep.zip]\ntokens = [1]"), "sweep 1: grid.tokens: tokens is given twice"),
        (grid("[sweep.zip]\nseed = [1, 1]\nphase = ['decode', 'decode']"), "sweep 1: zip: a row stands twice"),
        (grid("[[sweep.points]]\nseed = 1\n[[sweep.points]]\nphase = 'decode'"), "must all name the same axes"),
        (grid("[[sweep.points]]\nseed = 1\n[[sweep.points]]\nseed = 'x'"), "points row 2.seed: found 'x'"),
        (grid("[[sweep.points]]"), "sweep 1: points: a row is empty"),
        (HEAD + SWEEP.replace("[sweep.grid]", "where = 'tokens > 4'\n[sweep.grid]"), "leaves no point: where = 't"),
        (HEAD + SWEEP.replace("[sweep.grid]", "where = 'tokns > 4'\n[sweep.grid]"), "where: unknown name 'tokns'; did"),
        (HEAD + SWEEP.replace("[sweep.grid]", "where = '1 / (tokens - 4) > 0'\n[sweep.grid]"), "division by zero"),
        (HEAD + SWEEP.replace("[sweep.grid]", "where = 3\n[sweep.grid]"), "sweep 1: where: found 3; input should be"),
        (HEAD + SWEEP.replace("[sweep.grid]", "wher = '1 > 0'\n[sweep.grid]"), "sweep 1: wher: unknown key; did you m"),
        (HEAD + SWEEP.replace("[sweep.grid]", "tokens = 3\n[sweep.grid]"), "tokens: unknown key (an axis: it belongs"),
        (HEAD + SWEEP.replace("[sweep.grid]", "device = 'gpu'\n[sweep.grid]"), "sweep 1: device: found 'gpu'"),
        (HEAD, "bad.toml: sweep: is missing"),
        (HEAD + "sweep = []", "bad.toml: sweep: found []"),
        (HEAD + "sweep = 3", "bad.toml: sweep: found 3"),
        (SWEEP, "bad.toml: name: is missing"),
        ('name = "a b"\nquestion = "?"\n' + SWEEP, "bad.toml: name: found 'a b'"),
        (HEAD + "energie = true\n" + SWEEP, "bad.toml: energie: unknown key; did you mean energy"),
        (HEAD + 'energy = "yes"\n' + SWEEP, "bad.toml: energy: found 'yes'"),
        (HEAD + "seed = -1\n" + SWEEP, "bad.toml: seed: found -1"),
        (HEAD + "[budget]\nseconds_per_point = nan\n" + SWEEP, "bad.toml: budget.seconds_per_point: found nan"),
        (HEAD + "[budget]\nseconds_total = inf\n" + SWEEP, "bad.toml: budget.seconds_total: found inf"),
        (HEAD + "[budget]\nmin_sample = 3\n" + SWEEP, "budget.min_sample: unknown key; did you mean min_samples"),
        (HEAD + "[defaults]\ntokens = 'x'\n" + SWEEP, "bad.toml: defaults.tokens: found 'x'"),
        (HEAD + "[defaults]\nseed = 'x'\n" + SWEEP, "bad.toml: defaults.seed: found 'x'"),
        (HEAD + "[defaults]\ntokns = 3\n" + SWEEP, "bad.toml: defaults: unknown axis 'tokns'; did you mean tokens"),
        (HEAD + "[defaults]\ngranularity = [1, 3]\n" + SWEEP, "defaults.granularity: 3 is in no point"),
        (HEAD + "[[sweep\n", "bad.toml: is not TOML: "),
        (HEAD + 'name = "again"\n', "(at line 3, column "),
        (HEAD + "x = " + "[" * 5000, "is not TOML: too deeply nested"),
        (HEAD + "x = " + "9" * 5000, "is not TOML: Exceeds the limit"),
        (HEAD + ".".join(["a"] * 200_000) + " = 1", "is not TOML: a key has more than 50 parts"),
        (HEAD + "[" + " . ".join(["'a'", '"="'] * 50_000) + "]", "is not TOML: a key has more than 50 parts"),
        (b"\xff\xfe" + HEAD.encode(), "bad.toml: is not UTF-8 text (byte 0)"),
        (b"#" * (MAX_BYTES + 1), "bad.toml: is larger than"),
        ("", "bad.toml: name: is missing"),
        (HEAD + "x\x00 = 3", "is not TOML"),
        (grid('provider = "a\\nb"', "provider"), "grid.provider: found 'a\\nb'; allowed: one line"),
        (HEAD + SWEEP + '"a\\nb" = 3', "unknown axis 'a\\nb'"),
        (HEAD + '"a\\nb" = 3\n' + SWEEP, "bad.toml: 'a\\nb': unknown key"),
        (grid(f"seed = {list(range(20_000))}\nphase = ['', 'decode', 'train', 'prefill']\ndirection = ['forward', "
              "'forward_backward']\ntraffic = [" + ", ".join(f"'zipf:{i}'" for i in range(100)) + "]"),
         "16,000,000 combinations"),
        (grid("capacity_factor = [" + ", ".join(map(str, range(1, 10_002))) + "]"), "10,001 variants of one problem"),
    ],
)  # fmt: skip
def test_each_fault_is_named(tmp_path, text, fault):
    found = faults_of(tmp_path, text)
    assert any(fault in each for each in found), found
    assert all(each.startswith("bad.toml: ") or "combinations" in each for each in found)
    assert max(map(len, found)) < 600


def test_all_faults_come_at_once(tmp_path):
    text = grid("tokns = 4\ntokens = 'x'\nprecision = 'fp9'", "tokens") + SWEEP.replace("top_k = 2", "top_k = 'two'")
    found = faults_of(tmp_path, text)
    assert len(found) == 4, found
    assert [fault.split(":")[1].strip() for fault in found] == ["sweep 1", "sweep 1", "sweep 1", "sweep 2"]


def test_dead_values_of_all_sweeps_come_at_once(tmp_path):
    text = grid("top_k = [2, 5, 6]", "top_k") + SWEEP.replace("top_k = 2", "top_k = [2, 7]")
    assert [re.search(r"sweep \d: grid.top_k: \d", fault).group() for fault in faults_of(tmp_path, text)] == [
        "sweep 1: grid.top_k: 5", "sweep 1: grid.top_k: 6", "sweep 2: grid.top_k: 7",
    ]  # fmt: skip


def test_a_file_of_many_faults_stays_readable_and_quick(tmp_path):
    start = time.process_time()
    assert len(faults_of(tmp_path, grid(f"provider = {['torch-lop'] * 50_000}", "provider"))) == 51
    assert time.process_time() - start < 5
    found = faults_of(tmp_path, grid(f"tokens = {[-each for each in range(1000)]}", "tokens"))
    assert len(found) == 51
    assert found[-1] == "... and more"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("quik", "unknown suite 'quik'; did you mean quick"),
        ("nothing-like-it", "shipped: capacity, decode, granularity, h200-compile"),
        ("missing.toml", "'missing.toml': cannot be read: No such file"),
        ("no/such/folder", "cannot be read: No such file"),
        ("a\0b.toml", "cannot be read"),
        ("x" * 5000 + ".toml", "cannot be read: File name too long"),
    ],
)
def test_a_source_that_is_not_there(source, says):
    with pytest.raises(SuiteError, match=re.escape(says)) as error:
        load_suite([source])
    assert "\n" not in str(error.value)


def test_a_folder_is_no_suite(tmp_path):
    with pytest.raises(SuiteError, match="is a folder"):
        load_suite([f"{tmp_path}/"])


def test_no_source_is_an_error():
    with pytest.raises(SuiteError, match="no suite is named"):
        load_suite([])


def test_faults_of_several_files_come_together(tmp_path):
    with pytest.raises(SuiteError) as error:
        load_suite(["quik", "smok", f"{tmp_path}/none.toml"])
    assert len(error.value.faults) == 3


TEXTS = {name: read_source(name)[1] for name in shipped()}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_files_raise_nothing_else(tmp_path, data):
    text = TEXTS[data.draw(st.sampled_from(sorted(TEXTS)))]
    pieces = ["", "[", "]", '"', "=", "\n", "0", "-1", "nan", "1e999", "[[sweep]]", "where = '", "\x00", "é", "9" * 400]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        until = min(len(text), at + data.draw(st.integers(0, 30)))
        text = text[:at] + data.draw(st.sampled_from(pieces)) + text[until:]
    path = tmp_path / "mutated.toml"
    path.write_text(text, encoding="utf-8")
    try:
        load_suite([str(path)])
    except SuiteError as error:
        assert error.faults  # noqa: PT017  (either outcome is right, nothing else is)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


QUICK = tomllib.loads(TEXTS["quick"])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_value_anywhere_raises_nothing_else(data):
    table = copy.deepcopy(QUICK)
    sweep = table["sweep"][data.draw(st.integers(0, len(table["sweep"]) - 1))]
    place = data.draw(st.sampled_from([table, sweep, sweep["grid"], table["budget"]]))
    place[data.draw(st.sampled_from([*place, "defaults", "zip", "points", "seed", "where", "x"]))] = data.draw(values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moebench.suite_file.tomllib.loads", lambda _text: table)
        try:
            load_suite(["quick"])
        except SuiteError as error:
            assert error.faults  # noqa: PT017  (either outcome is right, nothing else is)
