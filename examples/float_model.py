"""The float recogniser that a fine-tuning starts from: read, and held against the data."""

import os


def load_float_model(task, path):
    """Load a float model, and stop if it cannot be fine-tuned on the data of a task.

    Args:
        task: the `SpeechTask` of the data.
        path: a .keras file, or a packed .usm file such as `saved_models/arabic_commands_float/model.usm`; a
            `tokenizer.json` beside it is compared with the labels of the data.
    """
    import keras

    import keras_usm_lite as usm

    # Not compiled: the moments of its optimizer would take twice the memory of its weights.
    model = usm.load_packed(path) if path.endswith(".usm") else keras.models.load_model(path, compile=False)
    if usm.compressed_layers(model):
        raise SystemExit(f"{path} is compressed already. Give the float model that it was made of.")
    check_fit(usm, task, model, path)
    return model


def check_fit(usm, task, model, path):
    """Stop if a model was trained for other features or labels than the corpus has.

    With other labels it would only seem to recognise something. Without a `tokenizer.json` beside `path`, the file of
    the model, only their number can be compared.
    """
    bins = getattr(model, "num_mel_bins", task.frontend.num_mel_bins)
    if bins != task.frontend.num_mel_bins:
        raise SystemExit(
            f"{path} takes features of {bins} mel bins, the data has {task.frontend.num_mel_bins}. Give a model of "
            "USMForCTC's default num_mel_bins."
        )
    path = os.path.join(os.path.dirname(path), "tokenizer.json")
    tokenizer = usm.load_tokenizer(path) if os.path.exists(path) else task.tokenizer
    classes = model.compute_output_shape((1, 100, task.frontend.num_mel_bins))[-1]
    same = isinstance(tokenizer, type(task.tokenizer)) and tokenizer.vocabulary == task.tokenizer.vocabulary
    if not same or classes != task.tokenizer.vocab_size:
        raise SystemExit(
            f"The model was trained for other labels than {task.corpus.name} has ({classes} and "
            f"{task.tokenizer.vocab_size} with the blank). Give the corpus it was trained with, or train anew."
        )
