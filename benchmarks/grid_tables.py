"""Tables and plot of the grid, from the rows and outcomes that `grid.py` and `post_training_grid.py` left.

    python benchmarks/grid_tables.py --data CORPUS     # writes results/grid_CORPUS.md, .json and, with Matplotlib, .png

Which recipe stands for "ours" in a cell is chosen by its error rate on dev, among those with three seeds (or, where no
recipe has three, with the most). The test split is read here, and nowhere else; seeds are pooled, and the interval of
a change comes from drawing utterances, all seeds of one together; a second one from drawing speakers.
"""

import argparse
import functools
import json
import os
import statistics

from grid import RESULTS, ROOT, SMALLEST, read_rows
from grid_comparisons import ENOUGH_SEEDS, budget, change_of, comparison_lines, comparisons, described_change
from grid_plan import BITS, CONTROL, PATTERNS, cell_name, file_name, run_name
from grid_plot import plot
from grid_sizes import size_lines, sizes_of

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ABLATED = ((2, None), (4, "1:4"), (2, "2:4"), (4, "2:4"))  # the hard points, and the paper's own


def parse_arguments():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder or name of the corpus")
    return parser.parse_args()


def read_texts(folder, run, end=""):
    """What the file of a run says to the test recordings."""
    with open(os.path.join(folder, f"{file_name(run)}{end}.json")) as file:
        return json.load(file)


def by_cell(rows):
    """Return `{(bits, pattern, recipe): [rows of its seeds]}`."""
    cells = {}
    for row in rows:
        cells.setdefault((row["bits"], row["pattern"], row["recipe"]["name"]), []).append(row)
    return cells


def control_of(row, cells):
    """Return the float runs that a run is compared with: those as long and of the same peak learning rate."""
    if row["bits"] is None and row["pattern"] is None:
        return CONTROL
    same = [key for key, rows in cells.items() if key[:2] == CONTROL[:2] and budget(rows[0]) == budget(row)]
    return CONTROL if CONTROL in same or not same else same[0]


def mean(values):
    """The mean of a list."""
    return sum(values) / len(values)


def measured(usm, cells, key, folder, spoken, end=""):
    """Return one cell under one recipe: error rates, change against its control of the same seeds, sizes; or None."""
    control = control_of(cells[key][0], cells)
    controls = {row["seed"] for row in cells.get(control, [])}
    rows = [row for row in cells[key] if row["seed"] in controls and (not end or "smallest" in row["bytes"])]
    if not rows:
        return None
    texts = [read_texts(folder, row["run"], end) for row in rows]
    references = [utterance.text for utterance in spoken]
    found = {
        "bits": key[0],
        "pattern": key[1],
        "recipe": key[2],
        "seeds": [row["seed"] for row in rows],
        "dev_wer": mean([row["smallest_dev_wer" if end else "dev_wer"] for row in rows]),
        **sizes_of(rows),
        "test_wer": usm.error_rates(references * len(rows), sum(texts, [])).wer,
        "test_cer": usm.error_rates(references * len(rows), sum(texts, [])).cer,
        "test_wer_by_seed": [usm.error_rates(references, heard).wer for heard in texts],
        "comparisons": comparisons(usm, cells, control, rows, texts, references, functools.partial(read_texts, folder)),
    }

    def change(base):
        heard = [read_texts(folder, run_name(*base, row["seed"])) for row in rows]
        result = usm.paired_bootstrap(references, heard, texts)
        wider = usm.paired_bootstrap(references, heard, texts, groups=[utterance.speaker for utterance in spoken])
        return {
            "control": base[2],
            **change_of(result),
            "interval_of_speakers": [wider.low, wider.high],
        }

    if end:
        usual = [read_texts(folder, row["run"]) for row in rows]
        found["usual_wer"] = usm.error_rates(references * len(rows), sum(usual, [])).wer
        found["differing"] = sum(one != other for one, other in zip(sum(usual, []), sum(texts, []), strict=True))
    if key != CONTROL:
        found |= change(control) | {"same_budget": budget(rows[0]) == budget(cells[control][0])}
    if control != CONTROL:
        found["usual_rate"] = change(CONTROL)
    return found


def best_recipes(cells, bits, pattern):
    """Return the recipes other than the paper's that have three seeds or, if none has, the most; best on dev first."""
    others = {key: rows for key, rows in cells.items() if key[:2] == (bits, pattern) and key[2] != "paper"}
    enough = min(max(map(len, others.values()), default=0), ENOUGH_SEEDS)
    known = [key for key, rows in others.items() if len(rows) >= enough]
    return sorted(known, key=lambda key: mean([row["dev_wer"] for row in others[key]]))


def grid_table(usm, cells, folder, spoken, untrained):
    """Return the cells of the paper's grid: without training, the paper's way, ours, and what came close to ours."""
    table = []
    for bits in BITS:
        for pattern in PATTERNS:
            keys, ways = best_recipes(cells, bits, pattern), {}
            best = [way for way in (measured(usm, cells, key, folder, spoken) for key in keys) if way]
            if (bits, pattern, "paper") in cells:
                ways["paper"] = measured(usm, cells, (bits, pattern, "paper"), folder, spoken)
            if best:
                ways |= {"ours": best[0], "others": best[1:]}
                few = [measured(usm, cells, (bits, pattern, way["recipe"]), folder, spoken, SMALLEST) for way in best]
                ways["smallest"] = [way for way in few if way]
            if ways or (bits, pattern) in untrained:
                table.append({"bits": bits, "pattern": pattern, "untrained": untrained.get((bits, pattern)), **ways})
    return table


def read_untrained(corpus, float_model):
    """Return the cells of `post_training_grid.py` for the same corpus and float model, if there are any."""
    path = os.path.join(RESULTS, f"post_training_{corpus}.json")
    if not os.path.exists(path):
        return {}
    with open(path) as file:
        content = json.load(file)
    if content["float_model"] != float_model:
        return {}
    return {(cell["bits"], cell["pattern"]): cell for cell in content["cells"]}


def describe_untrained(cell, kind):
    """Error rate without training, and its change against the float model, as a cell of a table."""
    if cell is None:
        return "-"
    change = f", {described_change(cell[kind])}" if "interval" in cell[kind] else ""
    return f"{cell[kind]['wer']:.2%}{change}"


def describe(way):
    """Error rate, change with its interval, and seeds of one way, as a cell of a table."""
    if way is None:
        return "-"
    text = f"{way['test_wer']:.2%}"
    if "interval" in way:
        text += f", {described_change(way)}{'' if way['same_budget'] else ' to the control'}"
    if "usual_rate" in way:
        text += f" [{described_change(way['usual_rate'])}]"
    return text + f", {len(way['seeds'])} seed{'s' if len(way['seeds']) > 1 else ''}"


def grid_markdown(corpus, table, epochs):
    """Table 1 for readers."""
    lines = [
        f"## Grid, {corpus}",
        "",
        f"Test WER. Without training: change relative to the float model that was compressed. Fine-tuned: {epochs} "
        "epochs; change relative to the float model fine-tuned for as long with the "
        "same seeds and peak rate (recipes of another rate or length than the paper's way: in brackets to the control, "
        'too; "to the control": it had another rate or length, and no float model was trained like the recipe), 95 % '
        "interval of 10,000 paired draws; error rates of the archive. "
        '"Ours" is the recipe other than the paper\'s that is best on dev, of '
        "those with three seeds or, where none has three, with the most.",
        "",
        "| | absmax, untrained | best untrained | the paper's way | ours | CER | recipe |",
        "|---|---|---|---|---|--:|---|",
    ]
    for cell in table:
        columns = [cell_name(cell["bits"], cell["pattern"])]
        columns += [describe_untrained(cell["untrained"], kind) for kind in ("plain", "chosen")]
        columns += [describe(cell.get(way)) for way in ("paper", "ours")]
        ours = cell.get("ours")
        columns += [f"{ours['test_cer']:.2%}", ours["recipe"]] if ours else ["-", "-"]
        lines.append(f"| {' | '.join(columns)} |")
    others = [(cell_name(cell["bits"], cell["pattern"]), way) for cell in table for way in cell.get("others", ())]
    if others:
        lines += [
            "",
            "Recipes with enough seeds that dev did not choose:",
            "",
            "| | recipe | test WER |",
            "|---|---|---|",
        ]
        lines += [f"| {name} | {way['recipe']} | {describe(way)} |" for name, way in others]
    for part in (smallest_lines, comparison_lines, speaker_lines, size_lines):
        lines += ["", *part(table)]
    lines += ["", "| paper (arXiv 2312.08553) | 9.4 % of the size | +7.3 % |", "|---|---|---|"]
    return "\n".join(lines) + "\n"


def smallest_lines(table):
    """What the smallest archives of our ways say, for readers."""
    lines = [
        "Smallest archives (bfloat16 scales, vectors in int8, too) of ours and of the recipes that dev did not choose, "
        "of the seeds for which there is one:",
        "",
        "| | recipe | test WER | of the usual archive, same seeds | dev WER | smallest archive | the usual archive "
        "| test texts in which they differ |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for cell in table:
        for way in cell.get("smallest", ()):
            full = way["bytes"]["float32"]
            sizes = [f"{way['bytes'][kind]:,} ({way['bytes'][kind] / full:.2%})" for kind in ("smallest", "archive")]
            columns = [cell_name(cell["bits"], cell["pattern"]), way["recipe"], describe(way)]
            columns += [f"{way['usual_wer']:.2%}", f"{way['dev_wer']:.2%}"]
            sizes.append(f"{way['differing']:,}")
            lines.append(f"| {' | '.join([*columns, *sizes])} |")
    return lines


def speaker_lines(table):
    """The same changes when speakers are drawn instead of utterances, for readers."""
    lines = [
        "The changes with the interval of drawing speakers, each with all of its utterances and seeds (asc_connected "
        "has six, so these intervals are wide):",
        "",
    ]
    lines += ["| | recipe | change | seeds |", "|---|---|---|--:|"]
    for cell in table:
        for way in (cell.get("paper"), cell.get("ours"), *cell.get("others", ())):
            if way and way["seeds"] and "interval_of_speakers" in way:
                change = described_change({**way, "interval": way["interval_of_speakers"]})
                name = cell_name(cell["bits"], cell["pattern"])
                lines.append(f"| {name} | {way['recipe']} | {change} | {len(way['seeds'])} |")
    return lines


def ablation_markdown(cells):
    """Table 2 for readers: dev only, so that the test split decides nothing."""
    recipes = list(dict.fromkeys(key[2] for key in cells if key[:2] in ABLATED))
    control = [row["dev_wer"] for row in cells[CONTROL]]
    lines = [
        "## What each change does, dev WER",
        "",
        f"The float control: {mean(control):.2%}, {len(control)} seeds, standard deviation between them "
        f"{100 * statistics.stdev(control):.2f} points. In brackets the seeds of a recipe, then its difference to the "
        "paper's way in points, on the seeds that both have; of one seed, less than twice that deviation says nothing.",
        "",
        f"| recipe | {' | '.join(cell_name(bits, pattern) for bits, pattern in ABLATED)} |",
        f"|---|{'--:|' * len(ABLATED)}",
    ]
    for recipe in recipes:
        texts = [ablated(cells.get((*cell, recipe)), cells.get((*cell, "paper"), [])) for cell in ABLATED]
        lines.append(f"| {recipe} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def ablated(rows, usual):
    """The dev error rate of a recipe, its seeds, and the difference to the paper's way, as a cell of a table."""
    if not rows:
        return "-"
    text = f"{mean([row['dev_wer'] for row in rows]):.2%} ({len(rows)})"
    before = {row["seed"]: row["dev_wer"] for row in usual}
    both = [row["dev_wer"] - before[row["seed"]] for row in rows if row["seed"] in before]
    if rows is usual or not both:
        return text
    return text + f", {100 * mean(both):+.2f} on {len(both)}"


def main():
    """Write tables and plot."""
    args = parse_arguments()
    import keras_usm_lite as usm
    from keras_usm_lite.data.manifest import replacing

    corpus = usm.data.open_corpus(args.data)
    path = os.path.join(RESULTS, f"grid_{corpus.name}")
    rows = read_rows(f"{path}.jsonl")
    if not any((row["bits"], row["pattern"], row["recipe"]["name"]) == CONTROL for row in rows):
        raise SystemExit(f"{os.path.relpath(path, ROOT)}.jsonl has no float control yet; train it with grid.py first.")
    cells = by_cell(rows)
    spoken = usm.data.read_manifest(corpus.splits["test"])  # every row is usable
    untrained = read_untrained(corpus.name, rows[0]["float_model"])
    table = grid_table(usm, cells, path, spoken, untrained)
    text = grid_markdown(corpus.name, table, rows[0]["epochs"]) + "\n" + ablation_markdown(cells)
    for suffix, content in ((".md", text), (".json", json.dumps(table, indent=1) + "\n")):
        with replacing(path + suffix) as temporary, open(temporary, "w") as file:
            file.write(content)
    plot(f"{path}.png", corpus.name, cells, lambda *cell: next(iter(best_recipes(cells, *cell)), None), untrained)
    print(text)


if __name__ == "__main__":
    main()
