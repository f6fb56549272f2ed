"""Say what a file is: kind, family, layout, ranks, hashes; nothing in it is executed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from hubtool.cli.context import json_option
from hubtool.cli.errors import describe
from hubtool.cli.facts import facts
from hubtool.cli.output import complain, print_json, show, table
from hubtool.errors import HubtoolError, PartialFailure


@click.command()
@click.argument("paths", metavar="FILE...", nargs=-1, required=True)
@json_option
@click.option("--no-hash", is_flag=True, help="Read headers and values, compute no hashes.")
@click.option("--tensors", "with_tensors", is_flag=True, help="List every tensor with dtype and shape.")
def command(paths: tuple[str, ...], as_json: bool, no_hash: bool, with_tensors: bool) -> None:
    """Say what each FILE is. A folder that is one artifact (PEFT, diffusers) is inspected as one.

    One FILE with --json prints one object, several print a list of objects.
    """
    if len(paths) == 1:
        _print([_inspect(paths[0], no_hash, with_tensors)], as_json, several=False)
        return
    documents = []
    failures = 0
    for path in paths:
        try:
            documents.append(_inspect(path, no_hash, with_tensors))
        except HubtoolError as error:
            failures += 1
            documents.append({"path": path, "error": error.to_json()})
    _print(documents, as_json, several=True)
    if failures:
        raise PartialFailure(f"{failures} of {len(paths)} files could not be inspected")


def _inspect(path: str, no_hash: bool, with_tensors: bool) -> dict[str, Any]:
    from hubtool.actions.inspect import inspect

    report = inspect(path, hashes=not no_hash)
    listed = [{"name": ref.name, "dtype": ref.dtype, "shape": list(ref.shape)} for ref in report.file.tensors.values()]
    return {**report.to_json(), "tensor_list": listed} if with_tensors else report.to_json()


def _print(documents: list[dict[str, Any]], as_json: bool, several: bool) -> None:
    if as_json:
        print_json(documents if several else documents[0])
        return
    for at, document in enumerate(documents):
        if at:
            show()
        _print_one(document)


def _print_one(document: Mapping[str, Any]) -> None:
    if "error" in document:
        error = document["error"]
        complain(
            describe(HubtoolError(error["message"], path=document["path"], offset=error["offset"])), heading="error"
        )
        return
    show(facts(document))
    rows = [
        (item["name"], item["dtype"], "x".join(map(str, item["shape"])) or "scalar")
        for item in document.get("tensor_list", ())
    ]
    if rows:
        show()
        show(table(rows, ("tensor", "dtype", "shape")))
