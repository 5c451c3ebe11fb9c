"""The proof's measure of errors: what cancels in a narrow layer is forgiven, what is wrong is not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from helpers import TINY

import moegen
from moegen import reference, verification


def test_what_is_left_of_a_token_that_cancels_is_rounding() -> None:
    expected = np.array([[1.0], [1e-6]])
    made = expected + 1e-7
    assert verification._errors(made, expected)[1] > 1e-5, "relative to the second token, which has cancelled"
    assert verification._errors(made, expected, least_rms=1.0) == pytest.approx((1e-7, 1e-7), rel=0.5)
    assert verification._errors(expected * 1.1, expected, least_rms=1.0)[0] > 0.05, "what is wrong is off by much more"


@pytest.mark.parametrize("factor", [1.05, 0.0])
def test_a_wrong_narrow_layer_is_refused(
    built: Callable[..., moegen.Artifact], monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """As if the module computed the experts' products a little, or entirely, wrong."""
    artifact = built(**TINY)
    assert min(artifact.config.hidden, artifact.config.intermediate) < verification.NARROW
    assert verification.verify(artifact, 1)["status"] == "passed"
    right = reference.experts
    monkeypatch.setattr(verification.reference, "experts", lambda *about: factor * right(*about))
    report = verification.verify(artifact, 1)
    assert report["status"] == "failed"
    assert any("relative L2" in failure for failure in report["failures"])
