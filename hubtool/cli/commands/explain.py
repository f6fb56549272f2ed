"""Show the evidence for what a file is taken to be, which programs read it with which defect, and what to do."""

from __future__ import annotations

import click

from hubtool.cli.context import State, json_option, pass_state


@click.command()
@click.argument("ref", metavar="FILE|REF")
@json_option
@pass_state
def command(state: State, ref: str, as_json: bool) -> None:
    """Show how hubtool came to its conclusions about FILE, or about REF of the library.

    The seven axes of an adapter's layout with a key for each; what decides its family; what the metadata claims beside what the tensors
    show (where they differ, the tensors win); which programs read the file, and with which defect; and the command that mends it.
    """
    from hubtool.actions.explain import explain
    from hubtool.actions.refs import locate
    from hubtool.cli.explaining import draw
    from hubtool.cli.output import print_json

    document = explain(locate(ref, state.library)).to_json()
    if as_json:
        print_json(document)
    else:
        draw(document)
