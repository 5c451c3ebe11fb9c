"""`moegen report`: from files to a page."""

from __future__ import annotations

import pathlib

import click

from ..errors import ReportError
from . import write


@click.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=pathlib.Path), metavar="RESULTS.json...")
@click.option(
    "--out", "folder", type=click.Path(path_type=pathlib.Path), required=True, help="Folder for the page and its figures."
)
def report(results: tuple[pathlib.Path, ...], folder: pathlib.Path) -> None:
    """Turn results of `moegen bench`, records of `moegen tune` and counts of experts into a page with figures.

    \b
    Example:
      moegen report olmoe.json mixtral.json --out report
    """
    for path in results:
        if not path.is_file():
            raise ReportError(f"there is no file {str(path)!r}; `moegen bench ... --json {path}` writes one")
    click.echo(str(write(results, folder)))
