"""Which conversion would make which host read an adapter: each layout is emitted (names only, no numbers) and judged by the hosts table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hubtool.adapters.ir import Adapter
from hubtool.errors import HubtoolError
from hubtool.layouts import hosts, tables
from hubtool.layouts.hosts import Host, Verdict
from hubtool.layouts.hosts_facts import of_emission
from hubtool.layouts.parse import Parsed
from hubtool.ops.adapters import spelled
from hubtool.ops.promotion import promote


@dataclass(frozen=True, slots=True)
class Remedy:
    """One conversion and the hosts that read its output without a known defect. ``rank``: the highest rank that ``as_lora`` costs, else None."""

    layout: str
    as_lora: bool
    hosts: tuple[Host, ...]
    rank: int | None = None


def remedies(parsed: Parsed, now: tuple[Verdict, ...]) -> tuple[Remedy, ...]:
    """Remedies for the hosts that do not read the file whole, or of which that is not known: the one that helps most of them first; no host twice."""
    wanting = {verdict.host.id for verdict in now if verdict.reads != "yes"}
    tried = list(_tried(parsed)) if wanting else []
    chosen = []
    while wanting and tried:
        best = max(tried, key=lambda one: (_helped(one, wanting), not one.as_lora))
        helped = tuple(host for host in best.hosts if host.id in wanting)
        if not helped:
            break
        chosen.append(Remedy(best.layout, best.as_lora, helped, best.rank))
        wanting -= {host.id for host in helped}
        tried.remove(best)
    return tuple(chosen)


def _helped(remedy: Remedy, wanting: set[str]) -> int:
    return sum(host.id in wanting for host in remedy.hosts)


def _tried(parsed: Parsed) -> Iterator[Remedy]:
    """Every layout of the table, as the adapter is and rewritten as LoRA, that loses nothing."""
    forms = [(parsed.adapter, False, None), *_promoted(parsed.adapter)]
    for adapter, as_lora, rank in forms:
        for layout in hosts.table().layouts:
            readers = _readers(adapter, layout, parsed, same=not as_lora)
            if readers:
                yield Remedy(layout, as_lora, readers, rank)


def _promoted(adapter: Adapter) -> Iterator[tuple[Adapter, bool, int | None]]:
    made = promote(adapter, "lora")
    if made.promotions and not made.refused:
        yield made.adapter, True, max(one.rank_after for one in made.promotions)


def _readers(adapter: Adapter, layout: str, parsed: Parsed, *, same: bool) -> tuple[Host, ...]:
    """The hosts that would read the adapter in ``layout`` without a known defect; none where it cannot be written without loss."""
    families = (adapter.family,) if adapter.family else parsed.candidates
    try:
        if same and str(tables.layout(layout, families[0] if families else None)) == str(parsed.layout):
            return ()
        emission = spelled(adapter, layout, parsed, None)
    except HubtoolError:
        return ()
    if emission.losses:
        return ()
    judged = hosts.verdicts(of_emission(adapter, emission, tuple(families)))
    return tuple(verdict.host for verdict in judged if verdict.reads == "yes")
