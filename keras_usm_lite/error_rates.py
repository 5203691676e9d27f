"""Word and character error rates of a set of utterances."""

import dataclasses

import jiwer


@dataclasses.dataclass(frozen=True)
class ErrorRates:
    """Error counts of a set of utterances and the rates that follow from them.

    `wer = (substitutions + deletions + insertions) / words` and `cer = char_errors / characters`, both over
    the whole set, so that long utterances count for more.

    Attributes:
        wer: word error rate, a fraction (1.0 is 100 %) that insertions can bring above 1.
        cer: character error rate, a fraction; the space between two words is a character.
        substitutions: number of words replaced by another.
        deletions: number of words left out.
        insertions: number of words added.
        words: number of words in the references.
        char_errors: number of characters replaced, left out or added.
        characters: number of characters in the references.
        utterances: number of references.
    """

    wer: float
    cer: float
    substitutions: int
    deletions: int
    insertions: int
    words: int
    char_errors: int
    characters: int
    utterances: int

    def __str__(self):
        return (
            f"WER {100 * self.wer:.2f} % "
            f"({self.substitutions} sub {self.deletions} del {self.insertions} ins / {self.words} words), "
            f"CER {100 * self.cer:.2f} % ({self.char_errors} errors / {self.characters} characters), "
            f"{self.utterances} utterances"
        )


def error_rates(references, hypotheses):
    """Counts the errors of a recogniser with jiwer.

    Texts are compared as they are (normalise both sides first), except that runs of white space count as one
    space and those at the ends do not count.

    Args:
        references: list of the texts that were spoken, none of them empty.
        hypotheses: list of the texts that were recognised, in the same order; empty ones are deletions.

    Returns:
        The `ErrorRates`.

    Raises:
        ValueError: if a text is given instead of a list, the lists differ in length, there are no references, or a
            reference is empty.

    Example:
        >>> print(error_rates(["turn the light on", "stop"], ["turn light on", "shop now"]))
        WER 60.00 % (1 sub 1 del 1 ins / 5 words), CER 42.86 % (9 errors / 21 characters), 2 utterances
    """
    references, hypotheses = comparable_texts(references, hypotheses)
    words = jiwer.process_words(references, hypotheses)
    chars = jiwer.process_characters(references, hypotheses)
    return ErrorRates(
        wer=words.wer,
        cer=chars.cer,
        substitutions=words.substitutions,
        deletions=words.deletions,
        insertions=words.insertions,
        words=words.hits + words.substitutions + words.deletions,
        char_errors=chars.substitutions + chars.deletions + chars.insertions,
        characters=chars.hits + chars.substitutions + chars.deletions,
        utterances=len(references),
    )


def comparable_texts(references, hypotheses):
    """Checks that references and hypotheses can be compared, and evens out their white space.

    Args:
        references: list of texts.
        hypotheses: list of texts.

    Returns:
        The pair of lists.

    Raises:
        ValueError: if a text is given instead of a list, the lists differ in length, there are no references, or a
            reference is empty.

    Example:
        >>> comparable_texts(["light  on"], [" "])
        (['light on'], [''])
    """
    if isinstance(references, str) or isinstance(hypotheses, str):
        raise ValueError("A text alone would be taken letter by letter; give lists of texts, such as ['turn left'].")
    references, hypotheses = ([" ".join(text.split()) for text in texts] for texts in (references, hypotheses))
    if len(references) != len(hypotheses):
        raise ValueError(
            f"There are {len(references)} references but {len(hypotheses)} hypotheses. "
            "Give one hypothesis for each reference, an empty string where nothing was recognised."
        )
    if not references:
        raise ValueError("There are no references, so there is no error rate. Give at least one.")
    empty = [index for index, text in enumerate(references) if not text]
    if empty:
        raise ValueError(
            f"{len(empty)} of {len(references)} references are empty, the first is references[{empty[0]}]. "
            "Leave utterances without words out."
        )
    return references, hypotheses
