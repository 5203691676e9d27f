"""A change of the grid seen in three more ways: with seeds drawn, against the paper's way, against a taught float.

The first table compares every run with the float control of its own seed, and its interval is about these very models.
That leaves open what other seeds would do, whether two recipes with different seeds differ, and what the teacher does
for a float model. Used by `grid_tables.py`.
"""

from grid_plan import CONTROL, cell_name, run_name

ENOUGH_SEEDS = 3
TAUGHT = (None, None, "distilled")  # the float model that learns from the same teacher, for as long


def comparisons(usm, cells, control, rows, texts, references, read):
    """Return the comparisons that the runs at hand allow, of several seeds of one recipe; none with fewer than three.

    Args:
        usm: the package.
        cells: `{(bits, pattern, recipe): rows}`.
        control: key of the float runs that the recipe is compared with.
        rows: the runs of one recipe.
        texts: what they say to the test recordings.
        references: what was said.
        read: reads what a run says, by name.
    """
    key, recipe = (rows[0]["bits"], rows[0]["pattern"], rows[0]["recipe"]["name"]), rows[0]["recipe"]
    if len(rows) < ENOUGH_SEEDS or key == CONTROL:
        return {}
    found, seeds = {}, [row["seed"] for row in rows]
    if recipe.get("late"):  # begins with the control of its own seed, so it shares the luck of that seed
        before = [read(run_name(*control, seed)) for seed in seeds]
        found["seeds drawn"] = change_of(usm.paired_bootstrap(references, before, texts, trainings="paired"))
    elif len(cells[control]) >= ENOUGH_SEEDS:
        before = [read(row["run"]) for row in cells[control]]
        found["seeds drawn"] = change_of(usm.paired_bootstrap(references, before, texts, trainings="independent"))
    others = {"paper": (*key[:2], "paper"), "taught": TAUGHT}
    if not recipe.get("distill") or recipe.get("late") or budget(rows[0]) != budget(cells.get(TAUGHT, rows)[0]):
        del others["taught"]
    for name, other in others.items():
        both = [seed for seed in seeds if seed in {row["seed"] for row in cells.get(other, ())}]
        if both and other != key:
            before = [read(run_name(*other, seed)) for seed in both]
            after = [text for seed, text in zip(seeds, texts, strict=True) if seed in both]
            found[name] = change_of(usm.paired_bootstrap(references, before, after)) | {"seeds": both}
    return found


def change_of(result):
    """What is kept of a paired bootstrap."""
    return {"relative_change": result.relative_change, "interval": [result.low, result.high]}


def budget(row):
    """Epochs and peak learning rate of a run."""
    return row["epochs"], row["learning_rate"]


def comparison_lines(table):
    """The comparisons for readers."""
    lines = [
        "Other comparisons, of rows with three seeds. Seeds drawn: the interval is about other seeds of the recipe, "
        "too, against all seeds of the float model of the first table (recipes that begin with the control of their "
        "seed: against the same seeds, drawn as pairs); with three seeds it is too short still. The other two are on "
        "the seeds that both have, their number in front: against the paper's way of the cell, and against float "
        '"distilled", which had the same teacher.',
        "",
        "| | recipe | seeds | seeds drawn | to the paper's way | to float, taught |",
        "|---|---|--:|---|---|---|",
    ]
    for cell in table:
        name = cell_name(cell["bits"], cell["pattern"])
        ways = [(way, "") for way in (cell.get("paper"), cell.get("ours"), *cell.get("others", ())) if way]
        ways += [(way, ", smallest") for way in cell.get("smallest", ())]
        for way, kind in ways:
            found = way["comparisons"]
            if found:
                columns = [name, way["recipe"] + kind, str(len(way["seeds"])), _told(found, "seeds drawn")]
                lines.append(f"| {' | '.join([*columns, _told(found, 'paper'), _told(found, 'taught')])} |")
    return lines


def _told(found, name):
    """One comparison, as a cell of a table."""
    if name not in found:
        return "-"
    number = f"{len(found[name]['seeds'])}: " if "seeds" in found[name] else ""
    return number + described_change(found[name])


def described_change(change):
    """A relative change with its interval."""
    return "{:+.1%} ({:+.1%} to {:+.1%})".format(change["relative_change"], *change["interval"])
