"""Speech manifests: which recordings there are, how long they last, what is said and by whom."""

import contextlib
import csv
import dataclasses
import io
import math
import os
import uuid
import warnings

COLUMNS = ("path", "duration_s", "text", "speaker")
POLICIES = ("skip", "raise")
SHOWN = 5  # problems that a message lists


class ManifestError(ValueError):
    """A manifest, or an utterance in it, that cannot be used; the message says where, why and what to do."""


@dataclasses.dataclass(frozen=True)
class Utterance:
    """One recording with its transcript.

    Args:
        path: Absolute path of the audio file.
        duration: Length in seconds.
        text: What is said.
        speaker: Name of the speaker.

    Example:
    >>> Utterance("/corpus/a.wav", 1.5, "hello", "anna").duration
    1.5
    """

    path: str
    duration: float
    text: str
    speaker: str


@dataclasses.dataclass(frozen=True)
class BadRow:
    """An utterance that cannot be trained on.

    Args:
        path: Absolute path of the audio file.
        reason: Why it cannot be used.

    Example:
    >>> BadRow("/corpus/a.wav", "the text is empty").reason
    'the text is empty'
    """

    path: str
    reason: str


def read_manifest(path):
    """Reads a manifest: tab-separated UTF-8 with a header row and no quoting.

    The columns `path`, `duration_s`, `text` and `speaker` must be there, in any order; further columns are
    ignored. Audio paths may be relative to the folder of the manifest.

    Args:
        path: Path of the manifest.

    Returns:
        A list of `Utterance`, in the order of the file.

    Raises:
        ManifestError: The file is missing, is not UTF-8, or a row lacks a column or holds a bad value.

    Example:
    >>> import os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "train.tsv")
    >>> write_manifest(path, [Utterance("/corpus/a.wav", 1.5, "hello", "anna")])
    >>> read_manifest(path)
    [Utterance(path='/corpus/a.wav', duration=1.5, text='hello', speaker='anna')]
    """
    path = os.path.abspath(path)
    rows = csv.DictReader(io.StringIO(_read_text(path)), delimiter="\t", quoting=csv.QUOTE_NONE)
    missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
    if missing:
        raise ManifestError(
            f"{path}, line 1: no column {', '.join(missing)} in the header {rows.fieldnames or []}. "
            f"A manifest needs the tab-separated columns {', '.join(COLUMNS)}; add them to the header row."
        )
    try:
        return [_parse_row(row, path, rows.line_num) for row in rows]
    except csv.Error as error:  # the module's own limits
        raise ManifestError(
            f"{path}, line {rows.line_num + 1}: {error}. Lines end with a newline, no field holds one, and none is "
            "longer than 131,072 characters."
        ) from error


def write_manifest(path, utterances):
    """Writes utterances in the format that `read_manifest` reads, all or nothing.

    Audio below the folder of the manifest is stored with a relative path, so that the folder can be moved.

    Args:
        path: Path of the manifest to write; an existing file is replaced.
        utterances: Iterable of `Utterance`.

    Raises:
        ManifestError: A field holds a tab or a line break, which the format cannot store.

    Example:
    >>> import os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "train.tsv")
    >>> write_manifest(path, [Utterance(os.path.join(os.path.dirname(path), "a.wav"), 1.5, "hi", "anna")])
    >>> print(open(path).read().expandtabs(12))
    path        duration_s  text        speaker
    a.wav       1.5         hi          anna
    <BLANKLINE>
    """
    path = os.path.abspath(path)
    folder = os.path.dirname(path)
    rows = [(_stored_path(u.path, folder), repr(float(u.duration)), u.text, u.speaker) for u in utterances]
    for line, row in enumerate(rows, start=2):
        for column, value in zip(COLUMNS, row, strict=True):
            if any(c in value for c in "\t\r\n"):
                raise ManifestError(
                    f"{path}, line {line}, column {column}: {value!r} holds a tab or a line break. "
                    "Fields are stored without quoting; replace these characters by spaces."
                )
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        file.writelines("\t".join(row) + "\n" for row in [COLUMNS, *rows])


def check_utterances(utterances, encode=None, frames_per_second=25.0, on_bad="skip"):
    """Separates the utterances that can be trained on from those that cannot.

    An utterance is bad if its file is missing or empty, its duration is not positive, its text is empty,
    `encode` refuses the text, or CTC has no alignment for it, because with `U` labels, `R` of which equal the
    label before, CTC needs at least `U + R` output frames (a blank must separate equal labels).

    Args:
        utterances: Iterable of `Utterance`.
        encode: Optional function from text to a list of int labels, which raises `ValueError` for a text that
            it cannot encode. Without it the alignment is not checked.
        frames_per_second: Output frames of the model per second of audio; None: the alignment is not checked.
        on_bad: "skip" warns once with the number of bad utterances, "raise" raises.

    Returns:
        A pair `(good, problems)`: a list of `Utterance` and a list of `BadRow`.

    Raises:
        ManifestError: `on_bad` is "raise" and at least one utterance is bad.
        ValueError: `on_bad` is neither "skip" nor "raise".

    Example:
    >>> good, problems = check_utterances([])
    >>> good, problems
    ([], [])
    """
    check_policy(on_bad)
    good, problems = [], []
    for utterance in utterances:
        reason = find_problem(utterance, encode, frames_per_second)
        if reason is None:
            good.append(utterance)
        else:
            problems.append(BadRow(utterance.path, reason))
    report_problems(problems, len(good) + len(problems), on_bad)
    return good, problems


def find_problem(utterance, encode=None, frames_per_second=25.0):
    """Returns why an utterance cannot be trained on, as far as its row and the size of its file tell, or None.

    Args:
        utterance: An `Utterance`.
        encode, frames_per_second: See `check_utterances`.

    Example:
    >>> find_problem(Utterance("/nowhere/a.wav", 1.5, "hello", "anna"))
    'the file is missing'
    """
    if not os.path.isfile(utterance.path):
        return "the file is missing"
    if os.path.getsize(utterance.path) == 0:
        return "the file is empty"
    if not utterance.duration > 0:
        return f"the duration is {utterance.duration} s, not positive"
    if not utterance.text.strip():
        return "the text is empty"
    if encode is None:
        return None
    try:
        labels = list(encode(utterance.text))
    except ValueError as error:
        return f"the text cannot be encoded: {error}"
    if not labels:
        return "the text has no labels"
    if frames_per_second is None:
        return None
    # The small term keeps a duration such as 0.28 s at 25 frames/s from losing a frame to rounding.
    frames, needed = int(utterance.duration * frames_per_second + 1e-6), frames_needed(labels)
    if frames < needed:
        return f"CTC needs {needed} output frames for the text, {utterance.duration} s give {frames}"
    return None


def frames_needed(labels):
    """Returns the fewest output frames that CTC can align with labels: one each, and a blank between equal ones.

    Args:
        labels: List of int labels.

    Example:
    >>> frames_needed([3, 3, 1])
    4
    """
    return len(labels) + sum(a == b for a, b in zip(labels, labels[1:], strict=False))


def check_policy(on_bad):
    """Raises `ValueError` if `on_bad` is neither "skip" nor "raise"."""
    if on_bad not in POLICIES:
        raise ValueError(f'on_bad is {on_bad!r}; allowed are "skip" and "raise".')


def report_problems(problems, total, on_bad):
    """Warns of utterances that are left out, or raises: once for all, with their number and the first few.

    Args:
        problems: List of `BadRow`; nothing happens if it is empty.
        total: Number of utterances, good and bad.
        on_bad: "skip" warns, "raise" raises.

    Raises:
        ManifestError: `on_bad` is "raise" and there are problems.
    """
    if not problems:
        return
    summary = f"{len(problems)} of {total} utterances cannot be used:{list_problems(problems)}"
    if on_bad == "raise":
        raise ManifestError(f'{summary}\nRepair or remove them, or pass on_bad="skip" to leave them out.')
    warnings.warn(f"Left out: {summary}", stacklevel=3)


def list_problems(problems):
    """Returns the first few problems, one a line, and how many more there are.

    Example:
    >>> print(list_problems([BadRow("/corpus/a.wav", "the text is empty")]))
    <BLANKLINE>
      /corpus/a.wav: the text is empty
    """
    more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return "".join(f"\n  {row.path}: {row.reason}" for row in problems[:SHOWN]) + more


@contextlib.contextmanager
def replacing(path):
    """Gives a temporary name beside `path` that becomes `path` if the block succeeds and vanishes if not.

    Args:
        path: The name that the finished file shall have.

    Yields:
        The temporary name to write to.

    Example:
    >>> import os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "note.txt")
    >>> with replacing(path) as temporary, open(temporary, "w") as file:
    ...     _ = file.write("done")
    >>> os.listdir(os.path.dirname(path))
    ['note.txt']
    """
    temporary = f"{os.fspath(path)}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def _read_text(path):
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise ManifestError(f"{path}: cannot read the manifest ({error.strerror}); check the path.") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ManifestError(f"{path}, line {line}: not UTF-8; save the manifest as UTF-8.") from error


def _parse_row(row, manifest, line):
    if None in row:  # where csv puts the fields that have no column
        raise ManifestError(
            f"{manifest}, line {line}: more fields than the header has, the last is {row[None][-1]!r}. A tab separates "
            "fields, so a text cannot hold one; replace it by a space."
        )
    for column in COLUMNS:
        if row[column] is None:
            raise ManifestError(
                f"{manifest}, line {line}, column {column}: the row ends before it. "
                "Every row needs as many tab-separated fields as the header; add the missing ones."
            )
    if not row["path"]:
        raise ManifestError(f"{manifest}, line {line}, column path: it is empty; give the path of an audio file.")
    try:
        duration = float(row["duration_s"])
    except ValueError:
        duration = math.nan
    if not math.isfinite(duration):
        raise ManifestError(
            f"{manifest}, line {line}, column duration_s: {row['duration_s']!r} is not a number. "
            "Allowed is the length in seconds, such as 2.75."
        )
    path = os.path.normpath(os.path.join(os.path.dirname(manifest), row["path"]))
    return Utterance(path, duration, row["text"], row["speaker"])


def _stored_path(path, folder):
    path = os.path.abspath(path)
    below = path.startswith(folder.rstrip(os.sep) + os.sep)
    return os.path.relpath(path, folder) if below else path
