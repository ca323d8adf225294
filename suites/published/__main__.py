"""Rewrite the published tables, or say which of them are stale.

    python -m moebench_suites.published [--check] [--reports DIR]

Exit codes: 0 all is fresh, 1 `--check` found a stale block, 2 a run or a page is broken.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import click
from moebench_suites.published import headline, index, mixtral, pages, runs, target_table, verdicts

STALE = 1
README, REPORTS, NOTES = Path("README.md"), Path("reports/README.md"), Path("docs/kernel-notes.md")


class Broken(click.ClickException):
    """A run or a page that cannot be used: one line."""

    exit_code = 2


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit with 1 if a table is stale.")
@click.option(
    "--reports", type=click.Path(path_type=Path), default=Path("reports"), show_default=True,
    help="The folder of published runs.",
)  # fmt: skip
def main(check: bool, reports: Path) -> None:
    """Rewrite the tables of README.md, reports/README.md and docs/kernel-notes.md from the published runs.

    Run it at the top of a checkout.
    """
    try:
        fresh = blocks(reports)
        stale = {page: pages.stale(page, texts) for page, texts in fresh.items()}
        if not check:
            write(fresh, stale)
    except (ValueError, OSError) as error:
        raise Broken(str(error)) from None
    for page, names in stale.items():
        for name in names:
            click.echo(f"{page}: {name} is stale; `make published` writes it anew" if check else f"{page}: {name}")
    sys.exit(STALE if check and any(stale.values()) else 0)


def blocks(reports: Path) -> dict[Path, dict[str, str]]:
    """Page -> the name and the text of each of its blocks.

    Raises:
        ValueError: a folder under `reports` is no run, or is damaged; or targets.toml is broken.
    """
    published = runs.read_published(reports)
    return {
        README: {"headline": headline.headline_block(published, README.parent)},
        REPORTS: {
            "index": index.index_block(published, REPORTS.parent),
            "layer": headline.layer_block(published),
            "mixtral": mixtral.mixtral_block(published),
        },
        NOTES: {"targets": verdicts.targets_block(published, target_table.read_targets())},
    }


def write(fresh: Mapping[Path, Mapping[str, str]], stale: Mapping[Path, list[str]]) -> None:
    """Write the pages that have stale blocks; all of them were found sound before."""
    texts = {page: pages.rewritten(page, fresh[page]) for page, names in stale.items() if names}
    for page, text in texts.items():
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
