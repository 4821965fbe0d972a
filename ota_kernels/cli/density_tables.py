"""The tables of `ota-merge densities`, for 100 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..run.grid.groups import NO_LAYER
from ..sizes import format_count

_WIDTH = 100
_LAYER_ROWS = 16
_LAYER_COLUMNS = 12  # grid values that fit beside each other
_HEADINGS = {"embeddings": "embed"}


def show(found: dict) -> None:
    """Print what `ota_kernels.densities` returned."""
    # A table that is cut to a narrow terminal loses digits; one that wraps does not.
    console = Console(width=max(Console().width, _WIDTH), highlight=False)
    passes = "one pass" if found["passes"] == 1 else f"{found['passes']} passes"
    read = f"{format_count(found['elements'])} elements read in {passes}"
    console.print(f"{read}. By role and layer: percent of its edits kept.")
    if found["always_kept"]:
        console.print(
            f"{format_count(found['always_kept'])} elements have no curvature; they are kept by every "
            "density and not counted here."
        )
    for expert in found["experts"]:
        console.print(f"\n[bold]{escape(expert['model'])}[/bold]", soft_wrap=True)
        console.print(_by_density(expert, found["roles"]))
        console.print(_masses(expert))
        for table in _by_layer(expert, found["layers"]):
            console.print()
            console.print(table)


def _table() -> Table:
    return Table(box=None, padding=(0, 0, 0, 1), pad_edge=False)


def _by_density(expert: dict, roles: dict[str, int]) -> Table:
    table = _table()
    for heading in ("density", "kept", "threshold", *(_HEADINGS.get(role, role) for role in roles)):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in expert["densities"]:
        threshold = (
            "-" if row["threshold"] is None else f"{row['threshold']:.9g}"
        )  # float32 survives 9 digits
        shares = (_percent(row["roles"][role], total) for role, total in roles.items())
        table.add_row(f"{row['density']:g}", str(row["kept"]), threshold, *shares)
    return table


def _masses(expert: dict) -> str:
    """One line: share of the saliency, and the density that holds it."""
    first, *others = (f"{row['mass']:g}: {row['density']:.3g}" for row in expert["masses"])
    return ", ".join([f"density of saliency_mass {first}", *others])


def _by_layer(expert: dict, layers: dict[str, int]) -> Iterator[Table]:
    """Rows of layers, neighbours together where there are many; columns of densities."""
    rows = expert["densities"]
    if set(layers) <= {NO_LAYER}:
        return
    for start in range(0, len(rows), _LAYER_COLUMNS):
        part = rows[start : start + _LAYER_COLUMNS]
        table = _table()
        for heading in ("layer", *(f"{row['density']:g}" for row in part)):
            table.add_column(heading, justify="right", no_wrap=True)
        for names in _grouped([name for name in layers if name != NO_LAYER]):
            total = sum(layers[name] for name in names)
            shares = (_percent(sum(row["layers"][name] for name in names), total) for row in part)
            table.add_row(names[0] if len(names) == 1 else f"{names[0]}-{names[-1]}", *shares)
        if NO_LAYER in layers:
            shares = (_percent(row["layers"][NO_LAYER], layers[NO_LAYER]) for row in part)
            table.add_row(NO_LAYER, *shares)
        yield table


def _grouped(names: Sequence[str]) -> list[Sequence[str]]:
    """At most _LAYER_ROWS groups of neighbours."""
    size = -(-len(names) // _LAYER_ROWS)
    return [names[start : start + size] for start in range(0, len(names), max(size, 1))]


def _percent(kept: int, total: int) -> str:
    """At most 4 characters: "100", "34.5", "0.12", "<.01"."""
    if total == 0:
        return "-"
    share = 100 * kept / total
    if kept == total or share >= 99.95:
        return "100" if kept == total else "99.9"
    if kept and share < 0.005:
        return "<.01"
    return f"{share:.1f}" if share >= 9.995 else f"{share:.2f}"
