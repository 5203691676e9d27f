"""`SpeechTask`: a corpus ready to train on: tokeniser, features, batches."""

import dataclasses
import os
import warnings
import zlib

import numpy as np
from keras import backend, ops

from keras_usm_lite.data.audio import AudioError, load_audio
from keras_usm_lite.data.corpora.cache import cache_home
from keras_usm_lite.data.feature_cache import FeatureCache
from keras_usm_lite.data.manifest import (
    BadRow,
    ManifestError,
    check_policy,
    find_problem,
    frames_needed,
    list_problems,
    read_manifest,
    report_problems,
)
from keras_usm_lite.data.speech_batches import SpeechBatches
from keras_usm_lite.data.text import normalize_text
from keras_usm_lite.decoding import greedy_decode
from keras_usm_lite.layers.log_mel import LogMel
from keras_usm_lite.tokenizers.char_tokenizer import CharTokenizer
from keras_usm_lite.tokenizers.word_tokenizer import WordTokenizer

SUBSAMPLING = 4  # frames per output frame of `ConvSubsampling`
SHOWN_CHARACTERS = 60  # characters of a text in a message


@dataclasses.dataclass(frozen=True)
class SpeechTask:
    """Everything that training and evaluation on one corpus need.

    Attributes:
        corpus: the `Corpus`.
        tokenizer: made from the training texts, words or characters as the corpus says.
        frontend: the `LogMel` layer behind the features.
        utterances: `{split: list of Utterance}`, broken rows left out.
        batches: `{split: SpeechBatches}`; training batches are shuffled, the others are in a fixed order.
        problems: `{split: list of BadRow}`: every row that was left out, with path and reason.
    """

    corpus: object
    tokenizer: object
    frontend: LogMel
    utterances: dict
    batches: dict
    problems: dict

    @classmethod
    def prepare(
        cls,
        corpus,
        frontend=None,
        batch_frames=4000,
        seed=0,
        cache_dir=None,
        on_bad="skip",
        subsampling=SUBSAMPLING,
        **batching,
    ):
        """Read the manifests, check every row, compute the features once (cached on disk) and plan the batches.

        A row is bad if `check_utterances` says so, or if its recording holds no samples, cannot be decoded, is shorter
        than a frame of the front end, or gives CTC fewer output frames than its text needs. Texts of "test" and of any
        "test-..." are not checked: what the tokenizer cannot spell counts as an error of the recogniser. Texts are
        taken as they stand; a warning says if there are some that `normalize_text` would change.

        Args:
            corpus: a `Corpus` with splits "train", "dev" and "test", perhaps more such as "test-other".
            frontend: a `LogMel` layer, the default one if None; or any layer from audio `[1, samples]` to features
                `[1, frames, bins]` with `sample_rate`, `fft_length`, `num_frames(samples)` and a `get_config()` that
                changes with the features.
            batch_frames: frames per training batch, padding included.
            seed: seed of the training order.
            cache_dir: folder of the feature cache; by default below the corpora's cache.
            on_bad: "skip" leaves bad rows out and warns once, with their number and the first few; "raise" raises, for
                rows that can be judged without reading audio before any is read.
            subsampling: frames of features per output frame of the model; 4 in `USMForCTC`.
            **batching: further arguments of the `SpeechBatches`, but of those for testing, which are always whole:
                `shard`, `batch_multiple`, `num_buckets`.

        Returns:
            A `SpeechTask`.

        Raises:
            ManifestError: a manifest cannot be read, no row of a split can be used, or there are bad rows and `on_bad`
                is "raise".
            ValueError: `on_bad` is neither "skip" nor "raise", or `subsampling` is below 1.
        """
        check_policy(on_bad)
        if subsampling < 1:
            raise ValueError(f"subsampling={subsampling!r}: allowed are whole numbers from 1, frames per output frame.")
        frontend = frontend if frontend is not None else LogMel()
        rows = {split: read_manifest(path) for split, path in corpus.splits.items()}
        total = sum(map(len, rows.values()))
        tokenizer_class = WordTokenizer if corpus.tokens == "word" else CharTokenizer
        tokenizer = tokenizer_class.from_texts([utterance.text for utterance in rows["train"]])
        encoders = {split: None if _is_test(split) else tokenizer.encode for split in rows}
        _warn_of_unusual_texts([utterance.text for split in rows.values() for utterance in split])
        _warn_of_shared_recordings(rows)
        folder = cache_dir if cache_dir is not None else os.path.join(cache_home(), "features")

        problems = {split: [] for split in rows}
        for split, path in corpus.splits.items():
            reasons = [find_problem(row, encoders[split], frames_per_second=None) for row in rows[split]]
            rows[split], _ = _sift(path, rows[split], reasons, problems[split])
        if on_bad == "raise":
            report_problems(_all(problems), total, on_bad)
        utterances, batches = {}, {}
        for split, path in corpus.splits.items():
            name = f"{corpus.name}-{zlib.crc32(os.path.abspath(path).encode()):08x}-{split}"
            cache = _features(rows[split], frontend, os.path.join(folder, name))
            labels = [encoders[split](row.text) if encoders[split] else [1] for row in rows[split]]
            reasons = [
                cache.problems.get(number) or _alignment_problem(-(-frames // subsampling), labels[number])
                for number, frames in enumerate(cache.num_frames.tolist())
            ]
            utterances[split], kept = _sift(path, rows[split], reasons, problems[split])
            training = split == "train"
            batches[split] = SpeechBatches(
                cache.select(kept),
                [labels[number] for number in kept],
                batch_frames=batch_frames if training else 4 * batch_frames,
                shuffle=training,
                seed=seed,
                **({} if _is_test(split) else batching),
            )
        report_problems(_all(problems), total, on_bad)
        return cls(corpus, tokenizer, frontend, utterances, batches, problems)

    def transcribe(self, predict, split, decode=greedy_decode):
        """Recognise every utterance of a split.

        Args:
            predict: function from batch inputs to logits, such as `model.predict_on_batch`.
            split: "dev" or "test".
            decode: function from logits to one label sequence per row.

        Returns:
            `(references, hypotheses)` in the order of `utterances[split]`, with a `shard` those of its utterances.
            References are the texts of the manifest, also where the tokeniser could not spell them.
        """
        hypotheses, batches = {}, self.batches[split]
        for number in range(len(batches)):
            labels = decode(predict(batches[number][0]))
            for row, index in enumerate(batches.batch_indices(number)):
                hypotheses[index] = self.tokenizer.decode(labels[row])
        heard = sorted(hypotheses)
        return [self.utterances[split][index].text for index in heard], [hypotheses[index] for index in heard]

    def labelled(self, split):
        """Return the batches of a split with the labels of its texts, as `usm.verify_litert` takes them.

        The batches of "test" have no labels of their own, so that nothing trains on them by mistake.

        Returns:
            A list of `(x, labels, sample_weight)`.

        Raises:
            ValueError: a text that the tokenizer cannot spell.
        """
        batches, found = self.batches[split], []
        for number in range(len(batches)):
            x, _, weight = batches[number]
            rows = [
                self.tokenizer.encode(self.utterances[split][index].text) for index in batches.batch_indices(number)
            ]
            rows += [[]] * (len(weight) - len(rows))
            length = max(map(len, rows))
            found.append((x, np.array([row + [0] * (length - len(row)) for row in rows], "int32"), weight))
        return found

    def calibration_batch(self, recordings=128, frames=300):
        """Return one batch of training features for `usm.one_shot`: recordings of about equal length, little padding.

        Args:
            recordings: how many; those nearest to `frames`, fewer if there are not so many.
            frames: frames of each, cut or padded with zeros. All together should be ten times the inputs of the widest
                layer, after subsampling.

        Returns:
            `{"features": float32 [recordings, frames, bins], "lengths": int [recordings]}`.

        Raises:
            ValueError: less than one recording or frame.
        """
        if recordings < 1 or frames < 1:
            raise ValueError(
                f"recordings={recordings!r} and frames={frames!r} must be at least 1; 128 and 300 are usual."
            )
        rate = round(self.frontend.num_frames(10 * self.frontend.sample_rate) / 10)  # frames a second
        nearest = sorted(self.utterances["train"], key=lambda utterance: abs(rate * utterance.duration - frames))
        rows = [features_of(self.audio(row), self.frontend)[:frames] for row in nearest[:recordings]]
        features = np.zeros((len(rows), frames, rows[0].shape[1]), np.float32)
        for row, values in zip(features, rows, strict=True):
            row[: len(values)] = values
        return {"features": features, "lengths": np.array([len(values) for values in rows])}

    def audio(self, utterance):
        """Return the samples of an utterance, float32 at the front end's sample rate."""
        return load_audio(utterance.path, self.frontend.sample_rate)


def _warn_of_unusual_texts(texts):
    changed = [text for text in texts if normalize_text(text) != " ".join(text.split())]
    if changed:
        first, normal = changed[0][:SHOWN_CHARACTERS], normalize_text(changed[0])[:SHOWN_CHARACTERS]
        warnings.warn(
            f"{len(changed)} of {len(texts)} texts are not in the form of usm.data.normalize_text, the first is "
            f"{first!r} ({normal!r} in that form). Case, punctuation and Unicode forms make "
            "other words and letters, in training and in error rates; if that is not meant, normalise the manifests.",
            stacklevel=3,
        )


def _warn_of_shared_recordings(rows):
    known = {row.path for row in rows["train"]}
    for split in sorted(rows.keys() - {"train"}):
        shared = [row.path for row in rows[split] if row.path in known]
        if shared:
            warnings.warn(
                f"{len(shared)} recordings of {split} are in train too, the first is {shared[0]}. So error rates of "
                f"{split} are partly of speech that was heard before; take them out of one of the manifests.",
                stacklevel=3,
            )


def _is_test(split):
    return split == "test" or split.startswith("test-")


def _sift(path, rows, reasons, problems):
    """Return the rows of a manifest that have no reason against them, with their positions; note the others."""
    kept = [number for number, reason in enumerate(reasons) if reason is None]
    problems += [BadRow(row.path, reason) for row, reason in zip(rows, reasons, strict=True) if reason is not None]
    if not kept:
        raise ManifestError(
            f"{path}: none of its utterances can be used; check the paths of the audio files.{list_problems(problems)}"
        )
    return [rows[number] for number in kept], kept


def _all(problems):
    return [row for rows in problems.values() for row in rows]


def _alignment_problem(given, labels):
    needed = frames_needed(labels)
    return None if given >= needed else f"CTC needs {needed} output frames for the text, the recording gives {given}"


def _features(utterances, frontend, path):
    """Return the features of utterances; recordings shorter than a frame are problems of the cache."""

    def extract(audio):
        if frontend.num_frames(len(audio)) < 1:
            raise AudioError(f"{len(audio)} samples are too short, one frame takes {frontend.fft_length}; remove it.")
        return features_of(audio, frontend)

    config = frontend.get_config() | {"dtype": frontend.compute_dtype}
    settings = sorted((name, value) for name, value in config.items() if name not in ("name", "trainable"))
    key = f"{type(frontend).__name__} {settings}"
    # A file of its own for each front end: runs with different ones may work side by side.
    return FeatureCache(utterances, extract, f"{path}-{zlib.crc32(key.encode()):08x}", key, frontend.sample_rate)


def features_of(audio, frontend):
    """Return the features of one recording, `[frames, bins]`.

    JAX compiles for every length anew, so for it lengths are rounded up to whole seconds.

    Example:

    >>> features_of(np.zeros(16000, np.float32), LogMel()).shape
    (97, 80)
    """
    samples = len(audio)
    if backend.backend() != "jax" or not isinstance(frontend, LogMel):
        return ops.convert_to_numpy(frontend(audio[None]))[0]
    audio = np.pad(audio, (0, -samples % frontend.sample_rate))
    features = frontend(audio[None], lengths=np.array([samples], "int32"))
    return ops.convert_to_numpy(features)[0, : frontend.num_frames(samples)]
