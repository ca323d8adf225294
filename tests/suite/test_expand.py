"""Expansion: exactly the product, filtered; grouped into blocks; counted without building."""

from itertools import islice, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.catalogue.spec import LayerSpec, RouterSpec
from moebench.point import Block, Point, Problem, Variant
from moebench.suite import SuiteError, load_suite, parse_shard, shard

POOLS = {
    "hidden_size": [16, 32],
    "expert_ffn_size": [8, 12],
    "experts": [2, 4, 8],
    "top_k": [1, 2, 4],
    "granularity": [1, 2, 3],
    "tokens": [1, 16, 64],
    "traffic": ["balanced", "zipf:1"],
    "direction": ["forward", "forward_backward"],
    "seed": [0, 1],
    "provider": ["torch-loop", "torch-bmm"],
    "capacity_factor": [1.0, 2.0, "dropless"],
    "scope": ["layer", "experts"],
}
NEEDED = ("hidden_size", "expert_ffn_size", "experts", "top_k", "tokens", "provider")
CONDITIONS = [
    None,
    "top_k < experts",
    "tokens > 1 or provider == 'torch-bmm'",
    "capacity_factor < 2 or direction == 'forward'",
    "tokens * top_k >= experts and scope == 'layer'",
    "granularity == 1 or seed == 0 and traffic != 'balanced'",
]


def toml(value):
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def write(tmp_path, sweeps, head="", name="made"):
    lines = [f'name = "{name}"', 'question = "Made by a test?"', head]
    for sweep in sweeps:
        lines.append("[[sweep]]")
        lines += [f"{key} = {toml(sweep[key])}" for key in ("device", "where") if sweep.get(key)]
        for part in ("grid", "zip"):
            if sweep.get(part):
                lines.append(f"[sweep.{part}]")
                lines += [f"{axis} = {toml(values)}" for axis, values in sweep[part].items()]
        for row in sweep.get("points", []):
            lines.append("[[sweep.points]]")
            lines += [f"{axis} = {toml(value)}" for axis, value in row.items()]
    path = tmp_path / f"{name}.toml"
    path.write_text("\n".join(lines))
    return str(path)


def brute_force(sweep):
    """The points of a sweep of plain shapes, and for each row of each choice whether a point has it."""
    choices = [[{axis: value} for value in values] for axis, values in sweep["grid"].items()]
    if sweep["zip"]:
        choices.append([dict(zip(sweep["zip"], row, strict=True)) for row in zip(*sweep["zip"].values(), strict=True)])
    if sweep["points"]:
        choices.append(sweep["points"])
    points, alive = set(), set()
    for rows in product(*(range(len(choice)) for choice in choices)):
        row = {}
        for choice, index in zip(choices, rows, strict=True):
            row |= choice[index]
        point = brute_point(row, sweep["where"])
        if point:
            points.add(point)
            alive |= set(enumerate(rows))
    return points, len(alive) == sum(map(len, choices))


def brute_point(row, where):
    row = {"granularity": 1, "traffic": "balanced", "direction": "forward", "seed": 0, "scope": "layer",
           "capacity_factor": "dropless"} | row  # fmt: skip
    m = row["granularity"]
    if row["top_k"] > row["experts"] or row["expert_ffn_size"] % m:
        return None
    layer = LayerSpec(row["hidden_size"], row["expert_ffn_size"] // m, row["experts"] * m, row["top_k"] * m)
    seen = row | {"experts": row["experts"] * m, "top_k": row["top_k"] * m, "expert_ffn_size": layer.expert_ffn_size}
    seen["capacity_factor"] = float("inf") if row["capacity_factor"] == "dropless" else row["capacity_factor"]
    if where and not eval(where, {"__builtins__": {}}, seen):  # the reference; the tests wrote the text
        return None
    problem = Problem("custom", layer, row["tokens"], row["traffic"], row["direction"], "", row["seed"])
    return Point(problem, Variant(row["provider"], "fp32", row["capacity_factor"], scope=row["scope"]))


@st.composite
def made_sweeps(draw):
    chosen = [*NEEDED, *draw(st.lists(st.sampled_from([axis for axis in POOLS if axis not in NEEDED]), unique=True))]
    homes = {axis: draw(st.sampled_from(["grid", "grid", "zip", "points"])) for axis in chosen}
    where = draw(st.sampled_from(CONDITIONS))
    grid = {
        axis: draw(st.lists(st.sampled_from(POOLS[axis]), min_size=1, max_size=2, unique=True))
        for axis in chosen
        if homes[axis] == "grid"
    }
    rows = {part: [axis for axis in chosen if homes[axis] == part] for part in ("zip", "points")}
    tables = {}
    for part, axes in rows.items():
        row = st.tuples(*(st.sampled_from(POOLS[axis]) for axis in axes))
        tables[part] = draw(st.lists(row, min_size=1, max_size=3, unique=True)) if axes else []
    zipped = {axis: [row[i] for row in tables["zip"]] for i, axis in enumerate(rows["zip"])}
    points = [dict(zip(rows["points"], row, strict=True)) for row in tables["points"]]
    return {"grid": grid, "zip": zipped, "points": points, "where": where}


@settings(max_examples=200, deadline=None)
@given(st.lists(made_sweeps(), min_size=1, max_size=2))
def test_equals_the_filtered_product(tmp_path_factory, sweeps):
    path = write(tmp_path_factory.mktemp("made"), sweeps)
    expected = [brute_force(sweep) for sweep in sweeps]
    if not all(whole for _, whole in expected):
        with pytest.raises(SuiteError, match=r"in no point|leaves no point"):
            load_suite([path])
        return
    suite = load_suite([path])
    blocks = list(suite.blocks("cpu"))
    points = [point for block in blocks for point in block.points()]
    assert set(points) == set().union(*(found for found, _ in expected))
    assert len(points) == len(set(points))
    assert suite.count("cpu") == (len(points), len(blocks))
    assert suite.count("cuda") == suite.count("cpu")
    assert blocks == list(suite.blocks("cuda"))
    if len(sweeps) == 1 and len(sweeps[0]["grid"].get("granularity", [])) < 2:
        assert len({block.problem for block in blocks}) == len(blocks), "all variants of a problem are one block"


GRID = {"hidden_size": 16, "expert_ffn_size": 8, "experts": 8, "top_k": 2, "tokens": 4, "provider": "torch-loop"}


def test_problem_axes_are_the_outer_loops_and_layers_the_outermost(tmp_path):
    grid = GRID | {"provider": ["torch-loop", "torch-bmm"], "tokens": [1, 2], "experts": [4, 8]}
    blocks = list(load_suite([write(tmp_path, [{"grid": grid}])]).blocks("cpu"))
    assert [(block.problem.layer.routed_experts, block.problem.tokens) for block in blocks] == [
        (4, 1), (4, 2), (8, 1), (8, 2),
    ]  # fmt: skip
    assert all([v.provider for v in block.variants] == ["torch-loop", "torch-bmm"] for block in blocks)
    assert blocks[0].problem.layer is blocks[1].problem.layer


def test_expansion_is_lazy(tmp_path, monkeypatch):
    suite = load_suite([write(tmp_path, [{"grid": GRID | {"seed": list(range(5000))}}])])
    built = []
    make = Block.__init__
    monkeypatch.setattr(Block, "__init__", lambda self, *args: (built.append(1), make(self, *args))[1])
    assert len(list(islice(suite.blocks("cpu"), 3))) == 3
    assert len(built) == 3
    assert suite.count("cpu") == (5000, 5000)
    assert len(built) == 3


def test_a_device_keeps_its_sweep(tmp_path):
    suite = load_suite(
        [write(tmp_path, [{"device": "cuda", "grid": GRID | {"precision": "bf16"}}, {"grid": GRID | {"tokens": 9}}])]
    )
    assert [block.problem.tokens for block in suite.blocks("cpu")] == [9]
    assert [block.problem.tokens for block in suite.blocks("cuda")] == [4, 9]
    assert suite.count("cpu") == (1, 1)
    assert suite.count("cuda") == (2, 2)


def test_repeated_points_come_once(tmp_path):
    first = write(tmp_path, [{"grid": GRID}, {"grid": GRID | {"provider": ["torch-bmm", "torch-loop"]}}], name="a")
    second = write(tmp_path, [{"grid": GRID | {"tokens": [4, 5]}}], name="b")
    suite = load_suite([first, second])
    points = [(p.problem.tokens, p.variant.provider) for block in suite.blocks("cpu") for p in block.points()]
    assert points == [(4, "torch-loop"), (4, "torch-bmm"), (5, "torch-loop")]
    assert suite.count("cpu") == (3, 3)
    assert suite.name == "a+b"


def test_granularity_keeps_active_parameters(tmp_path):
    grid = GRID | {"expert_ffn_size": 64, "granularity": [1, 2, 4, 32], "top_k": 1}
    layers = [block.problem.layer for block in load_suite([write(tmp_path, [{"grid": grid}])]).blocks("cpu")]
    assert [(each.routed_experts, each.top_k, each.expert_ffn_size) for each in layers] == [
        (8, 1, 64), (16, 2, 32), (32, 4, 16), (256, 32, 2),
    ]  # fmt: skip
    assert len({each.routed_experts * each.expert_params() for each in layers}) == 1
    assert len({each.top_k * each.expert_params() for each in layers}) == 1


def test_two_ways_to_one_layer_are_one_problem(tmp_path):
    grid = GRID | {"experts": [4, 8], "top_k": [1, 2], "expert_ffn_size": [8, 16], "granularity": [1, 2]}
    suite = load_suite([write(tmp_path, [{"grid": grid}])])
    found = [block.problem for block in suite.blocks("cpu")]
    assert (
        len(found) == len(set(found)) == 15
    )  # 4 experts, 1 pick, width 16, split in two = 8 experts, 2 picks, width 8
    assert suite.count("cpu") == (15, 15)


def problems(tmp_path, grid):
    suite = load_suite([write(tmp_path, [{"grid": {"tokens": 1, "provider": "torch-loop"} | grid}])])
    return [block.problem for block in suite.blocks("cpu")]


def test_a_model_is_its_layer_and_an_overridden_one_is_marked(tmp_path):
    (plain,) = problems(tmp_path, {"model": "mixtral-8x7b"})
    assert (plain.model, plain.layer) == (
        "mixtral-8x7b",
        LayerSpec(4096, 14336, 8, 2, router=plain.layer.router),
    )
    same, other = problems(tmp_path, {"model": "mixtral-8x7b", "top_k": [2, 4]})
    assert same == plain
    assert (other.model, other.layer.top_k) == ("mixtral-8x7b*", 4)
    (split,) = problems(tmp_path, {"model": "mixtral-8x7b", "granularity": 2})
    assert (split.model, split.layer.routed_experts, split.layer.expert_ffn_size) == ("mixtral-8x7b*", 16, 7168)


def test_another_router_comes_with_its_own_parameters(tmp_path):
    (problem,) = problems(tmp_path, {"model": "deepseek-v3", "router": "softmax_topk"})
    assert problem.layer.router == RouterSpec("softmax_topk")
    assert problem.model == "deepseek-v3*"


def test_what_a_router_cannot_do_is_pruned(tmp_path):
    kept = problems(tmp_path, {"model": ["switch-base-128", "mixtral-8x7b"], "top_k": [1, 2]})
    assert [(each.model, each.layer.top_k) for each in kept] == [
        ("switch-base-128", 1), ("mixtral-8x7b*", 1), ("mixtral-8x7b", 2),
    ]  # fmt: skip
    with pytest.raises(SuiteError, match="250 experts do not fall into 8 groups"):
        problems(tmp_path, {"model": "deepseek-v3", "experts": 250})
    with pytest.raises(
        SuiteError, match=r"--set groups=3: is in no point: .*; for example, 8 experts do not fall into 3"
    ):
        load_suite(["smoke"], {"router": ["group_limited"], "groups": ["3"]})
    with pytest.raises(SuiteError, match="for example, router 'softmax_topk' has no groups"):
        load_suite(["smoke"], {"groups": ["4"]})


def test_seeds_and_phases(tmp_path):
    path = write(tmp_path, [{"grid": {**GRID, "phase": "decode"}}, {"grid": {**GRID, "seed": 5}}], "seed = 3")
    suite = load_suite([path])
    assert [(b.problem.seed, b.problem.phase) for b in suite.blocks("cpu")] == [(3, "decode"), (5, "")]
    assert suite.seed == 3


def test_shards_are_disjoint_and_whole(tmp_path):
    suite = load_suite([write(tmp_path, [{"grid": GRID | {"seed": list(range(10))}}])])
    parts = [[block.problem.seed for block in shard(suite.blocks("cpu"), i, 3)] for i in (1, 2, 3)]
    assert parts == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "-1/2", "1/2/3", "", "1/0", "²/3"])
def test_bad_shards_are_refused(text):
    with pytest.raises(ValueError, match="1 <= i <= n"):
        parse_shard(text)


def test_shard_is_read():
    assert parse_shard("2/4") == (2, 4)
