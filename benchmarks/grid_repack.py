"""Measure the archives of the grid's finished runs anew after a change of the packed format.

    python benchmarks/grid_repack.py --data CORPUS

Takes the packed files that `grid.py` left in its output folder, or that are published (no archives); nothing is
trained, and they stay as they are. A file that does not read back to the very weights that the old one holds stops
everything, so the error rates in the rows stay those of the files. Runs of which neither is left keep their rows.
"""

import argparse
import glob
import json
import os
import tempfile

from grid import ARCHIVE_VERSION, RESULTS, ROOT, packed_files, read_rows
from grid_plan import file_name

ARCHIVES = ("archive", "smallest")  # kinds of packed files whose sizes change with the format
DESCRIPTION_BYTES = 100  # by which the file of a published model may be longer, as it was loaded before


def parse_arguments():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder or name of the corpus")
    parser.add_argument("--output", help="folder of the trained models (default outputs/grid_CORPUS)")
    return parser.parse_args()


def files_of(row, corpus, folder):
    """Return `{kind: path}` of the packed files of a run as they are, kinds as in its row; other sizes are refused."""
    path = os.path.join(folder, file_name(row["run"]))
    files = {"packed": f"{path}.usm"} | {kind: f"{path}.{kind}.usm" for kind in ARCHIVES if kind in row["bytes"]}
    files = {kind: file for kind, file in files.items() if os.path.exists(file)} or published(row, corpus)
    if "packed" not in files and "smallest" in row["bytes"]:
        return {}  # an archive cannot be made a smaller one without rounding twice
    for kind, file in files.items():
        size, expected = os.path.getsize(file), row["bytes"][kind]
        if abs(size - expected) > DESCRIPTION_BYTES:
            raise SystemExit(f"{file} is not of {row['run']}: it has {size} bytes, its row says {expected}.")
    return files


def published(row, corpus):
    """Return `{kind: path}` of the packed file of a run in `saved_models`, or an empty dict."""
    for card in glob.glob(os.path.join(ROOT, "saved_models", "*", "card.json")):
        with open(card) as file:
            about = json.load(file)
        if f"--data {corpus} " in about["made"] and about["made"].endswith(f"--only '{row['run']}'"):
            path = os.path.join(os.path.dirname(card), "model.usm")
            return {} if about["archive"] else {"packed": path}  # a published archive is rounded more
    return {}


def repacked(usm, files):
    """Return `{kind: bytes}` of the archives written anew, after comparing them with the old files."""
    import numpy as np

    model = usm.load_packed(files["packed" if "packed" in files else "archive"])
    with tempfile.TemporaryDirectory() as folder:
        new = packed_files(usm, model, os.path.join(folder, "new"))
        for kind, old in files.items():
            pairs = zip(usm.load_packed(new[kind]).get_weights(), usm.load_packed(old).get_weights(), strict=True)
            if not all(np.array_equal(ours, theirs) for ours, theirs in pairs):
                raise SystemExit(f"{old} is not read back bit for bit when it is written anew: train this run again.")
        return {kind: os.path.getsize(new[kind]) for kind in ARCHIVES if kind in new}


def main():
    """Repack every run whose files are still there."""
    args = parse_arguments()
    import keras
    import moonshine  # noqa: F401  registers its classes

    import keras_usm_lite as usm
    from keras_usm_lite.data.manifest import replacing

    corpus = usm.data.open_corpus(args.data).name
    folder = args.output or os.path.join(ROOT, "outputs", f"grid_{corpus}")
    results = os.path.join(RESULTS, f"grid_{corpus}.jsonl")
    rows = read_rows(results)
    for row in rows:
        files = files_of(row, corpus, folder) if row.get("archive_version") != ARCHIVE_VERSION else {}
        if files:
            sizes = {kind: size for kind, size in repacked(usm, files).items() if kind in row["bytes"]}
            before = {kind: row["bytes"][kind] for kind in sizes}
            row["bytes"] |= sizes
            row["archive_version"] = ARCHIVE_VERSION
            print(f"{row['run']}: {before} -> {sizes} bytes", flush=True)
            keras.utils.clear_session()
    with replacing(results) as temporary, open(temporary, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
