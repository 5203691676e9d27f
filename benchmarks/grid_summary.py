"""The tables of README.md and docs/results.md about the commands, from what `grid_tables.py` wrote.

    python benchmarks/grid_summary.py     # writes them between the marks in both pages

README.md has the rows of `SHORT`, docs/results.md every recipe with three seeds and the paper's way.
"""

import json
import os

from grid import ARCHIVE_VERSION, RESULTS, ROOT
from grid_comparisons import ENOUGH_SEEDS, described_change
from grid_plan import cell_name

CELLS = (
    (None, None), (4, "4:8"), (4, "2:4"), (4, "1:4"), (3, None), (3, "4:8"), (3, "1:4"), (2, None), (2, "2:4"),
)  # fmt: skip
SHORT = {  # what README.md shows of a cell: recipe, and whether it is read from the smallest archive
    (None, None): {("paper", False)},
    (4, "2:4"): {("paper", False), ("settled", False), ("gentle", False)},
    (4, "1:4"): {("paper", False), ("distilled", True)},
    (3, None): {("settled", False), ("distilled", False)},
    (3, "4:8"): {("settled", False)},
    (2, None): {("paper", False), ("learned", False), ("learned, distilled", False)},
    (2, "2:4"): {("paper", False), ("four levels", False), ("learned, distilled", True)},
}
NAMES = {
    "paper": "the paper's way",
    "learned": "learned scales",
    "learned, distilled": "learned scales, distilled",
}
NUMBERS = "no one two three four five six seven eight nine ten eleven twelve".split()
MARKS = "<!-- made by benchmarks/grid_summary.py -->\n\n", "\n\n<!-- end -->"


def compared(way, name):
    """One of the comparisons of a recipe with, where it has its own, the number of its seeds."""
    found = way["comparisons"].get(name)
    if not found:
        return ""
    return described_change(found) + (f", {NUMBERS[len(found['seeds'])]}" if "seeds" in found else "")


def archive(way, small):
    """Share of FP32 of the archive from which the texts were read."""
    kind, old = "smallest" if small else "archive", way["archive_version"] != ARCHIVE_VERSION
    return f"{way['bytes'][kind] / way['bytes']['float32']:.1%}{' †' * old}"


COLUMNS = {
    "test WER": lambda way, small: f"{way['test_wer']:.2%}",
    "change, same seeds": lambda way, small: described_change(way) if "interval" in way else "",
    "other seeds, too": lambda way, small: compared(way, "seeds drawn"),
    "to the paper's way": lambda way, small: compared(way, "paper"),
    "to float, taught": lambda way, small: compared(way, "taught"),
    "archive": archive,
}


def row(name, way, small, columns):
    """One recipe of a cell, as a line of the table."""
    title = f"{name}, {NAMES.get(way['recipe'], way['recipe'])}{', *smallest*' * small}"
    if name == "float" and way["recipe"] == "paper":
        title = "float, the control"
    cells = [title, NUMBERS[len(way["seeds"])], *(COLUMNS[column](way, small) for column in columns)]
    return f"| {' | '.join(cells)} |"


def untrained_row(name, cell, columns):
    """What a cell has without training, against the float model that was compressed, as a line of the table."""
    best, plain = cell["chosen"], cell["plain"]["wer"]
    found = {"test WER": f"{best['wer']:.2%} ({plain:.2%})"}
    if "bytes" in best:
        found["archive"] = archive(best, False)
    if "interval" in best:  # it says something else than the float model
        found["change, same seeds"] = described_change(best)
    return f"| {name}, no training | | {' | '.join(found.get(column, '') for column in columns)} |"


def ways_of(cell):
    """Yield what was trained in a cell: each recipe with enough seeds, then the same from its smallest archive."""
    for way in (cell.get("paper"), cell.get("ours"), *cell.get("others", ())):
        if way and (len(way["seeds"]) >= ENOUGH_SEEDS or way["recipe"] == "paper"):
            yield way, False
            yield from ((few, True) for few in cell.get("smallest", ()) if few["recipe"] == way["recipe"])


def lines_of(table, columns=tuple(COLUMNS), chosen=None):
    """The table for readers: of each cell without training, then its recipes, all of them or the chosen ones."""
    lines = [f"| | seeds | {' | '.join(columns)} |", f"|---|---|{'---|' * (len(columns) - 1)}--:|"]
    found = {(cell["bits"], cell["pattern"]): cell for cell in table}
    for key in CELLS if chosen is None else chosen:
        cell, name = found[key], cell_name(*key).removesuffix(" dense")
        if name != "float":
            lines.append(untrained_row(name, cell["untrained"], columns))
        for way, small in ways_of(cell):
            if chosen is None or (way["recipe"], small) in chosen[key]:
                lines.append(row(name, way, small, columns))
    return "\n".join(lines)


def pages():
    """Return `{path: text}` of the two pages with the tables of today's results in them."""
    with open(os.path.join(RESULTS, "grid_asc_connected.json")) as file:
        table = json.load(file)
    short = lines_of(table, ("test WER", "change, same seeds", "other seeds, too", "archive"), SHORT)
    found = {}
    for path, lines in {"README.md": short, "docs/results.md": lines_of(table)}.items():
        with open(os.path.join(ROOT, path)) as file:
            before, rest = file.read().split(MARKS[0])
        found[path] = before + MARKS[0] + lines + MARKS[1] + rest.split(MARKS[1])[1]
    return found


def main():
    """Write both pages."""
    from keras_usm_lite.data.manifest import replacing

    for path, text in pages().items():
        with replacing(os.path.join(ROOT, path)) as temporary, open(temporary, "w") as file:
            file.write(text)


if __name__ == "__main__":
    main()
