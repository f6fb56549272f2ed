"""Say what a file is: kind, family, layout, ranks, hashes; nothing in it is executed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from hubtool.cli.amounts import human_size
from hubtool.cli.context import State, json_option, pass_state
from hubtool.cli.errors import describe
from hubtool.cli.facts import facts
from hubtool.cli.output import complain, print_json, show, table
from hubtool.errors import HubtoolError, PartialFailure
from hubtool.hub.refs import is_hub_ref


@click.command()
@click.argument("paths", metavar="FILE...", nargs=-1, required=True)
@json_option
@click.option("--no-hash", is_flag=True, help="Read headers and values, compute no hashes.")
@click.option("--tensors", "with_tensors", is_flag=True, help="List every tensor with dtype and shape.")
@click.option("--refresh", is_flag=True, help="Of hf:// references: read headers again that were read before.")
@pass_state
def command(
    state: State, paths: tuple[str, ...], as_json: bool, no_hash: bool, with_tensors: bool, refresh: bool
) -> None:
    """Say what each FILE is. A folder that is one artifact (PEFT, diffusers) is inspected as one.

    FILE may be hf://owner/name[@revision][/file]: then only headers are read, and nothing is downloaded. One FILE with --json prints one
    object, several FILEs and a repository print a list of objects.
    """
    if len(paths) == 1:
        documents = _documents(paths[0], state.library, no_hash, with_tensors, refresh)
        one_file = len(documents) == 1 and paths[0].endswith(documents[0].get("hub", {}).get("file", ""))
        if one_file and (error := documents[0].get("error")):
            raise error
        _finish(documents, as_json, several=not one_file)
        return
    documents = []
    for path in paths:
        try:
            documents += _documents(path, state.library, no_hash, with_tensors, refresh)
        except HubtoolError as error:
            documents.append({"path": path, "error": error})
    _finish(documents, as_json, several=True)


def _documents(
    path: str, library: str | None, no_hash: bool, with_tensors: bool, refresh: bool
) -> list[dict[str, Any]]:
    """The document of a file, or of every weights file behind a reference. A remote file that is broken has an ``error``."""
    if not is_hub_ref(path):
        return [_inspect(path, no_hash, with_tensors)]
    from hubtool.actions.remote import inspect_remote

    reports = inspect_remote(path, library, refresh=refresh)
    return [{**report.to_json(), "error": report.error} if report.error else report.to_json() for report in reports]


def _finish(documents: list[dict[str, Any]], as_json: bool, several: bool) -> None:
    failed = [document for document in documents if "error" in document]
    for document in failed:
        document["error"] = document["error"].to_json()
    _print(documents, as_json, several)
    if failed:
        raise PartialFailure(f"{len(failed)} of {len(documents)} files could not be inspected")


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
    if "hub" in document:
        show(f"  {'read':11} {human_size(document['hub']['received'])} of it, nothing was downloaded")
    if document.get("library") and "hub" in document:
        show(f"  {'library':11} {document['library']['id']} {' '.join(document['library']['paths'])}".rstrip())
    rows = [
        (item["name"], item["dtype"], "x".join(map(str, item["shape"])) or "scalar")
        for item in document.get("tensor_list", ())
    ]
    if rows:
        show()
        show(table(rows, ("tensor", "dtype", "shape")))
