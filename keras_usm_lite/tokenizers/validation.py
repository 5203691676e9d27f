"""The checks on texts and ids that every tokenizer makes."""


def checked_texts(texts):
    """Reads the training texts of a tokenizer into a list.

    Args:
        texts: iterable of strings, with at least one that is not blank.

    Returns:
        The texts as a `list[str]`.

    Raises:
        ValueError: if `texts` is one string, holds something else than strings, or holds no text at all.

    Example:
        >>> checked_texts(text for text in ("yes", "no"))
        ['yes', 'no']
    """
    if isinstance(texts, str):
        raise ValueError(f"texts must be an iterable of strings, got the single string {texts!r}. Use [{texts!r}].")
    texts = list(texts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"texts[{index}] must be a string, got {text!r}. Convert it or leave it out.")
    if not any(text.strip() for text in texts):
        raise ValueError(f"A tokenizer needs at least one text that is not blank, got {len(texts)} blank texts.")
    return texts


def labels_without_blanks(ids, vocab_size):
    """Drops the blanks (id 0) from a label sequence and checks the range of what is left.

    Args:
        ids: iterable of integers, such as a padded row of an `int [B, L]` label array.
        vocab_size: number of ids, blank included.

    Returns:
        The ids other than 0 as a `list[int]`.

    Raises:
        ValueError: if an id is negative or not below `vocab_size`.

    Example:
        >>> labels_without_blanks([3, 1, 0, 0], vocab_size=4)
        [3, 1]
    """
    labels = [int(label) for label in ids if label != 0]
    for label in labels:
        if not 0 < label < vocab_size:
            raise ValueError(
                f"Id {label} is outside 0..{vocab_size - 1}, the ids of this tokenizer. Decode with the "
                "tokenizer the model was trained with; its vocab_size is the number of classes of the model."
            )
    return labels
