"""The shipped suites, importable also from a checkout that is not installed."""

import importlib.util
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "suites"

if importlib.util.find_spec("moebench_suites") is None:
    place = importlib.util.spec_from_file_location(
        "moebench_suites", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    package = importlib.util.module_from_spec(place)
    sys.modules["moebench_suites"] = package
    place.loader.exec_module(package)
