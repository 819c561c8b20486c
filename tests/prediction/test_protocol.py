from __future__ import annotations

import pytest

from benchmarks.search.predictors import GivenTimesPredictor
from benchmarks.search.predictors import rule_of_thumb
from benchmarks.search.predictors import ShuffledPredictor
from benchmarks.search.table import Table
from optuna_ttp.prediction import check_predictor
from optuna_ttp.prediction import SearchPredictor
from tests.models import small_predictor


_GRID = {"learning_rate": (0.01, 0.02), "batch_size": (8,), "momentum": (0.0,)}


def _every_predictor() -> list[SearchPredictor]:
    predictor = small_predictor()
    table = Table("task", "metric", _GRID, {}, "minimize", n_epochs=1)
    shuffled = ShuffledPredictor.of(predictor, table, 0)
    return [predictor, shuffled, rule_of_thumb(predictor, table)]


def test_every_predictor_answers_a_search() -> None:
    for predictor in _every_predictor():
        check_predictor(predictor)
        assert len(predictor.fingerprint) == len(small_predictor().fingerprint)
        assert predictor.estimate([0.01, 0.02], 8).steps.shape == (2,)
        assert predictor.informed([]) is predictor


def test_what_a_predictor_lacks_is_named() -> None:
    class Unfinished:
        estimate = score = depth_after = seconds_per_step = max_learning_rate = informed = None
        n_samples = max_steps = target = target_depth = best_depth = calibration = None
        initial_loss = initial_loss_sd = throughput = observations = has_surface = None
        setup_seconds = default_momentum = 0.0

    with pytest.raises(
        TypeError,
        match=r"must be a TrainingTimePredictor but got Unfinished, which lacks fingerprint, "
        r"remaining_steps\.",
    ):
        check_predictor(Unfinished())
    with pytest.raises(TypeError, match=r"must be a TrainingTimePredictor but got str\."):
        check_predictor("small")


def test_checking_a_predictor_reads_none_of_its_properties() -> None:
    class Lazy(GivenTimesPredictor):
        @property
        def best_depth(self) -> float:
            raise AssertionError("It may take seconds.")

    check_predictor(Lazy(small_predictor(), lambda rate, batch_size, momentum: 1.0 / rate))
