"""What the README and the notebook tell is run."""

from __future__ import annotations

import copy
from pathlib import Path
import re
from typing import Any

import nbformat
import optuna
import pytest
import torch

from optuna_ttp import TrainingLog
from tests.models import mlp
from tests.models import separated


_ROOT = Path(__file__).parent.parent


@pytest.mark.filterwarnings("ignore::optuna_ttp.UnreliablePredictionWarning")
def test_the_readme_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = re.findall(r"```python\n(.*?)```", (_ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code) == 1
    example = code[0].replace("timeout=60", "n_trials=6")
    assert example != code[0]
    # Six trials of two epochs may all be too slow to tell anything, which a warning names.
    seeded = example.replace("TTPSampler(predictor, goal)", "TTPSampler(predictor, goal, seed=0)")
    assert seeded != example
    x, y = separated(48)
    model = mlp()

    def fine_tune(trial: optuna.Trial, rate: float, size: int, momentum: float) -> float:
        # Every trial begins with the pretrained weights.
        network = copy.deepcopy(model)
        optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=momentum)
        with TrainingLog(trial) as log:
            for batch in [b for _ in range(2) for b in torch.randperm(len(x)).split(size)]:
                loss = torch.nn.functional.cross_entropy(network(x[batch]), y[batch])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call,unused-ignore]
                optimizer.step()
                log.step(loss.item())
        return loss.item()

    names: dict[str, Any] = {"model": model, "train_data": (x, y), "fine_tune": fine_tune}
    exec(compile(seeded, "README.md", "exec"), names)
    assert len(names["study"].trials) == 6
    printed = capsys.readouterr().out
    assert re.search(r"run: [\d,]+ steps \(", printed)
    assert "6 trials" in printed


@pytest.mark.parametrize(
    "table",
    ["search/results/demo.md", "accuracy/results/summary.md"],
)
def test_the_readme_table_is_what_the_benchmark_wrote(table: str) -> None:
    readme = (_ROOT / "README.md").read_text()
    assert (_ROOT / "benchmarks" / table).read_text().strip() in readme


@pytest.mark.slow
def test_the_notebook_runs() -> None:
    from nbclient import NotebookClient

    path = _ROOT / "notebooks" / "quickstart.ipynb"
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(_ROOT)}}
    ).execute()
    text = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "25 trials" in text
    assert "diverges" in text
