"""Marked blocks of a page: found, replaced, and what is wrong with them."""

from __future__ import annotations

import pytest
from moebench_suites.published.pages import blocks_of, rewritten, stale, words

PAGE = """# Title
<!-- published: one -->
old
<!-- end of published -->
between
  <!-- published: two -->
<!-- end of published -->
end
"""


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    return path


def test_only_what_is_between_the_marks_changes_and_once(page):
    fresh = {"one": "new\n\nlines", "two": "more"}
    assert stale(page, fresh) == ["one", "two"]
    page.write_text(rewritten(page, fresh))
    assert stale(page, fresh) == []
    assert blocks_of(page) == {"one": ["new", "", "lines"], "two": ["more"]}
    assert page.read_text() == PAGE.replace("old", "new\n\nlines").replace("two -->\n", "two -->\nmore\n")
    assert rewritten(page, fresh) == page.read_text()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("<!-- published: one -->\n", "", "line 3: an end without a block"),
        ("<!-- published: one -->\nold\n<!-- end of published -->\n", "", "lacks the line <!-- published: one -->"),
        ("  <!-- published: two", "<!-- published: one", "line 6: the block 'one' stands there twice"),
        ("<!-- end of published -->\nbetween", "between", "line 5: the block 'one' before it has no end"),
        ("<!-- end of published -->\nend", "end", "the block 'two' has no end"),
        ("end\n", "<!-- published: three -->\n<!-- end of published -->\n", "nothing is known of a block 'three'"),
    ],
)
def test_marks_that_are_missing_doubled_or_unknown_name_the_page(page, old, new, said):
    head, _, tail = PAGE.rpartition(old)
    page.write_text(head + new + tail)
    with pytest.raises(ValueError, match=r"page\.md: ") as error:
        stale(page, {"one": "", "two": ""})
    assert str(error.value) == f"{page}: {said}"


def test_a_page_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(ValueError, match="no such file; run this at the top of a checkout"):
        blocks_of(tmp_path / "page.md")
    (tmp_path / "page.md").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="cannot be read"):
        blocks_of(tmp_path / "page.md")


def test_text_from_a_file_is_short_and_no_markup():
    assert words("<script> | [a](b)\n<!-- end of published -->").startswith("\\<script\\> \\| \\[a\\](b) \\<")
    assert "<!-- end of published -->" not in words("<!-- end of published -->").replace("\\<", "").splitlines()
    assert len(words("x" * 1000)) == 120
