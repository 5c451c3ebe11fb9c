"""The search: which candidates of a space to measure next.

Neighbours of the default and random candidates first, then batches of those that a regression on what was measured finds best, with
some random ones among them.

meta_schedule of TVM does not serve here: it measures single functions of static shapes, and a candidate is a whole layer of
symbolic ones, whose kernels, host and threads are timed together beside the default; its database is keyed on a graph that changes
between releases of TVM, and its cost model answers at random for the first hundred samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ..errors import without_compiler

FIRST = 16  # candidates before the model is asked
NEAR = 8  # of them, those that differ from the default in one knob: it is good on most layers, so that the best is seldom far away
BATCH = 8
_EXPLORED = 2  # random ones in a batch
_FAILED_RATIO = 2.0  # what the model is told of a candidate that failed
_MODEL = {"max_depth": 3, "eta": 0.1, "subsample": 0.8, "lambda": 3.0, "nthread": 1, "seed": 0}
_BOOSTING_ROUNDS = 80
_LOG_FROM = 4.0  # values of a knob that grow by so much in all are compared by their logarithms


class Search:
    """Picks candidates of a list, and learns from what became of them.

    Args:
        candidates: all of them, with the same knobs each.
        default: what the ratios are relative to.
        seed: the same seed and the same answers give the same picks.
    """

    def __init__(self, candidates: Sequence[Mapping[str, int]], default: Mapping[str, int], seed: int) -> None:
        self.candidates = list(candidates)
        self._index = {_key(candidate): index for index, candidate in enumerate(self.candidates)}
        self._features = _features([*self.candidates, default])
        self._rng = np.random.default_rng([seed, len(self.candidates)])
        order = [int(i) for i in self._rng.permutation(len(self.candidates))]
        near = [i for i in order if _differences(self.candidates[i], default) == 1][:NEAR]
        self._order = near + [i for i in order if i not in near]
        self.ratios: dict[int, float] = {}
        self._default = self._index.get(_key(default))
        if self._default is not None:
            self.ratios[self._default] = 1.0

    def learn(self, candidate: Mapping[str, int], ratio: float | None) -> None:
        """What was measured, relative to the default; None for a candidate that failed. Others than the list's are ignored."""
        if (index := self._index.get(_key(candidate))) is not None:
            self.ratios[index] = _FAILED_RATIO if ratio is None else ratio

    def next(self, count: int = BATCH) -> list[Mapping[str, int]]:
        """Up to `count` candidates that were not measured yet; none when all were."""
        left = [index for index in self._order if index not in self.ratios]
        known = len(self.ratios)
        if known < FIRST:
            return [self.candidates[index] for index in left[: max(1, min(count, FIRST - known))]]
        predicted = self._predicted()
        best = sorted(left, key=lambda index: (predicted[index], index))[: max(0, count - _EXPLORED)]
        others = [index for index in left if index not in best][: count - len(best)]
        return [self.candidates[index] for index in (*best, *others)]

    def best(self, count: int) -> list[Mapping[str, int]]:
        """Up to `count` measured candidates that are faster than the default by the model, the fastest first.

        The model has seen a knob's value in many candidates: what it says of one is less a matter of luck than its own times.
        """
        enough = len(self.ratios) >= FIRST
        logs = self._predicted() if enough else {index: math.log(ratio) for index, ratio in self.ratios.items()}
        measured = sorted(self.ratios.keys() - {self._default}, key=lambda index: (float(logs[index]), index))
        return [self.candidates[index] for index in measured if logs[index] < 0 and self.ratios[index] < _FAILED_RATIO][:count]

    def _predicted(self) -> npt.NDArray[np.float64]:
        """Expected logarithm of each candidate's ratio."""
        try:
            import xgboost  # here, because it takes a second to import
        except ModuleNotFoundError as error:
            raise without_compiler(error) from None
        known = sorted(self.ratios)
        told = xgboost.DMatrix(self._features[known], label=[math.log(self.ratios[index]) for index in known])
        model = xgboost.train(_MODEL, told, num_boost_round=_BOOSTING_ROUNDS)
        found: npt.NDArray[np.float64] = np.asarray(model.predict(xgboost.DMatrix(self._features[:-1])), np.float64)
        return found


def _key(candidate: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(candidate.items()))


def _differences(one: Mapping[str, int], other: Mapping[str, int]) -> int:
    return sum(one[name] != other[name] for name in other)


def _features(candidates: Sequence[Mapping[str, int]]) -> npt.NDArray[np.float64]:
    """A row for each candidate: its knobs in order, sizes by their logarithms."""
    names = sorted(candidates[0])
    table = np.array([[candidate[name] for name in names] for candidate in candidates], np.float64)
    wide = table.min(axis=0) * _LOG_FROM <= table.max(axis=0)
    table[:, wide] = np.log2(np.maximum(table[:, wide], 0.5))  # 0, which is never, comes before 1
    return table
