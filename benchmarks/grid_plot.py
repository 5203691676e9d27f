"""The frontier of the grid: dev error rate against the size of the archive. Used by `grid_tables.py`."""

import statistics

from grid import ARCHIVE_VERSION
from grid_comparisons import ENOUGH_SEEDS
from grid_plan import BITS, CONTROL, cell_name
from grid_sizes import sizes_of

UNTRAINED, PAPER, OURS = "no training, the best way", "the paper's way", "ours"
WAYS = {UNTRAINED: "s", PAPER: "o", OURS: "^"}  # and their marks
TOP = 1.35  # of the plot, as a multiple of the control's error rate: what is worse than that is not shown
PLACES = ((0, 9), (0, -14), (24, 5), (-24, 5), (24, -10), (-24, -10), (0, 20), (0, -25), (40, 14), (-40, 14))


def points(cells, best, untrained):
    """Return what the plot shows of every cell.

    Args:
        cells: `{(bits, pattern, recipe): rows}`.
        best: function from bits and pattern to the key of "ours", or None.
        untrained: `{(bits, pattern): cell}` of `post_training_grid.py`.

    Returns:
        A list of dicts: `cell` (bits, pattern), `way` (of `WAYS`, or None for any other recipe), `share` (archive, % of
        FP32), `errors` (dev, %, one for each seed), `old` (the archive is of an earlier version).
    """
    found = []
    for cell, result in untrained.items():
        if "bytes" in result["chosen"]:
            found.append(point_of(cell, UNTRAINED, result["chosen"], [result["chosen"]["dev_wer"]]))
    for (*cell, recipe), rows in cells.items():
        way = PAPER if recipe == "paper" else OURS if best(*cell) == (*cell, recipe) else None
        found.append(point_of(tuple(cell), way, sizes_of(rows), [row["dev_wer"] for row in rows]))
    return [point for point in found if point["cell"][0] is not None]  # float models are off to the right


def point_of(cell, way, files, errors):
    """One point of the plot."""
    share = 100 * files["bytes"]["archive"] / files["bytes"]["float32"]
    old = files["archive_version"] != ARCHIVE_VERSION
    return {"cell": cell, "way": way, "share": share, "errors": [100 * error for error in errors], "old": old}


def plot(path, corpus, cells, best, untrained):
    """Draw the frontier, if Matplotlib is there.

    A cell has the colour of its bits, and up to three marks; that of ours has its name and a bar from the lowest to the
    highest seed. Filled: three seeds or more, or no training. Faint dots are other recipes.
    """
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 6.5))
    control = statistics.mean(100 * row["dev_wer"] for row in cells[CONTROL])
    axes.axhline(control, color="black", linewidth=0.8, label="float, fine-tuned as long")
    axes.axvline(9.4, color="grey", linestyle=":", label="the paper's size, 9.4 %")
    found = points(cells, best, untrained)
    shown = [point for point in found if statistics.mean(point["errors"]) < TOP * control]
    for point in shown:
        draw(axes, point)
    for way, mark in WAYS.items():
        axes.plot([], [], mark, color="grey", label=way)
    axes.plot([], [], "o", color="grey", markerfacecolor="none", label="hollow: fewer than three seeds")
    axes.plot([], [], ".", color="grey", alpha=0.5, label="other recipes")
    for bits in BITS[1:]:
        axes.plot([], [], "D", color=f"C{bits}", label=f"int{bits}")
    axes.set(xscale="log", xlabel="archive, % of FP32 (whole file; †: an earlier, larger version of it)")
    axes.set(ylabel="dev WER, %", title=f"{corpus}; {len(found) - len(shown)} of {len(found)} points are higher up")
    axes.set_xticks([4, 5, 6, 7, 8, 10, 12, 15, 20, 25], minor=False)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(fontsize=8, ncols=2, loc="upper right")
    figure.tight_layout()
    label(figure, axes, shown)
    figure.savefig(path, dpi=120)


def draw(axes, point):
    """One mark, and its bar."""
    error, colour = statistics.mean(point["errors"]), f"C{point['cell'][0]}"
    if point["way"] is None:
        axes.plot(point["share"], error, ".", color=colour, alpha=0.35, markersize=5)
        return
    full = len(point["errors"]) >= ENOUGH_SEEDS or point["way"] == UNTRAINED
    mark = WAYS[point["way"]]
    axes.plot(point["share"], error, mark, color=colour, markerfacecolor=colour if full else "white", markersize=7)
    if point["way"] == OURS:
        axes.plot([point["share"]] * 2, [min(point["errors"]), max(point["errors"])], color=colour, linewidth=0.8)


def label(figure, axes, shown):
    """Name the cells at "ours", each where it hides neither another name nor a mark."""
    renderer, taken = figure.canvas.get_renderer(), [axes.get_legend().get_window_extent()]
    marks = [axes.transData.transform((p["share"], statistics.mean(p["errors"]))) for p in shown if p["way"]]
    ours = [point for point in shown if point["way"] == OURS]
    for point in sorted(ours, key=lambda point: point["share"]):
        name = cell_name(*point["cell"]).removesuffix(" dense") + " †" * point["old"]
        weight = "bold" if point["cell"] in ((4, "2:4"), (3, None)) else "normal"  # of the same bits per weight
        place = {"xy": (point["share"], statistics.mean(point["errors"])), "textcoords": "offset points"}
        tried = []
        for offset in PLACES:
            text = axes.annotate(name, **place, xytext=offset, fontsize=8, weight=weight, ha="center")
            box = text.get_window_extent(renderer)
            hidden = sum(box.overlaps(other) for other in taken) + sum(box.contains(*mark) for mark in marks)
            tried.append((hidden, len(tried), text, box))
        kept = min(tried)
        for _, _, text, _ in tried:
            if text is not kept[2]:
                text.remove()
        taken.append(kept[3])
