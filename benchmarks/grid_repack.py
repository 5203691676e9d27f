"""Write the files of the grid's finished runs anew after a change of the packed format, and their sizes into the rows.

    python benchmarks/grid_repack.py --data CORPUS

Takes the trained models that `grid.py` left in its output folder; nothing is trained. A file that does not read back to
the very weights of the old one stops everything, so the error rates in the rows stay those of the files.
"""

import argparse
import json
import os

from grid import RESULTS, ROOT, packed_files, read_rows
from grid_plan import file_name


def parse_arguments():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder or name of the corpus")
    parser.add_argument("--output", help="folder of the trained models (default outputs/grid_CORPUS)")
    return parser.parse_args()


def repack(usm, keras, path):
    """Write both packed files of a run beside the old ones, compare, replace; return `{kind: bytes}`."""
    import numpy as np

    model, sizes = keras.models.load_model(f"{path}.keras", compile=False), {}
    for kind, new in packed_files(usm, model, f"{path}.new").items():
        old = new.replace(".new", "")
        pairs = zip(usm.load_packed(new).get_weights(), usm.load_packed(old).get_weights(), strict=True)
        if not all(np.array_equal(ours, theirs) for ours, theirs in pairs):
            raise SystemExit(f"{new} holds other weights than {old}: train this run again.")
        os.replace(new, old)
        sizes[kind] = os.path.getsize(old)
    return sizes


def main():
    """Repack every run whose model is still there."""
    args = parse_arguments()
    import keras

    import keras_usm_lite as usm
    from keras_usm_lite.data.manifest import replacing

    corpus = usm.data.open_corpus(args.data).name
    folder = args.output or os.path.join(ROOT, "outputs", f"grid_{corpus}")
    results = os.path.join(RESULTS, f"grid_{corpus}.jsonl")
    rows = read_rows(results)
    for row in rows:
        before = dict(row["bytes"])
        row["bytes"].update(repack(usm, keras, os.path.join(folder, file_name(row["run"]))))
        print(f"{row['run']}: archive {before['archive']} -> {row['bytes']['archive']} bytes", flush=True)
        keras.utils.clear_session()
    with replacing(results) as temporary, open(temporary, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
