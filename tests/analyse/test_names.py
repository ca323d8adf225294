"""Names: short, and different wherever rows differ."""

from analyse.tables import record, table


def names(*records):
    rows = table(*records)
    return list(rows["variant"]), list(rows["problem"])


def test_plain_rows_have_plain_names():
    assert names(record("a", [1.0]), record("b", [1.0])) == (["a", "b"], ["olmoe-1b-7b · 16 tokens"] * 2)


def test_variants_say_what_tells_them_apart():
    variants, _ = names(record("a", [1.0]), record("a", [1.0], precision="bf16", capacity_factor=1.25))
    assert variants == ["a fp32", "a bf16 cap 1.25"]


def test_a_yardstick_does_not_lengthen_the_names_of_arms():
    variants, _ = names(record("a", [1.0]), record("gemm", [1.0], role="yardstick", precision="bf16"))
    assert variants == ["a", "gemm"]


def test_plain_numbers_are_named_by_their_shape_and_models_are_not():
    _, problems = names(record("a", [1.0]), record("a", [1.0], model="custom", routed_experts=8, top_k=2, tokens=1))
    assert problems == ["olmoe-1b-7b · 16 tokens", "custom · 8 experts top-2 2048×1024 · 1 token"]


def test_problems_say_what_tells_them_apart():
    for over in ({"traffic": "zipf:1.2"}, {"direction": "forward_backward"}, {"seed": 1}, {"device": "gpu"},
                 {"top_k": 4}, {"run_id": "q"}, {"router": "topk_softmax"}, {"phase": "decode"}):  # fmt: skip
        _, problems = names(record("a", [1.0]), record("a", [1.0], **over))
        assert problems[0] != problems[1], over


def test_a_block_is_of_one_run_and_one_replicate():
    rows = table(
        *(record("a", [1.0], **over) for over in ({}, {}, {"run_id": "q"}, {"replicate": 1}, {"block_id": "c"}))
    )
    assert list(rows["block"]) == [0, 0, 1, 2, 3]
