"""Print the completion script for a shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from hubtool.cli.output import raw


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print the completion script for SHELL.

    \b
    bash:  eval "$(hubtool completion bash)"
    zsh:   eval "$(hubtool completion zsh)"
    fish:  hubtool completion fish | source
    """
    script = get_completion_class(shell)
    if script is None:
        raise click.UsageError(f"no completion for {shell}")
    raw(script(context.find_root().command, {}, "hubtool", "_HUBTOOL_COMPLETE").source() + "\n")
