"""The sizes of the grid's files, of every way to compress a cell. Used by `grid_tables.py` and `grid_plot.py`."""

from grid import ARCHIVE_VERSION
from grid_plan import cell_name

KINDS = ("packed", "archive", "smallest", "tflite")


def sizes_of(rows):
    """The bytes of the files of one of several seeds, of one whose archive is of today's version if there is any."""
    row = max(rows, key=lambda row: row.get("archive_version", 0))
    version = row.get("archive_version", 2)
    return {"bytes": row["bytes"], "archive_version": version, "bits_per_weight": row["bits_per_weight"]}


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
        name = cell_name(cell["bits"], cell["pattern"])
        lines += [f"| {' | '.join([name, title, *columns(way)])} |" for title, way in ways(cell).items()]
    return lines


def ways(cell):
    """Return `{title: what has bytes, bits_per_weight and archive_version}` of one cell of the table."""
    found = {}
    for kind in ("plain", "chosen"):
        way = (cell["untrained"] or {}).get(kind, {})
        if "bytes" in way:  # earlier results have none
            found[f"no training, {way['way']}"] = way
    for way in (cell.get("paper"), cell.get("ours")):
        if way:
            found["the paper's way" if way["recipe"] == "paper" else way["recipe"]] = way
    return found


def columns(way):
    """Bits per weight and files of one way, as cells of the table."""
    sizes = way["bytes"]
    found = [f"{sizes[kind]:,} ({sizes[kind] / sizes['float32']:.1%})" if kind in sizes else "-" for kind in KINDS]
    found[1] += "" if way["archive_version"] == ARCHIVE_VERSION else " †"
    return [f"{way['bits_per_weight']:.2f}", *found]
