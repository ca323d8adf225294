"""Text in Markdown stays text, in a table, at the beginning of a line and in a block of code."""

import pytest

from moebench.report.markdown_text import code, escaped, left_out, short, table


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("a|b", r"a\|b"),
        ("*x* _y_ `z`", r"\*x\* \_y\_ \`z\`"),
        ("[a](b) ![c](d)", r"\[a\](b) \!\[c\](d)"),
        ("<b>&amp;", r"\<b\>\&amp;"),
        ("see https://x.org www.x.org a@x.org", r"see https\://x.org www\.x.org a\@x.org"),
        (":smile: zipf:1.5 fp8:128", r"\:smile: zipf:1.5 fp8:128"),
        ("$x$ ~~y~~", r"\$x\$ \~\~y\~\~"),
        ("a\n# b\r\n\t| c", r"a \# b \| c"),
        ("- a", r"\- a"),
        ("--- a", r"\--- a"),
        ("12. a", r"12\. a"),
        ("1.31× and -2", "1.31× and -2"),
        ("\u202eabc\x00\x1b[0m", "�abc��\\[0m"),
        ("Größe 數 ×", "Größe 數 ×"),
    ],
)
def test_text_is_no_markup(text, written):
    assert escaped(text) == written


def test_long_text_is_cut_before_it_is_escaped():
    assert short("|" * 1000) == r"\|" * 300 + "…"


@pytest.mark.parametrize("text", ["a", "a\n```\n# b", "`````", ""])
def test_nothing_in_it_ends_a_block_of_code(text):
    first, *lines, last = code(text)
    assert first == f"{last}sh"
    assert not any(line.startswith(last) for line in lines)


def test_a_table_has_a_side_for_each_column():
    assert table(["a", "b", "c"], [["1", "2", "3"]]) == ["| a | b | c |", "| --- | ---: | ---: |", "| 1 | 2 | 3 |"]
    assert table(["a", "b"], [], "ll")[1] == "| --- | --- |"


def test_what_is_left_out_is_counted():
    assert left_out(3, 3, "rows") == []
    assert left_out(3, 1203, "rows") == ["", "1,200 more rows not shown; `results.parquet` has all."]
