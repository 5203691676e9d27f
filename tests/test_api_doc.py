"""docs/api.md lists the public names, all of them and no others; pages name nothing that is not there."""

import pathlib
import re

import keras_usm_lite as usm

ROOT = pathlib.Path(__file__).parents[1]
MODULES = {"": usm, "callbacks.": usm.callbacks, "data.": usm.data, "optimizers.": usm.optimizers}
PAGES = {page.name: page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}


def resolve(name):
    """What `usm.NAME` stands for, None if nothing."""
    found = usm
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def test_every_public_name_is_in_the_list_and_nothing_else():
    listed = re.findall(r"`([\w.]+)`", "".join(re.findall(r"^\| (`.+?) \|", PAGES["api.md"], re.MULTILINE)))
    public = {f"{prefix}{name}" for prefix, module in MODULES.items() for name in module.__all__}
    public -= {"callbacks", "data", "interop", "optimizers"}
    assert sorted(listed) == sorted(public | {"interop.to_torch_semi_structured"})
    assert [name for name in listed if resolve(name) is None] == []


def test_the_pages_use_no_name_that_the_package_lacks():
    named = {(page, name) for page, text in PAGES.items() for name in re.findall(r"\busm\.([a-zA-Z_][\w.]*\w)", text)}
    assert len(named) > 40
    assert [pair for pair in sorted(named) if resolve(pair[1]) is None] == []
