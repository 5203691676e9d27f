"""Transcribe recordings, or what the microphone hears, with an exported `.tflite` recogniser.

    python examples/transcribe.py model.tflite audio.wav more/*.flac
    python examples/transcribe.py streaming.tflite --microphone

Recordings may have any sampling rate and format that can be read; they are converted to what the model hears. A file
written by export_litert hears whole recordings; one written by export_litert_streaming hears them step by step, and the
text so far is printed after every step. The real-time factor is computing time by duration of the audio, on the given
number of threads; below 1 the model keeps up with speech.
"""

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def parse_arguments(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="recogniser that takes audio, a .tflite file written by export_litert(..., "
        "sample_rate_input=16000) or export_litert_streaming(..., frontend=...)")  # fmt: skip
    add("audio", nargs="*", help="recordings, each transcribed on its own")
    add("--microphone", action="store_true", help="transcribe what the microphone hears until Ctrl+C; needs the "
        "package sounddevice (pip install sounddevice)")  # fmt: skip
    add("--tokenizer", help="file written by save_tokenizer; default: tokenizer.json beside the model")
    add("--threads", type=int, default=1, help="threads of the interpreter (default 1)")
    add("--sample-rate", type=int, default=16000, help="samples per second that a model of whole recordings was "
        "trained with (default 16000); a streaming model says it itself")  # fmt: skip
    args = parser.parse_args(argv)
    if bool(args.audio) == args.microphone:
        parser.error("give either recordings or --microphone")
    if args.tokenizer is None:
        args.tokenizer = os.path.join(os.path.dirname(args.model), "tokenizer.json")
    return args


def check_files(args):
    """Stop before any work if a file is missing, or the package that reads the microphone."""
    missing = [path for path in (args.model, *args.audio) if not os.path.isfile(path)]
    if missing:
        raise SystemExit(f"There is no file {', '.join(missing)}; check the path.")
    if not os.path.isfile(args.tokenizer):
        raise SystemExit(
            f"There is no tokenizer {args.tokenizer}; give the file that save_tokenizer wrote with --tokenizer."
        )
    if args.microphone:
        try:
            import sounddevice  # noqa: F401
        except (ImportError, OSError) as error:  # OSError: installed, but the PortAudio library is not
            raise SystemExit(
                f"--microphone needs the package sounddevice ({error}): pip install sounddevice"
            ) from error


def open_recognizer(usm, args):
    """Return the recogniser for a file, and whether it is a streaming one; stop if the file is none."""
    from ai_edge_litert.interpreter import Interpreter

    try:
        interpreter = Interpreter(args.model)
        tokenizer = usm.load_tokenizer(args.tokenizer)
    except ValueError as error:
        raise SystemExit(f"{args.model} or its tokenizer cannot be read: {error}") from error
    streaming = check_model(interpreter, args.model)
    outputs = interpreter.get_signature_runner().get_output_details()
    logits = outputs["logits"] if streaming else next(iter(outputs.values()))
    if logits["shape"][-1] != tokenizer.vocab_size:
        raise SystemExit(
            f"{args.model} tells {logits['shape'][-1]} classes apart, {args.tokenizer} has {tokenizer.vocab_size}; "
            "give the tokenizer the model was trained with."
        )
    recognizer_class = usm.StreamingRecognizer if streaming else usm.LiteRTRecognizer
    return recognizer_class(args.model, tokenizer, args.threads), streaming


def check_model(interpreter, path):
    """Return whether a file is a streaming recogniser; stop unless it is a recogniser of audio."""
    signatures = list(interpreter.get_signature_list().values())
    inputs = sorted(signatures[0]["inputs"]) if signatures else []
    if "features" in inputs:
        raise SystemExit(
            f"{path} takes log-mel features. Export it with the front end inside: export_litert(..., "
            "sample_rate_input=16000) or export_litert_streaming(..., frontend=...)."
        )
    if inputs not in (["audio"], ["audio", "length", "state"]):
        raise SystemExit(f"{path} is not a recogniser: its inputs are {inputs}; a recogniser has one named 'audio'.")
    streaming = "state" in inputs
    shape = interpreter.get_input_details()[0]["shape_signature"]
    if shape[0] not in (1, -1):
        raise SystemExit(f"{path} takes {shape[0]} recordings at once; export it with batch=None or 1.")
    if not streaming and shape[1] != -1:
        raise SystemExit(f"{path} takes exactly {shape[1]} samples; export it with length=None for any recording.")
    return streaming


def recording(path, rate, step):
    """Yield the samples of a recording in pieces of one step."""
    from keras_usm_lite.data.audio import AudioError, load_audio

    try:
        audio = load_audio(path, rate)
    except AudioError as error:
        raise SystemExit(str(error)) from error
    for begin in range(0, len(audio), step):
        yield audio[begin : begin + step]


def microphone(rate):
    """Yield what the microphone hears, in pieces of a tenth of a second, until Ctrl+C."""
    import sounddevice

    with sounddevice.InputStream(samplerate=rate, channels=1, dtype="float32") as stream:
        print("listening; Ctrl+C ends")
        while True:
            samples, _ = stream.read(rate // 10)
            yield samples[:, 0]


def hear_stream(recognizer, pieces):
    """Print the text so far whenever it grows; return the text, the seconds it took, and the samples heard."""
    text, seconds, samples = "", 0.0, 0
    try:
        for piece in pieces:
            samples += len(piece)
            start = time.perf_counter()
            partial = recognizer.feed(piece)
            seconds += time.perf_counter() - start
            if partial != text:
                text = partial
                print(f"  {samples / recognizer.sample_rate:8.2f} s  {text}", flush=True)
    except KeyboardInterrupt:
        pass
    start = time.perf_counter()
    text = recognizer.finish()
    return text, seconds + time.perf_counter() - start, samples


def hear_whole(recognizer, pieces, rate):
    """Collect the whole recording; return its text, the seconds it took, and the samples heard."""
    import numpy as np

    collected = [np.zeros(0, np.float32)]
    try:
        for piece in pieces:
            collected.append(piece)
    except KeyboardInterrupt:
        pass
    audio = np.concatenate(collected)
    padding = max(0, rate // 25 - len(audio))  # 40 ms are more than one window of analysis
    text, seconds = recognizer.transcribe(np.pad(audio, (0, padding)))
    return text, seconds, len(audio)


def main(argv=None):
    """Transcribe everything that was asked for."""
    args = parse_arguments(argv)
    check_files(args)
    import keras_usm_lite as usm

    recognizer, streaming = open_recognizer(usm, args)
    rate = recognizer.sample_rate if streaming else args.sample_rate
    step = recognizer.step if streaming else rate
    sources = [(path, recording(path, rate, step)) for path in args.audio] or [("microphone", microphone(rate))]
    for name, pieces in sources:
        print(name)
        text, seconds, samples = hear_stream(recognizer, pieces) if streaming else hear_whole(recognizer, pieces, rate)
        duration = samples / rate
        print(f"  {text}")
        print(f"  {duration:.2f} s of audio in {seconds:.3f} s, real-time factor {seconds / max(duration, 1e-9):.4f}")


if __name__ == "__main__":
    main()
