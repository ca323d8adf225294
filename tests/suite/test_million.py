"""A plan of a million points: sized, estimated and looked into in 500 MB and the time of some 200 million additions."""

import json
import subprocess
import sys

import pytest

HEAD = 'name = "million"\nquestion = "How long does planning take?"\n[[sweep]]\n'
SHAPE = "expert_ffn_size = [64, 128, 256, 512, 1024]\nexperts = [8, 16, 32, 64, 128]\ntop_k = [1, 2, 4, 8]\n"
# Every axis in the condition, so that nothing can be counted without being looked at.
EVERY_AXIS = (
    'where = "hidden_size * expert_ffn_size + seed >= granularity and tokens * top_k > 0 and '
    "(traffic != 'uniform' or experts > 1) and "
    "(capacity_factor + tokens * experts > seed - top_k * hidden_size * expert_ffn_size or "
    "provider != 'torch-bmm' or precision == 'fp16' or scope == 'gate' or layout != 'single' or phase == 'train' or "
    "direction == 'forward_backward' or model != 'custom' or router == 'hash' or activation == 'relu')\"\n"
)
PLANS = {
    "few variants of many problems": EVERY_AXIS + "[sweep.grid]\n" + SHAPE + "hidden_size = [64, 128]\n"
    f"seed = {list(range(1000))}\ntokens = [1, 2, 4, 8, 16]\nprovider = 'torch-loop'\n",
    "many variants of few problems": EVERY_AXIS + "[sweep.grid]\n" + SHAPE + "hidden_size = [64, 128]\n"
    "tokens = [1, 2, 4, 8, 16]\nprovider = ['torch-loop', 'torch-bmm']\n"
    f"capacity_factor = {[1 + each / 100 for each in range(500)]}\n",
    "problems that can coincide": "[sweep.grid]\n" + SHAPE + "hidden_size = [64, 128]\ngranularity = [1, 2]\n"
    f"seed = {list(range(500))}\ntokens = [1, 2, 4, 8, 16]\nprovider = 'torch-loop'\n",
}  # fmt: skip
DRY_RUN = """
import json, resource, sys, time
from itertools import islice
import moebench.suite
from moebench.estimate import estimate_seconds
suite = moebench.suite.load_suite([sys.argv[1]])
points, blocks = suite.count("cpu")
estimate = estimate_seconds(suite, "cpu")
peek = [block.problem.tokens for block in islice(suite.blocks("cpu"), 3)]
used = resource.getrusage(resource.RUSAGE_SELF)
begin, total = time.process_time(), 0
for number in range(10_000_000):
    total += number
yard_s = time.process_time() - begin
# Not ru_maxrss: a child's begins at the size of the process that forked it, here all of pytest.
peak_kb = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"points": points, "blocks": blocks, "seconds": estimate.seconds, "sampled": estimate.sampled,
    "peek": len(peek), "rss_mb": peak_kb / 1024, "cpu_s": used.ru_utime + used.ru_stime, "yard_s": yard_s}))
"""


@pytest.mark.parametrize("plan", PLANS)
def test_a_million_points_are_planned_in_time_and_memory(tmp_path, plan):
    path = tmp_path / "million.toml"
    path.write_text(HEAD + PLANS[plan])
    env = {"PYTHONPATH": ":".join(place for place in sys.path if place)}
    done = subprocess.run(
        [sys.executable, "-c", DRY_RUN, str(path)], capture_output=True, text=True, env=env, check=True, timeout=60
    )
    found = json.loads(done.stdout)
    if "coincide" in plan:
        assert 500_000 < found["points"] < 1_000_000, "coinciding points come once"
    else:
        assert found["points"] == 1_000_000
    assert found["peek"] == 3
    assert found["seconds"] > 1e5
    assert found["sampled"] >= 128
    assert found["rss_mb"] < 500
    # CPU time, start of Python included, by what this machine takes for 10 million additions: it may be a slow one.
    assert found["cpu_s"] < 20 * found["yard_s"]
