"""Runs without a worker's start: the crew of straw."""

import pytest
from pipeline.stand_in import Crew


@pytest.fixture
def crew(monkeypatch):
    """What `run_suite` starts instead of worker processes."""
    crew = Crew()
    monkeypatch.setattr("moebench.run.Remote", crew.start)
    return crew
