"""`SpeechTask`: a corpus ready to train on: tokeniser, features, batches."""

import dataclasses
import os

import numpy as np
from keras import ops

from keras_usm_lite.data.audio import load_audio
from keras_usm_lite.data.corpora.cache import cache_home
from keras_usm_lite.data.feature_cache import FeatureCache
from keras_usm_lite.data.manifest import check_utterances, read_manifest
from keras_usm_lite.data.speech_batches import SpeechBatches
from keras_usm_lite.decoding import greedy_decode
from keras_usm_lite.layers.log_mel import LogMel
from keras_usm_lite.tokenizers.char_tokenizer import CharTokenizer
from keras_usm_lite.tokenizers.word_tokenizer import WordTokenizer


@dataclasses.dataclass(frozen=True)
class SpeechTask:
    """Everything that training and evaluation on one corpus need.

    Attributes:
        corpus: the `Corpus`.
        tokenizer: made from the training texts, words or characters as the corpus says.
        frontend: the `LogMel` layer behind the features.
        utterances: `{split: list of Utterance}`, broken rows left out (and warned about).
        batches: `{split: SpeechBatches}`; training batches are shuffled, the others are in a fixed order.
    """

    corpus: object
    tokenizer: object
    frontend: LogMel
    utterances: dict
    batches: dict

    @classmethod
    def prepare(cls, corpus, frontend=None, batch_frames=4000, seed=0, cache_dir=None, **batching):
        """Read the manifests, check every row, compute the features once (cached on disk) and plan the batches.

        Args:
            corpus: a `Corpus` with splits "train", "dev" and "test".
            frontend: a `LogMel` layer; the default one if None.
            batch_frames: frames per training batch, padding included.
            seed: seed of the training order.
            cache_dir: folder of the feature cache; by default below the corpora's cache.
            **batching: further arguments of the `SpeechBatches` of "train" and "dev": `shard`, `batch_multiple`,
                `num_buckets`. "test" is always whole.

        Returns:
            A `SpeechTask`.
        """
        frontend = frontend if frontend is not None else LogMel()
        splits = {split: read_manifest(path) for split, path in corpus.splits.items()}
        tokenizer_class = WordTokenizer if corpus.tokens == "word" else CharTokenizer
        tokenizer = tokenizer_class.from_texts([utterance.text for utterance in splits["train"]])
        folder = cache_dir if cache_dir is not None else os.path.join(cache_home(), "features")
        os.makedirs(folder, exist_ok=True)
        utterances, batches = {}, {}
        for split, rows in splits.items():
            good, _ = check_utterances(rows, encode=tokenizer.encode if split != "test" else None)
            path = os.path.join(folder, f"{corpus.name}-{split}")
            cache = FeatureCache(good, _extractor(frontend), path, _key(frontend))
            labels = [tokenizer.encode(utterance.text) if split != "test" else [1] for utterance in good]
            training = split == "train"
            utterances[split] = good
            batches[split] = SpeechBatches(
                cache,
                labels,
                batch_frames=batch_frames if training else 4 * batch_frames,
                shuffle=training,
                seed=seed,
                **(batching if split != "test" else {}),
            )
        return cls(corpus, tokenizer, frontend, utterances, batches)

    def transcribe(self, predict, split, decode=greedy_decode):
        """Recognise every utterance of a split.

        Args:
            predict: function from batch inputs to logits, such as `model.predict_on_batch`.
            split: "dev" or "test".
            decode: function from logits to one label sequence per row.

        Returns:
            `(references, hypotheses)` in the order of `utterances[split]`. References are the texts of the manifest,
            also where the tokeniser could not spell them.
        """
        hypotheses = [None] * len(self.utterances[split])
        batches = self.batches[split]
        for number in range(len(batches)):
            labels = decode(predict(batches[number][0]))
            for row, index in enumerate(batches.batch_indices(number)):
                hypotheses[index] = self.tokenizer.decode(labels[row])
        return [utterance.text for utterance in self.utterances[split]], hypotheses

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

    def audio(self, utterance):
        """Return the samples of an utterance, float32 at the front end's sample rate."""
        return load_audio(utterance.path, self.frontend.sample_rate)


def _extractor(frontend):
    def extract(audio):
        return ops.convert_to_numpy(frontend(audio[None]))[0]

    return extract


def _key(frontend):
    return repr(sorted((k, v) for k, v in frontend.get_config().items() if k not in ("name", "trainable", "dtype")))
