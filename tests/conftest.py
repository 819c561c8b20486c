from __future__ import annotations

import hypothesis
import pytest
import torch


hypothesis.settings.register_profile(
    "package",
    # Wall-clock limits fail on a busy machine without a defect.
    deadline=None,
    derandomize=True,
    print_blob=True,
)
hypothesis.settings.load_profile("package")


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every kind of device that is present."""
    return torch.device(request.param)
