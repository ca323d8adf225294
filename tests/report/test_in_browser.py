"""The page in a real browser: quiet, offline, sortable, filterable, linkable, in both themes, on any screen."""

import pytest
from report.synthetic import HOSTILE

pytestmark = pytest.mark.browser

EXTREME = {1: "min", -1: "max"}
BODY = "[...document.querySelectorAll('#table tbody tr')]"


def column(page, title):
    """Texts of a column of the drawn rows."""
    heads = page.js("[...document.querySelectorAll('#table thead th')].map((th) => th.innerText.trim())")
    place = next(at for at, head in enumerate(heads) if head.startswith(title))
    return page.js(f"{BODY}.map((tr) => tr.cells[{place}].innerText)")


def sort(page, title):
    heads = "[...document.querySelectorAll('#table thead button')]"
    page.js(f"{heads}.find((head) => head.innerText.startsWith(arguments[0])).click()", title)


def in_ms(text):
    if text == "—":
        return None
    value, unit = text.split()[:2]
    return float(value.replace(",", "")) * {"s": 1e3, "ms": 1, "µs": 1e-3}[unit]


@pytest.mark.parametrize(("name", "dark"), [("quick", False), ("full", True), ("hostile", False), ("many", True)])
def test_no_console_message_and_no_request_but_the_file(page, pages, name, dark):
    page.open(pages[name], dark=dark)
    page.settle()
    assert page.console() == []
    asked = page.requests()
    assert pages[name].as_uri() in asked
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:", "chrome:", "about:"))] == []
    assert [url for url in asked if url.startswith("file:")] == [pages[name].as_uri()]


def test_the_network_guard_can_fail(page, pages, tmp_path):
    leaky = tmp_path / "leaky.html"
    text = pages["quick"].read_text(encoding="utf-8").replace("default-src 'none'; ", "")
    leaky.write_text(text.replace("<main", "<img src='http://localhost:9/x.png'><main", 1), encoding="utf-8")
    page.open(leaky)
    assert any(url.startswith("http://localhost:9") for url in page.requests())
    assert page.console() != []


def test_every_chart_is_drawn_or_says_why_not(page, pages):
    page.open(pages["full"])
    page.settle()
    drawn = page.js("[...document.querySelectorAll('.chart')].map((c) => Boolean(c.querySelector('.main-svg')))")
    assert drawn == [True] * 7
    page.open(pages["quick"])
    page.settle()
    empty = page.js("[...document.querySelectorAll('.charts figure.bare .empty')].map((p) => p.innerText)")
    assert len(empty) == 2
    assert "no price is known" in empty[0]
    assert "timed no stages" in empty[1]


def test_each_chart_has_words_for_those_who_cannot_see_it(page, pages):
    page.open(pages["full"])
    page.settle()
    said = page.js("[...document.querySelectorAll('[role=img]')].map((c) => c.getAttribute('aria-label'))")
    assert len(said) == 7
    assert all(len(text) > 40 for text in said)
    assert "Fastest at 1: " in " ".join(said)
    assert page.js("[...document.querySelectorAll('figure')].every((f) => f.querySelector('figcaption').innerText)")


def test_sorting_goes_by_number_both_ways_with_missing_last(page, pages):
    page.open(pages["many"])
    for direction, sign in (("ascending", 1), ("descending", -1)):
        sort(page, "Latency")
        assert page.js("document.querySelector('#table th[aria-sort]:not([aria-sort=none])').ariaSort") == direction
        found = [in_ms(text) for text in column(page, "Latency")]
        values = [value for value in found if value is not None]
        assert len(values) > 50
        assert [sign * value for value in values] == sorted(sign * value for value in values)
        extreme = page.js(
            "(f => f(...field('latency_ms').filter((ms) => ms !== null)))(Math[arguments[0]])", EXTREME[sign]
        )
        assert values[0] == pytest.approx(extreme, rel=0.01)
    page.open(pages["quick"])
    for _ in range(2):
        sort(page, "Latency")
        found = column(page, "Latency")
        assert len(found) == 30
        assert [text == "—" for text in found] == [False] * 26 + [True] * 4


def test_sorting_by_keyboard(page, pages):
    from selenium.webdriver.common.keys import Keys

    page.open(pages["quick"])
    button = page.driver.find_element("css selector", "#table th[data-key=tokens] button")
    button.send_keys(Keys.ENTER, Keys.ENTER)
    assert column(page, "Tokens")[0] == "256"


def test_filters_narrow_the_rows_and_clear(page, pages):
    page.open(pages["quick"])
    find = page.driver.find_element("id", "find")
    find.send_keys("GROUPED")
    assert page.js(f"{BODY}.length") == 3
    assert page.js("document.getElementById('count').innerText") == "3 of 30 rows"
    page.js(
        "(() => { const s = document.querySelector('#selects [name=tokens]'); s.value = '16';"
        " s.dispatchEvent(new Event('input', { bubbles: true })); })()"
    )
    assert column(page, "Tokens") == ["16"]
    page.driver.find_element("id", "clear").click()
    assert page.js(f"{BODY}.length") == 30
    find.send_keys("slow arm left out")
    assert column(page, "Status") == ["skipped"]


def test_a_link_reaches_a_row_that_was_not_drawn_yet(page, pages):
    page.open(pages["many"])
    assert page.js(f"{BODY}.length") < 200
    last = page.js("field('anchor')[2900]")
    page.open(pages["many"], anchor=f"#{last}")
    assert page.js("document.getElementById(arguments[0]).className", last) == "arm target"
    box = page.js("document.getElementById(arguments[0]).getBoundingClientRect().toJSON()", last)
    assert 0 <= box["top"] < box["bottom"] <= 900
    assert page.js(f"{BODY}.length") < 300
    plain = page.js(f"getComputedStyle({BODY}[1].cells[1]).backgroundColor")
    marked = page.js("getComputedStyle(document.getElementById(arguments[0]).cells[1]).backgroundColor", last)
    assert plain != marked
    page.js("document.querySelector('#table .earlier button').click()")
    drawn = page.js(f"{BODY}.filter((tr) => tr.id).map((tr) => tr.id)")
    assert drawn == page.js("field('anchor').slice(2750, 2750 + arguments[0])", len(drawn))


def test_a_link_to_a_filtered_row_clears_the_filter_and_a_lost_one_says_so(page, pages):
    page.open(pages["quick"])
    page.driver.find_element("id", "find").send_keys("torch-dense")
    page.js("(location.hash = '#' + document.querySelector('#table a.anchor').hash.slice(1))")
    other = page.js("field('anchor')[0]")
    page.js("(location.hash = arguments[0])", other)
    page.driver.implicitly_wait(2)
    assert "target" in page.driver.find_element("id", other).get_attribute("class")
    page.open(pages["quick"], anchor="#gone")
    assert "Row gone is not among the rows" in page.js("document.getElementById('lost').innerText")


def test_scrolling_draws_more_rows(page, pages):
    page.open(pages["many"])
    before = page.js(f"{BODY}.length")
    page.js("(document.getElementById('table-scroll').scrollTop = 1e6)")
    page.driver.execute_async_script("setTimeout(arguments[0], 200)")
    assert page.js(f"{BODY}.length") > before


def test_a_row_opens_to_everything_known_about_it(page, pages):
    page.open(pages["quick"], anchor="#r1-b0-olmoe-1b-7b-16-fp32-torch-bmm")
    opener = page.driver.find_element("css selector", "#table tr.target .open")
    before = opener.location
    opener.click()
    page.driver.execute_async_script("setTimeout(arguments[0], 200)")
    assert opener.location == before
    text = page.js("document.querySelector('#table .detail').innerText")
    for fact in ("perf_counter", "provider version", "block id", "rounds"):
        assert fact in text
    opener.click()
    assert page.js("document.querySelector('#table .detail')") is None


def test_a_variant_can_be_hidden_from_the_charts(page, pages):
    page.open(pages["quick"])
    page.settle()
    count = "document.querySelector('[data-chart=latency]').data.length"
    before = page.js(count)
    page.js("document.querySelector('#legend button').click()")
    assert page.js(count) == before - 1


def test_themes_follow_the_system_and_the_button(page, pages):
    background = "getComputedStyle(document.body).backgroundColor"
    ink = "getComputedStyle(document.querySelector('[data-chart=latency] .xtick text')).fill"
    page.open(pages["quick"])
    page.js("localStorage.clear()")
    seen = {}
    for dark in (False, True):
        page.open(pages["quick"], dark=dark)
        page.settle()
        seen[dark] = page.js(background), page.js(ink)
    assert seen[False][0] != seen[True][0]
    assert seen[False][1] != seen[True][1]
    page.driver.find_element("id", "theme").click()
    assert (page.js(background), page.js(ink)) == seen[False]
    page.open(pages["quick"], dark=True)
    assert page.js(background) == seen[False][0]
    page.js("localStorage.clear()")


@pytest.mark.parametrize("name", ["quick", "full", "hostile"])
def test_no_screen_scrolls_sideways(page, pages, name):
    page.open(pages[name], width=360)
    page.settle()
    page.js("document.querySelector('#table .open').click()")
    for width in (360, 390, 768, 1600):
        page.screen(width)
        page.driver.execute_async_script("setTimeout(arguments[0], 250)")
        assert page.js("[document.documentElement.scrollWidth, window.innerWidth]") == [width, width]


def test_hostile_text_stays_text(page, pages):
    page.open(pages["hostile"])
    page.settle()
    assert page.js("document.querySelectorAll('img, [onerror], iframe, object').length") == 0
    assert page.js("document.scripts.length") == 6
    assert HOSTILE in page.js("document.body.innerText")
    for place in ("h1", "#notes", "#manifest pre", "#table"):
        assert HOSTILE in page.js("document.querySelector(arguments[0]).textContent", place), place
    assert page.js("document.querySelector('#manifest').textContent").count(HOSTILE) >= 3


def test_hostile_names_reach_plotly_as_text(page, pages):
    page.open(pages["hostile"])
    assert page.js("plain('<b>x</b><a href=y>&lt;')") == "&lt;b&gt;x&lt;/b&gt;&lt;a href=y&gt;&amp;lt;"
    page.settle()
    assert page.js("document.querySelectorAll('.chart a').length") == 0
