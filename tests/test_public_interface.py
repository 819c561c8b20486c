"""What a user sees of the package: its names, how many arguments they take, and their types."""

from __future__ import annotations

import inspect
from pathlib import Path
import subprocess
import sys

import pytest

import optuna_ttp


_ROOT = Path(optuna_ttp.__file__).parent.parent
_MOST_ARGUMENTS = {"TTPSampler": 8, "TTPPruner": 8, "TrainingTimePredictor": 12}
_SCRIPT = """
from __future__ import annotations

import optuna
import torch

import optuna_ttp as ttp


model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
inputs, labels = torch.randn(64, 8), torch.arange(64) % 3
task = ttp.FineTuningTask(model, (inputs, labels), loss="cross_entropy")
spectrum: ttp.Spectrum = ttp.compute_spectrum(task)
sgd = ttp.SGD(momentum=0.9, weight_decay=1e-4)
predictor = ttp.TrainingTimePredictor(spectrum, target_fraction=0.5, optimizer=sgd)
goal = ttp.BestMetric(max_epochs=3)


def objective(trial: optuna.Trial) -> float:
    learning_rate = trial.suggest_float("learning_rate", 1e-4, 1.0, log=True)
    batch_size = trial.suggest_categorical("batch_size", [8, 16, 32])
    if trial.should_prune():
        raise optuna.TrialPruned
    loss = 1.0
    with ttp.TrainingLog(trial) as log:
        for _ in range(3 * 64 // batch_size):
            log.step(loss)
            loss *= 1.0 - learning_rate
    return loss


sampler, pruner = ttp.TTPSampler(predictor, goal, seed=0), ttp.TTPPruner(predictor, goal)
study = optuna.create_study(sampler=sampler, pruner=pruner)
study.optimize(objective, n_trials=3)
steps: float = float(predictor.predict(learning_rate=0.1, batch_size=8).steps)
print(ttp.report(study), steps)
"""


@pytest.mark.parametrize("name", _MOST_ARGUMENTS)
def test_a_user_chooses_among_few_arguments(name: str) -> None:
    arguments = inspect.signature(getattr(optuna_ttp, name)).parameters
    assert len(arguments) <= _MOST_ARGUMENTS[name], list(arguments)


def test_tab_completion_shows_public_names_only() -> None:
    shown = {name for name in dir(optuna_ttp) if not name.startswith("__")}
    assert shown == set(optuna_ttp.__all__) - {"__version__"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::optuna_ttp.UnreliablePredictionWarning")
def test_a_script_of_a_user_runs_and_is_clean_under_strict_mypy(tmp_path: Path) -> None:
    script = tmp_path / "search.py"
    script.write_text(_SCRIPT, encoding="utf-8")
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", str(script)],
        capture_output=True,
        text=True,
        # Not in the checkout: a user's mypy leaves out errors inside of installed packages.
        cwd=tmp_path,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=_ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "steps" in done.stdout or "trial" in done.stdout
