"""Routing: which token goes to which expert with which weight. Needs torch."""

from moebench.routing.build import route_problem
from moebench.routing.capacity import apply_capacity, capacity_slots
from moebench.routing.forms import Mix, Ragged, Routing, TopK
from moebench.routing.route import decide, make_scores, route
from moebench.routing.scores import Scores, Side

__all__ = [
    "Mix", "Ragged", "Routing", "Scores", "Side", "TopK", "apply_capacity", "capacity_slots", "decide", "make_scores",
    "route", "route_problem",
]  # fmt: skip
