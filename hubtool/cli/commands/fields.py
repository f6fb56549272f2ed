"""List the fields that queries know."""

from __future__ import annotations

import click

from hubtool.cli.context import format_option
from hubtool.cli.output import listing
from hubtool.errors import UsageProblem


@click.command()
@format_option
def command(fmt: str) -> None:
    """List the fields of the query language of ls: name, type, how a value is written."""
    from hubtool.actions.catalogue import list_fields

    if fmt == "paths":
        raise UsageProblem("fields have no paths", hint="--format table, json, ndjson or csv")
    listing(list_fields(), ("field", "type", "help", "aliases"), fmt)
