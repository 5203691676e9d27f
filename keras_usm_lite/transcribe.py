"""Running a recogniser over a whole dataset, reference and recognised text side by side."""

import numpy as np

from keras_usm_lite.decoding import greedy_decode


def transcribe_dataset(predict, dataset, tokenizer, decode=greedy_decode):
    """Transcribes every utterance of a dataset.

    Args:
        predict: function from `x` to logits `[B, T, V]`, such as `model.predict_on_batch`.
        dataset: has `len(dataset)` batches `dataset[i] = (x, y, sample_weight)`: `x` whatever `predict`
            takes, `y` the labels `int [B, L]`, padded on the right with 0, and `sample_weight` `[B]`, 0 for
            rows that only fill up the batch. `SpeechBatches` and a plain list of batches will do.
        tokenizer: turns labels into text with `decode(ids)`.
        decode: function from logits to one label sequence per row; for a beam search
            `lambda logits: [paths[0][0] for paths in beam_decode(logits)]`.

    Returns:
        The pair `(references, hypotheses)` of `list[str]`, in the order of the dataset, without fill rows.

    Example:
        >>> import numpy as np
        >>> from keras_usm_lite.tokenizers.char_tokenizer import CharTokenizer
        >>> logits = np.eye(3)[[[1, 0, 2], [2, 2, 0], [0, 0, 0]]]
        >>> batch = logits, np.array([[1, 2], [2, 2], [0, 0]]), np.array([1.0, 1.0, 0.0])
        >>> transcribe_dataset(lambda x: x, [batch], CharTokenizer("ab"))
        (['ab', 'bb'], ['ab', 'b'])
    """
    references, hypotheses = [], []
    for index in range(len(dataset)):
        x, y, sample_weight = dataset[index]
        labels = decode(predict(x))
        for row in np.flatnonzero(sample_weight):
            references.append(tokenizer.decode(y[row]))
            hypotheses.append(tokenizer.decode(labels[row]))
    return references, hypotheses
