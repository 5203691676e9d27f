"""The folder of a run that can be interrupted: it belongs to the arguments and the corpus it was started with."""

import json
import os


def write_json(path, content):
    """Write a JSON file, all or nothing."""
    with open(path + ".part", "w") as file:
        json.dump(content, file, indent=2)
    os.replace(path + ".part", path)


def remember_arguments(args, corpus, free, files=(), **found):
    """Refuse to continue a run with other arguments or on another corpus: it would end as neither would.

    Args:
        args: parsed command line with `output`, the folder.
        corpus: the corpus the run works on.
        free: names of the arguments that may change between calls.
        files: names of arguments that are paths, of which only what is in the file matters.
        **found: what else must be as it was, though no argument says it.
    """
    from keras_usm_lite.data.feature_cache import file_crc32

    path = os.path.join(args.output, "arguments.json")
    asked = {name: value for name, value in vars(args).items() if name not in free}
    asked |= {"corpus": corpus.name, "manifests": corpus.fingerprint()}
    asked |= found | {name: getattr(args, name) and file_crc32(getattr(args, name)) for name in files}
    if os.path.exists(path):
        with open(path) as file:
            before = json.load(file)
        changed = [
            f"{name} {before.get(name)!r}, now {now!r}" for name, now in asked.items() if now != before.get(name)
        ]
        if changed:
            raise SystemExit(
                f"{args.output} holds a run with other arguments ({'; '.join(changed)}). "
                "Give another --output, or delete the folder."
            )
    write_json(path, asked)
