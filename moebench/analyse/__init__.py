"""From records to findings: a tidy table, ratios with intervals, CAP scores, verdicts. No torch."""

from moebench.analyse.cap import Axis, Cap, cap, find_baseline
from moebench.analyse.headlines import Headline, headlines
from moebench.analyse.load import Run, load_run, load_runs, records_to_table, write_results
from moebench.analyse.names import name_rows
from moebench.analyse.ratios import paired, ratios
from moebench.analyse.select import NOISE, fronts, pareto, telling_rows

__all__ = [
    "NOISE",
    "Axis",
    "Cap",
    "Headline",
    "Run",
    "cap",
    "find_baseline",
    "fronts",
    "headlines",
    "load_run",
    "load_runs",
    "name_rows",
    "paired",
    "pareto",
    "ratios",
    "records_to_table",
    "telling_rows",
    "write_results",
]
