from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
import pickle
from typing import Any

import numpy as np
import pytest

from optuna_ttp import HyperparameterMap
from optuna_ttp.study import Configuration
from optuna_ttp.study import MissingParameterError


PARAMS = {"learning_rate": 0.01, "batch_size": 32, "momentum": 0.9, "dropout": 0.1}


def test_parameters_are_read_by_their_default_names() -> None:
    assert HyperparameterMap().resolve(PARAMS) == Configuration(0.01, 32, 0.9)


def test_parameters_are_read_by_given_names() -> None:
    mapping = HyperparameterMap(learning_rate="lr", batch_size="bs", momentum="beta")
    assert mapping.resolve({"lr": 0.1, "bs": 8, "beta": 0.0}) == Configuration(0.1, 8, 0.0)


def test_numbers_are_fixed_values() -> None:
    mapping = HyperparameterMap(batch_size=64, momentum=0.5)
    assert mapping.resolve({"learning_rate": 0.1}) == Configuration(0.1, 64, 0.5)


def test_fixed_values_alone_need_no_parameter() -> None:
    assert HyperparameterMap(0.1, 64, 0.5).resolve({}) == Configuration(0.1, 64, 0.5)


def test_functions_compute_from_several_parameters() -> None:
    mapping = HyperparameterMap(
        learning_rate=lambda p: p["base_lr"] * 2 ** p["log2_batch"],
        batch_size=lambda p: 2 ** p["log2_batch"],
        momentum=0.0,
    )
    assert mapping.resolve({"base_lr": 0.01, "log2_batch": 3}) == Configuration(0.08, 8, 0.0)


@pytest.mark.parametrize("number", [np.float64, np.float32, float])
def test_values_come_out_as_plain_numbers(number: Callable[[float], Any]) -> None:
    params = {"learning_rate": number(0.5), "batch_size": number(16), "momentum": number(0)}
    resolved = HyperparameterMap().resolve(params)
    assert resolved == Configuration(0.5, 16, 0.0)
    assert resolved is not None
    assert [type(value) for value in resolved] == [float, int, float]


def test_a_function_that_returns_none_makes_the_map_not_apply() -> None:
    def momentum(params: Mapping[str, Any]) -> float | None:
        return params["momentum"] if params["optimizer"] == "sgd" else None

    mapping = HyperparameterMap(momentum=momentum)
    adam = {"optimizer": "adam", "learning_rate": 0.1, "batch_size": 8}
    assert mapping.resolve(adam) is None
    sgd = {**adam, "optimizer": "sgd", "momentum": 0.9}
    assert mapping.resolve(sgd) == Configuration(0.1, 8, 0.9)


def test_none_counts_even_where_a_parameter_of_the_other_branch_is_missing() -> None:
    mapping = HyperparameterMap(
        learning_rate="sgd_lr",
        batch_size=8,
        momentum=lambda p: 0.9 if p["optimizer"] == "sgd" else None,
    )
    assert mapping.resolve({"optimizer": "adam", "adam_lr": 0.1}) is None


def test_a_missing_parameter_is_named_with_those_that_there_are() -> None:
    mapping = HyperparameterMap(learning_rate="lr")
    with pytest.raises(MissingParameterError) as caught:
        mapping.resolve(PARAMS)
    assert isinstance(caught.value, ValueError)
    message = str(caught.value)
    assert "learning_rate from the parameter 'lr'" in message
    assert "['batch_size', 'dropout', 'learning_rate', 'momentum']" in message
    assert "HyperparameterMap(learning_rate=0.01)" in message


def test_a_parameter_that_a_function_misses_is_named() -> None:
    mapping = HyperparameterMap(batch_size=lambda p: 2 ** p["log2_bach"])
    with pytest.raises(MissingParameterError, match="batch_size from the parameter 'log2_bach'"):
        mapping.resolve({"learning_rate": 0.1, "log2_batch": 3, "momentum": 0.0})


@pytest.mark.parametrize("present", ["learning_rate", "batch_size", "momentum"])
def test_one_of_the_default_parameters_calls_for_the_others(present: str) -> None:
    with pytest.raises(MissingParameterError):
        HyperparameterMap().resolve({present: PARAMS[present]})


def test_the_default_map_does_not_apply_to_a_space_of_other_parameters() -> None:
    assert HyperparameterMap().resolve({"x": 1.0}) is None
    assert HyperparameterMap().resolve({}) is None


@pytest.mark.parametrize(
    "mapping",
    [
        HyperparameterMap(learning_rate="lr", batch_size=32, momentum=0.9),
        HyperparameterMap(batch_size=32, momentum=0.9),
        HyperparameterMap(learning_rate=lambda p: p["lr"], batch_size=32, momentum=0.9),
    ],
)
def test_any_other_map_must_apply(mapping: HyperparameterMap) -> None:
    with pytest.raises(MissingParameterError, match=r"only has \['rate'\]"):
        mapping.resolve({"rate": 0.1})


@pytest.mark.parametrize("field", ["learning_rate", "batch_size", "momentum"])
@pytest.mark.parametrize("source", [None, True, ["lr"], b"lr", 1j], ids=repr)
def test_a_source_of_another_kind_is_refused(field: str, source: Any) -> None:
    with pytest.raises(TypeError, match=f"{field} must be a parameter's name, a number or"):
        HyperparameterMap(**{field: source})


@pytest.mark.parametrize("field", ["learning_rate", "batch_size", "momentum"])
@pytest.mark.parametrize("value", ["auto", True, (0.1,)], ids=repr)
def test_a_value_that_is_no_number_is_refused(field: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{field} must be a number but got"):
        HyperparameterMap().resolve({**PARAMS, field: value})


@pytest.mark.parametrize("batch_size", [2.5, float("nan"), float("inf")])
def test_a_batch_size_that_is_not_whole_is_refused(batch_size: float) -> None:
    with pytest.raises(
        ValueError, match=f"batch_size must be a whole number but got {batch_size}"
    ):
        HyperparameterMap().resolve({**PARAMS, "batch_size": batch_size})


def test_the_parameters_read_are_names_and_what_the_functions_read() -> None:
    mapping = HyperparameterMap(
        learning_rate="lr", batch_size=lambda p: 2 ** p["log2_batch"], momentum=0.9
    )
    assert mapping.parameters_read({"log2_batch": 3, "x": 1}) == {"lr", "log2_batch"}
    # Also what is missing, which a function stops at.
    assert mapping.parameters_read({}) == {"lr", "log2_batch"}


def test_the_parameters_read_depend_on_the_branch_that_a_function_takes() -> None:
    mapping = HyperparameterMap(
        0.1, 8, momentum=lambda p: p["momentum"] if p["optimizer"] == "sgd" else None
    )
    assert mapping.parameters_read({"optimizer": "adam"}) == {"optimizer"}
    assert mapping.parameters_read({"optimizer": "sgd"}) == {"optimizer", "momentum"}


def test_a_map_of_names_and_numbers_is_pickled() -> None:
    mapping = HyperparameterMap(learning_rate="lr", momentum=0.5)
    assert pickle.loads(pickle.dumps(mapping)) == mapping


@pytest.mark.parametrize("bad", [lambda: 0.1, lambda trial, name: 0.1])
def test_a_function_that_does_not_take_the_parameters_is_refused_at_once(bad: Any) -> None:
    with pytest.raises(
        TypeError, match=r"learning_rate must be a function of one argument, .* \("
    ):
        HyperparameterMap(learning_rate=bad)


def test_functions_with_defaults_and_classes_are_functions_of_the_parameters() -> None:
    class Rate:
        def __call__(self, params: Any, factor: float = 2.0) -> float:
            return factor * float(params["lr"])

    mapping = HyperparameterMap(learning_rate=Rate(), batch_size=8, momentum=0.0)
    assert mapping.resolve({"lr": 0.1}) == (0.2, 8, 0.0)


def test_a_function_that_fails_is_named_with_what_it_got() -> None:
    mapping = HyperparameterMap(batch_size=lambda p: 8 / p["zero"])
    with pytest.raises(
        ValueError, match=r"has for batch_size must .* ZeroDivisionError.*'zero': 0"
    ):
        mapping.resolve({"learning_rate": 0.1, "momentum": 0.0, "zero": 0})
    assert mapping.parameters_read({"zero": 0}) == {"learning_rate", "momentum", "zero"}


def test_a_name_must_not_be_empty() -> None:
    with pytest.raises(
        TypeError, match=r"learning_rate must be a parameter's name, .* but got ''"
    ):
        HyperparameterMap("")


def test_a_table_that_a_function_has_is_no_missing_parameter() -> None:
    batch_sizes = {"small": 8, "large": 64}
    mapping = HyperparameterMap(batch_size=lambda p: batch_sizes[p["size"].upper()])
    with pytest.raises(ValueError, match=r"has for batch_size must .* KeyError: 'SMALL'"):
        mapping.resolve({"learning_rate": 0.1, "momentum": 0.0, "size": "small"})


def test_the_momentum_of_the_optimiser_counts_where_a_trial_has_none() -> None:
    plain = HyperparameterMap()
    mapping = plain.with_default_momentum(0.9)
    params = {"learning_rate": 0.1, "batch_size": 8}
    assert mapping.resolve(params) == Configuration(0.1, 8, 0.9)
    assert mapping.parameters_read(params) == set(params)
    assert mapping.resolve({**params, "momentum": 0.5}) == Configuration(0.1, 8, 0.5)
    assert mapping.parameters_read({**params, "momentum": 0.5}) == {*params, "momentum"}
    assert mapping == plain and mapping.resolve({}) is None
    with pytest.raises(MissingParameterError):
        plain.resolve(params)
    with pytest.raises(MissingParameterError):
        mapping.resolve({"learning_rate": 0.1})
    fixed = HyperparameterMap(momentum=0.0).with_default_momentum(0.9)
    assert fixed.resolve(params) == Configuration(0.1, 8, 0.0)
