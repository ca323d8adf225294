"""What of asv's regressions is news, told on made-up sites; and what asv makes of our numbers."""

from __future__ import annotations

import json
import math

import pytest
from moebench_suites.regressions import Regression, news, remember

CASE = "nightly.Latency.track_device('layer')"
GRAPH = "graphs/machine-straw/nightly.Latency.track_device.json"
COMMITS = ["c0", "c1", "c2", "c3", "c4"]


class History:
    """A site with one case, its steps, and the quartiles of each night."""

    def __init__(self, folder):
        self.site, self.results, self.told = folder / "html", folder / "results", folder / "results" / "told.jsonl"
        for path in (self.site, self.results / "straw"):
            path.mkdir(parents=True)

    def publish(self, nights, steps):
        """`nights`: (low, high) of each commit, or null for a gap; `steps`: (last good, first bad) revisions."""
        known = {str(revision): commit for revision, commit in enumerate(COMMITS[: len(nights)])}
        benchmarks = {"nightly.Latency.track_device": {"unit": "ms"}}
        self._write(self.site / "index.json", {"revision_to_hash": known, "benchmarks": benchmarks})
        told = [[CASE, GRAPH, {}, 0, 3.0, 1.0, [[good, bad, 1.0, 3.0] for good, bad in steps]]] if steps else []
        self._write(self.site / "regressions.json", {"regressions": told})
        for commit, quartiles in zip(COMMITS, nights, strict=False):
            self._write(self.results / "straw" / f"{commit}-x.json", self._night(commit, quartiles))

    def _night(self, commit, quartiles):
        low, high = quartiles or (None, None)
        columns = ["result", "params", "stats_q_25", "stats_q_75"]
        values = [[math.nan if low is None else (low + high) / 2], [["'layer'"]], [low], [high]]
        return {
            "commit_hash": commit, "params": {"machine": "straw"}, "result_columns": columns,
            "results": {"nightly.Latency.track_device": values},
        }  # fmt: skip

    def _write(self, path, value):
        path.write_text(json.dumps(value))

    def night(self, head, nights, steps):
        """[(first bad commit, whether clear)], and what is clear is remembered."""
        self.publish(nights, steps)
        found = news(self.site, self.results, self.told, head)
        remember(self.told, [each for each in found if each.clear], head)
        return [(each.commit, each.clear) for each in found]


@pytest.fixture
def history(tmp_path):
    return History(tmp_path)


GOOD, BAD, WORSE = (0.9, 1.1), (2.9, 3.1), (8.9, 9.1)


def test_what_was_told_is_no_news_the_next_night(history):
    assert history.night("c0", [GOOD], []) == []
    assert history.night("c1", [GOOD, BAD], [(0, 1)]) == [("c1", True)]
    assert history.night("c1", [GOOD, BAD], [(0, 1)]) == [("c1", True)], "the same night again"
    assert history.night("c2", [GOOD, BAD, BAD], [(0, 1)]) == []
    assert len(history.told.read_text().splitlines()) == 1


def test_a_second_step_of_the_same_case_is_news(history):
    history.night("c1", [GOOD, BAD], [(0, 1)])
    assert history.night("c2", [GOOD, BAD, WORSE], [(0, 1), (1, 2)]) == [("c2", True)]


def test_one_that_comes_back_after_it_was_mended_is_news(history):
    history.night("c1", [GOOD, BAD], [(0, 1)])
    assert history.night("c2", [GOOD, BAD, GOOD], []) == []
    assert history.night("c3", [GOOD, BAD, GOOD, BAD], [(2, 3)]) == [("c3", True)]


def test_a_step_that_stands_out_a_night_later_is_told_then(history):
    assert history.night("c1", [GOOD, BAD], []) == []
    assert history.night("c2", [GOOD, BAD, BAD], [(None, 1)]) == [("c1", True)]
    assert history.night("c3", [GOOD, BAD, BAD, BAD], [(None, 1)]) == []


def test_nights_that_overlap_are_unsure_and_stay_open(history):
    wide = (1.0, 3.0)
    assert history.night("c1", [GOOD, wide], [(0, 1)]) == [("c1", False)]
    assert not history.told.exists()
    assert history.night("c2", [GOOD, wide, BAD], [(0, 1)]) == [("c1", True)]


def test_a_gap_is_no_night(history):
    assert history.night("c2", [GOOD, None, BAD], [(0, 2)]) == [("c2", True)]


def test_the_newest_night_is_the_last_with_a_number(history):
    assert history.night("c3", [GOOD, (0.9, 4.0), BAD, None], [(1, 2)]) == [("c2", False)]


def test_another_machines_nights_say_nothing(history):
    history.publish([(0.9, 4.0), BAD], [(0, 1)])
    path = history.results / "straw" / "c0-x.json"
    path.write_text(path.read_text().replace('"straw"', '"other"'))
    assert [each.clear for each in news(history.site, history.results, history.told, "c1")] == [True]


def test_a_line_says_what_it_was_what_it_is_and_since_when():
    from moebench_suites.run_nightly import line

    found = Regression(GRAPH, CASE, 1.0, 3.0, "ms", None, "0123456789abcdef", 7, True)
    assert line(found) == f"{CASE}: 1 -> 3 ms (+200 %), since 0123456789"
    late = found._replace(before=0.0, last_good="fedcba9876543210")
    assert line(late) == f"{CASE}: 0 -> 3 ms, since 0123456789, after fedcba9876"
