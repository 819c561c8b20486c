"""The command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from optuna_ttp.cli import main
from optuna_ttp.version import __version__


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::optuna_ttp.UnreliablePredictionWarning")
def test_the_demo_prints_what_happened_and_draws_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "demo.png"
    assert main(["demo", "--seconds", "18", "--picture", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "read from the store" in printed
    assert "TPE + median pruner: fastest fine-tuning" in printed
    assert "the same, wrapped by optuna_ttp: fastest fine-tuning" in printed
    assert "s of the spectrum" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
def test_a_budget_that_is_no_positive_number_is_refused(
    seconds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--seconds", seconds])
    assert stop.value.code == 2
    assert "must be a positive number" in capsys.readouterr().err


def test_a_command_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "demo" in capsys.readouterr().err
