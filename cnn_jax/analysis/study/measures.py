"""Measures of a classifier from its logits: top-k, F1, Brier score, calibration, their intervals.

All but top-k are functions of sums over the examples. So one product of a sparse matrix gives them for
the split itself and for all resamples of the bootstrap.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
import scipy.sparse
import scipy.special
import scipy.stats

BINS = 15
RESAMPLES, SEED, LEVEL = 1000, 0, 0.95
_AT_ONCE = 100  # resamples


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a network says of each example of a split, in the split's order.

    Attributes:
      label: int32 [N], the true class.
      logits: float32 [N, classes].
    """

    label: np.ndarray
    logits: np.ndarray

    @functools.cached_property
    def winner(self) -> np.ndarray:
        """The class of the highest logit: int [N]."""
        return self.logits.argmax(-1)

    @functools.cached_property
    def probabilities(self) -> np.ndarray:
        """float64 [N, classes]."""
        return scipy.special.softmax(self.logits.astype(np.float64), axis=-1)

    @functools.cached_property
    def probability(self) -> np.ndarray:
        """The highest probability: float64 [N]."""
        return self.probabilities.max(-1)

    @functools.cached_property
    def correct(self) -> np.ndarray:
        """bool [N]."""
        return self.winner == self.label

    def mistakes(self, count: int) -> np.ndarray:
        """Indices of the `count` most confident mistakes, the worst first."""
        wrong = np.flatnonzero(~self.correct)
        return wrong[np.argsort(-self.probability[wrong], kind="stable")][:count]

    def cooled(self, temperature: float) -> "Scores":
        """The scores with logits divided by `temperature`."""
        return Scores(self.label, self.logits / np.float32(temperature))


def measure(scores: Scores, class_names: tuple[str, ...]) -> dict[str, Any]:
    """The measures beyond loss and accuracy, as in evaluation.json.

    Args:
      scores: of N examples.
      class_names: of the logits.

    Returns:
      top_5_accuracy: the share whose class is among the five highest logits (None: fewer than six
        classes).
      macro: the means of precision, recall and F1 over the classes that occur as a label or as a
        prediction.
      classes: the three by class; None for a class that does not occur. A class that is never
        predicted has a precision of 0, one without examples a recall of 0.
      brier: the squared distance of the probabilities from the truth, summed over classes, 0 to 2.
      ece: expected calibration error (Guo et al. 2017) with 15 bins of equal width.
      reliability: count, confidence and accuracy of these bins; the means are None in an empty bin.
      intervals: bootstrap percentiles of accuracy, loss, brier, ece and macro_f1, and how they were
        drawn. ece is biased upwards in a resample, so its interval may lie above it.
    """
    classes = len(class_names)
    terms = _terms(scores)
    sums = _Sums((terms.T @ np.ones((len(scores.label), 1))).T, classes)
    precision, recall, f1 = (part[0] for part in sums.by_class())
    occurs = sums.occurs()[0]
    kinds = {"precision": precision, "recall": recall, "f1": f1}
    count, confidence, accuracy = (part[0] for part in sums.bins())
    return {
        "top_5_accuracy": top_k_accuracy(scores, 5) if classes > 5 else None,
        "macro": {kind: float(values[occurs].mean()) for kind, values in kinds.items()},
        "classes": {
            name: {kind: float(v[i]) if occurs[i] else None for kind, v in kinds.items()}
            for i, name in enumerate(class_names)
        },
        "brier": float(sums.values()["brier"][0]),
        "ece": float(sums.values()["ece"][0]),
        "reliability": [
            {
                "count": int(n),
                "confidence": float(c / n) if n else None,
                "accuracy": float(a / n) if n else None,
            }
            for n, c, a in zip(count, confidence, accuracy, strict=True)
        ],
        "intervals": {
            "level": LEVEL,
            "examples": len(scores.label),
            "resamples": RESAMPLES,
            "seed": SEED,
            **intervals(terms, classes),
        },
    }


def top_k_accuracy(scores: Scores, k: int) -> float:
    """The share of examples whose class has fewer than k higher logits."""
    own = np.take_along_axis(scores.logits, scores.label[:, None], 1)
    return float(((scores.logits > own).sum(1) < k).mean())


def intervals(terms: scipy.sparse.csr_array, classes: int) -> dict[str, list[float]]:
    """The percentile intervals of the bootstrap: [low, high] by measure."""
    random = np.random.default_rng(SEED)
    examples = terms.shape[0]
    found: dict[str, list[np.ndarray]] = {}
    for _ in range(RESAMPLES // _AT_ONCE):
        drawn = random.integers(examples, size=(_AT_ONCE, examples))
        weights = np.stack([np.bincount(row, minlength=examples) for row in drawn], 1)
        for name, values in _Sums((terms.T @ weights).T, classes).values().items():
            found.setdefault(name, []).append(values)
    ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    return {name: np.quantile(np.concatenate(v), ends).tolist() for name, v in found.items()}


def mcnemar(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """The exact test of McNemar (1947): do two networks make as many mistakes?

    Args:
      first: bool [N], whether the first network is right on each example.
      second: likewise, on the same examples.

    Returns:
      How many examples only the first, and only the second, has right; the p value of both being
      equally probable.
    """
    only = int((first & ~second).sum()), int((second & ~first).sum())
    p = scipy.stats.binomtest(only[0], sum(only)).pvalue if any(only) else 1.0
    return {"only_first_right": only[0], "only_second_right": only[1], "p": float(p)}


def losses(scores: Scores) -> np.ndarray:
    """The negative log-likelihood of each example: float64 [N]."""
    logits = scores.logits.astype(np.float64)
    own = np.take_along_axis(logits, scores.label[:, None], 1)[:, 0]
    return scipy.special.logsumexp(logits, axis=1) - own


def _terms(scores: Scores) -> scipy.sparse.csr_array:
    """What each example adds to the sums, [N, 3 + 3 * classes + 3 * BINS], mostly zeros."""
    examples, classes = scores.logits.shape
    rows = np.arange(examples)
    confidence, correct = scores.probability, scores.correct
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)

    def put(column: np.ndarray, value: np.ndarray, width: int) -> scipy.sparse.csr_array:
        return scipy.sparse.csr_array((value, (rows, column)), (examples, width))

    one = np.ones(examples)
    truth = scores.probabilities[rows, scores.label]
    brier = (scores.probabilities**2).sum(1) - 2 * truth + 1
    parts = [
        scipy.sparse.csr_array(np.stack([correct, losses(scores), brier], 1)),
        put(scores.label, correct * one, classes),
        put(scores.label, one, classes),
        put(scores.winner, one, classes),
        put(place, one, BINS),
        put(place, confidence, BINS),
        put(place, correct * one, BINS),
    ]
    return scipy.sparse.hstack(parts, "csr")


@dataclasses.dataclass(frozen=True)
class _Sums:
    """Sums of `_terms` over a split, or over several resamples of it: [R, columns]."""

    sums: np.ndarray
    classes: int

    def _parts(self) -> list[np.ndarray]:
        widths = [3, *[self.classes] * 3, *[BINS] * 3]
        return np.split(self.sums, np.cumsum(widths)[:-1], axis=1)

    def occurs(self) -> np.ndarray:
        _, _, labels, winners = self._parts()[:4]
        return labels + winners > 0

    def by_class(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Precision, recall and F1: [R, classes]."""
        _, right, labels, winners = self._parts()[:4]
        f1 = 2 * right / np.maximum(labels + winners, 1)
        return right / np.maximum(winners, 1), right / np.maximum(labels, 1), f1

    def bins(self) -> list[np.ndarray]:
        """The number, the summed confidence and the number of correct examples: [R, BINS]."""
        return self._parts()[4:]

    def values(self) -> dict[str, np.ndarray]:
        """The measures that get an interval: [R] each."""
        count, confidence, correct = self.bins()
        examples = count.sum(1)
        means = self._parts()[0] / examples[:, None]
        occurs = self.occurs()
        return {
            "accuracy": means[:, 0],
            "loss": means[:, 1],
            "brier": means[:, 2],
            "ece": np.abs(confidence - correct).sum(1) / examples,
            "macro_f1": (self.by_class()[2] * occurs).sum(1) / occurs.sum(1),
        }
