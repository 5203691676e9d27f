"""Batches of utterances of similar length for `model.fit`, the same on every backend."""

import keras
import numpy as np

LONG = 5  # times the last quantile but one: from here on an utterance is unusually long


class SpeechBatches(keras.utils.PyDataset):
    """Length-bucketed batches with a small, fixed set of shapes.

    Utterances are put into buckets by their frame counts. Bucket `k` is as long as the quantile
    `(k + 1) / num_buckets`, rounded up to a multiple of 8, and has the fixed batch size
    `max(1, batch_frames // length)` (rounded to `batch_multiple`). Utterances more than five times as long as the last
    quantile but one have a bucket more for themselves, so that a few do not pad a whole quantile.
    The last batch of a bucket is filled with empty rows (zero features, length 0, no labels, weight 0), so
    each utterance is seen exactly once an epoch.

    The order is a function of `(seed, epoch)` only. Pass `shuffle=False` to `model.fit`, which otherwise
    shuffles the batches once more, with Python's global generator. `fit` ends an epoch before its first one;
    to tie the order to the epoch number, and so to resume an interrupted training, add the callback
    `keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: batches.set_epoch(epoch))`.

    An item is `(x, y, sample_weight)`:

    - `x`: dict of `features`, float32 `[B, T, F]`, and `lengths`, int32 `[B]`, in frames;
    - `y`: labels, int32 `[B, L]`, padded with 0;
    - `sample_weight`: float32 `[B]`, 1 for utterances and 0 for empty rows.

    Args:
        features: Indexable `features[i]`, float `[frames, F]`, with `num_frames`, such as `FeatureCache`.
        labels: One list of int labels, each at least 1, per utterance.
        batch_frames: Frames in a batch, padding included. A longer utterance is a batch of its own.
        num_buckets: Usual number of buckets; fewer are made if lengths coincide. 1 is one shape for all.
        shuffle: Whether to reorder utterances and batches each epoch. Otherwise the order is fixed.
        seed: Non-negative int that the orders are derived from.
        max_label_length: `L`; the longest label sequence if None.
        shard: `(index, count)`: batches of part `index` of `count` disjoint parts. All parts have batches of
            the same shapes in the same order.
        batch_multiple: Rows of every batch are a multiple of this, at least one multiple even where that exceeds
            `batch_frames`: the number of devices that share a batch.
        **pydataset_kwargs: Arguments of `keras.utils.PyDataset`. `workers` must stay 1; `to_tf_dataset` loads
            in parallel.

    Raises:
        ValueError: No utterances, an empty one, unequal numbers of features and labels, labels too long or below
            1, several workers, or an argument out of range.

    Example:
    >>> class Silence(list):
    ...     num_frames = property(lambda self: np.array([len(f) for f in self]))
    >>> features = Silence(np.zeros((n, 2), "float32") for n in (5, 7, 30))
    >>> batches = SpeechBatches(features, [[1], [2, 2], [3]], batch_frames=32, num_buckets=2, shuffle=False)
    >>> batches.bucket_shapes
    [(4, 8), (1, 32)]
    >>> x, y, sample_weight = batches[0]
    >>> x["features"].shape, x["lengths"].tolist(), y.tolist(), sample_weight.tolist()
    ((4, 8, 2), [5, 7, 0, 0], [[1, 0], [2, 2], [0, 0], [0, 0]], [1.0, 1.0, 0.0, 0.0])
    """

    def __init__(
        self,
        features,
        labels,
        *,
        batch_frames=12000,
        num_buckets=4,
        shuffle=True,
        seed=0,
        max_label_length=None,
        shard=(0, 1),
        batch_multiple=1,
        **pydataset_kwargs,
    ):
        super().__init__(**pydataset_kwargs)
        if self.workers > 1 or self.use_multiprocessing:
            # Keras hands batches that its workers read ahead in one epoch out in the next one.
            raise ValueError(
                f"workers={self.workers}, use_multiprocessing={self.use_multiprocessing}: with Keras workers "
                "some utterances would be seen twice and others not at all. Allowed is one worker without "
                "multiprocessing; to load in parallel, use `to_tf_dataset`."
            )
        num_frames = np.asarray(features.num_frames)
        if not len(num_frames):
            raise ValueError("There are no utterances to batch; pass features of at least one.")
        if num_frames.min() < 1:
            raise ValueError(f"Utterance {num_frames.argmin()} has {num_frames.min()} frames; leave it out.")
        if len(labels) != len(num_frames):
            raise ValueError(f"{len(num_frames)} utterances have {len(labels)} label lists; pass one for each.")
        for name, value in (
            ("batch_frames", batch_frames),
            ("num_buckets", num_buckets),
            ("batch_multiple", batch_multiple),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}; allowed are integers of at least 1.")
        if not 0 <= shard[0] < shard[1]:
            raise ValueError(f"shard is {shard}; allowed are pairs (index, count) with 0 <= index < count.")
        self._features = features
        self._labels = _pad_labels(labels, max_label_length)
        self._shuffle = shuffle
        self._seed = seed
        self._shard = shard
        lengths = _bucket_lengths(num_frames, num_buckets)
        bucket = np.searchsorted(lengths, num_frames)
        self._members = [np.flatnonzero(bucket == k) for k in range(len(lengths))]
        multiples = [max(1, batch_frames // (length * batch_multiple)) for length in lengths]
        self.bucket_shapes = [(k * batch_multiple, length) for k, length in zip(multiples, lengths, strict=True)]
        self.feature_size = features[0].shape[1]
        self.label_size = self._labels.shape[1]
        self.set_epoch(0)

    def __len__(self):
        return len(self._plan)

    def __getitem__(self, index):
        return self.make_batch(*self._plan[index])

    def on_epoch_end(self):
        """Moves on to the order of the next epoch."""
        self.set_epoch(self.epoch + 1)

    def set_epoch(self, epoch):
        """Takes the order of a given epoch.

        Args:
            epoch: Number of the epoch, from 0.
        """
        self.epoch = epoch
        self._plan = self.plan(epoch)

    def batch_indices(self, index):
        """Returns which utterances a batch holds, row by row, without the empty rows.

        Args:
            index: Number of the batch in the present order.

        Returns:
            A list of int positions in `features` and `labels`.
        """
        return self._plan[index][1].tolist()

    def check_alignments(self, output_frames):
        """Refuses utterances that a CTC model cannot align: more labels, with a blank between equal ones, than frames.

        Args:
            output_frames: Function from the frames of an utterance to the frames that the model makes of them.

        Raises:
            ValueError: Utterances have too few frames; all are counted, the first is named.
        """
        repeats = (self._labels[:, 1:] == self._labels[:, :-1]) & (self._labels[:, 1:] > 0)
        needed = (self._labels > 0).sum(axis=1) + repeats.sum(axis=1)
        lengths, inverse = np.unique(self._features.num_frames, return_inverse=True)
        given = np.array([output_frames(int(length)) for length in lengths])[inverse]
        bad = np.flatnonzero(needed > given)
        if len(bad):
            first = bad[0]
            raise ValueError(
                f"{len(bad)} of {len(needed)} utterances cannot be aligned with their labels: features[{first}] gives "
                f"{given[first]} output frames, CTC needs {needed[first]} for labels[{first}]. Leave them out "
                "(`data.check_utterances` does), or correct the labels."
            )

    def plan(self, epoch):
        """Returns the batches of an epoch without loading them.

        Args:
            epoch: Number of the epoch, from 0.

        Returns:
            A list of `(bucket, indices)`: the position in `bucket_shapes` and the utterances, int64 `[<= B]`.
        """
        rng = np.random.default_rng([self._seed, epoch])
        part, num_parts = self._shard
        batches = []
        for bucket, (members, (size, _)) in enumerate(zip(self._members, self.bucket_shapes, strict=True)):
            order = rng.permutation(members) if self._shuffle else members
            num_batches = -(-len(members) // (size * num_parts))
            share = order[part::num_parts]
            batches += [(bucket, share[k * size : (k + 1) * size]) for k in range(num_batches)]
        if self._shuffle:
            batches = [batches[k] for k in rng.permutation(len(batches))]
        # On TensorFlow, fit infers which dimensions vary from the first two batches, so these must differ.
        other = next((k for k, batch in enumerate(batches) if batch[0] != batches[0][0]), None)
        if other is not None:
            batches[1], batches[other] = batches[other], batches[1]
        return batches

    def make_batch(self, bucket, indices):
        """Loads a batch that `plan` names.

        Args:
            bucket: Position in `bucket_shapes`.
            indices: Utterances, int `[<= B]`.

        Returns:
            `(x, y, sample_weight)`, see the class.
        """
        size, num_frames = self.bucket_shapes[bucket]
        features = np.zeros((size, num_frames, self.feature_size), dtype=np.float32)
        lengths = np.zeros(size, dtype=np.int32)
        for row, index in enumerate(indices):
            utterance = self._features[int(index)]
            lengths[row] = len(utterance)
            features[row, : len(utterance)] = utterance
        labels = np.zeros((size, self.label_size), dtype=np.int32)
        labels[: len(indices)] = self._labels[indices]
        sample_weight = (np.arange(size) < len(indices)).astype(np.float32)
        return {"features": features, "lengths": lengths}, labels, sample_weight


def _bucket_lengths(num_frames, num_buckets):
    fractions = np.arange(1, num_buckets + 1) / num_buckets
    quantiles = np.quantile(num_frames, fractions, method="inverted_cdf")
    if num_buckets > 1:
        usual = num_frames[num_frames <= LONG * quantiles[-2]]
        quantiles = np.append(quantiles, usual.max())
    return np.unique(np.maximum(8, -(-quantiles // 8) * 8)).astype(int).tolist()


def _pad_labels(labels, max_label_length):
    longest = max(map(len, labels))
    size = max(1, longest) if max_label_length is None else max_label_length
    if longest > size:
        raise ValueError(
            f"The longest label sequence has {longest} labels, max_label_length is {size}; "
            f"pass at least {longest} or leave the utterance out."
        )
    padded = np.zeros((len(labels), size), dtype=np.int32)
    for row, sequence in enumerate(labels):
        if len(sequence) and min(sequence) < 1:
            raise ValueError(
                f"labels[{row}] holds {min(sequence)}; allowed are integers of at least 1, since 0 is the "
                "blank and the padding. Shift the labels."
            )
        padded[row, : len(sequence)] = sequence
    return padded
