"""What a spectrum may be without: in bytes, truncated, and in predictions."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from optuna_ttp.dynamics import SGD
from optuna_ttp.prediction import TrainingTimePredictor
from optuna_ttp.spectrum import blob
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.task import FineTuningTask
from tests.models import mlp
from tests.models import vectors
from tests.probes import probed_spectrum


@cache
def _whole() -> Spectrum:
    """A spectrum with all there is."""
    x, y = vectors(9)
    return probed_spectrum(FineTuningTask(mlp(), (x, y), validation_data=(x[:4] + 0.1, y[:4])))


def test_bytes_keep_probe_validation_and_weight_outputs() -> None:
    one = _whole()
    again = Spectrum.from_bytes(one.to_bytes())
    for part in ("probe", "validation", "saturation"):
        before, after = getattr(one, part), getattr(again, part)
        assert vars(before).keys() == vars(after).keys()
        for name, values in vars(before).items():
            if name == "reason":
                assert after.reason == values
                continue
            assert getattr(after, name).dtype == values.dtype
            np.testing.assert_array_equal(getattr(after, name), values)
    assert one.weight_outputs is not None
    assert again.weight_outputs is not None
    np.testing.assert_array_equal(again.weight_outputs, one.weight_outputs)
    assert again.to_bytes() == one.to_bytes()


_PARTS = ("probe", "validation", "weight_outputs", "saturation")


@pytest.mark.parametrize("missing", _PARTS)
def test_bytes_without_a_part(missing: str) -> None:
    changed: dict[str, Any] = {missing: None}
    again = Spectrum.from_bytes(replace(_whole(), **changed).to_bytes())
    for name in _PARTS:
        assert (getattr(again, name) is None) == (name == missing)


def test_a_spectrum_without_its_optional_parts_predicts_what_it_can() -> None:
    one = replace(_whole(), weight_outputs=None, validation=None, probe=None, saturation=None)
    predictor = TrainingTimePredictor(one, target_fraction=0.6)
    assert predictor.spectrum.probe is None
    assert predictor.predict(0.05, 9).outcome == "converges"
    with pytest.raises(ValueError, match=r"computed by an older version. Compute it again"):
        TrainingTimePredictor(one, target_fraction=0.6, optimizer=SGD(weight_decay=0.1))
    with pytest.raises(ValueError, match="needs validation data"):
        TrainingTimePredictor(one, target_validation_accuracy=0.9)


@pytest.mark.parametrize(
    "missing", ["probe.fractions", "validation.targets", "eigenvalues", "saturation.sgd_ratios"]
)
def test_bytes_without_an_array_are_refused(missing: str) -> None:
    content = blob.from_bytes(_whole().to_bytes())
    arrays = {name: array for name, array in content.arrays.items() if name != missing}
    with pytest.raises(ValueError, match="These bytes are no spectrum"):
        Spectrum.from_bytes(blob.to_bytes(content.meta, arrays))


def test_truncation_keeps_probe_saturation_and_weight_outputs() -> None:
    cut = _whole().truncate(rank=4)
    assert cut.saturation is _whole().saturation
    assert cut.probe is _whole().probe
    assert cut.weight_outputs is _whole().weight_outputs
