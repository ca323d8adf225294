"""Routing: which token goes to which expert with which weight. Needs torch."""

from moebench.routing.build import route_problem
from moebench.routing.capacity import apply_capacity, capacity_slots
from moebench.routing.routers import route
from moebench.routing.topk import TopK

__all__ = ["TopK", "apply_capacity", "capacity_slots", "route", "route_problem"]
