"""The sizes of the grid's files, of every way to compress a cell. Used by `grid_tables.py`."""

from grid import ARCHIVE_VERSION
from grid_plan import cell_name

KINDS = ("packed", "archive", "smallest", "tflite")


def size_lines(table):
    """The table for readers: bits per weight and whole files, of what was compressed with and without training."""
    lines = [
        "Bits per compressed weight with its scale, mask and zero point; whole files in bytes and per cent of FP32. "
        "†: an archive of version 2 of the packed format, larger than one of today.",
        "",
        "| | way | bits/weight | packed | archive | smallest | .tflite |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for cell in table:
        lines += [
            f"| {' | '.join([cell_name(cell['bits'], cell['pattern']), name, *columns(*files)])} |"
            for name, files in ways(cell).items()
        ]
    return lines


def ways(cell):
    """Return `{name of a way: (bits per weight, bytes, whether its archive is of today's version)}` of one cell."""
    untrained, found = cell["untrained"] or {}, {}
    for kind in ("plain", "chosen"):
        files = untrained.get(kind, {}).get("files")
        if files:
            name = f"no training, {untrained[kind]['way']}"
            found[name] = (files["bits_per_weight"], files["bytes"], True)
    for way in (cell.get("paper"), cell.get("ours")):
        if way:
            name = "the paper's way" if way["recipe"] == "paper" else way["recipe"]
            found[name] = (way["bits_per_weight"], way["bytes"], way["archive_version"] == ARCHIVE_VERSION)
    return found


def columns(bits_per_weight, sizes, new):
    """One way, as cells of the table."""
    found = [f"{sizes[kind]:,} ({sizes[kind] / sizes['float32']:.1%})" if kind in sizes else "-" for kind in KINDS]
    found[1] += "" if new else " †"
    return [f"{bits_per_weight:.2f}", *found]
