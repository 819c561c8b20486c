from __future__ import annotations

from collections.abc import Iterator
import os
from pathlib import Path


# The tensors of tests are small: threads that wait for each other take many times as long as the
# work, all the more where several test processes share the cores. Child processes heed it, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import optuna
import pytest
import torch

from tests.servers import MariaDB
from tests.servers import PostgreSQL
from tests.servers import REQUIRED


hypothesis.settings.register_profile(
    "package",
    # Wall-clock limits fail on a busy machine without a defect.
    deadline=None,
    derandomize=True,
    print_blob=True,
)
hypothesis.settings.load_profile("package")


@pytest.fixture(autouse=True)
def _same_verbosity() -> Iterator[None]:
    """A test that sets Optuna's verbosity, as the demo does, sets it for itself alone."""
    before = optuna.logging.get_verbosity()
    yield
    optuna.logging.set_verbosity(before)


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every kind of device that is present."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """A PostgreSQL server. Where it must be there (in CI), it is no reason to skip."""
    try:
        server = PostgreSQL()
    except FileNotFoundError as error:
        if os.environ.get(REQUIRED):
            raise
        pytest.skip(f"{error} Install PostgreSQL to run this test.")
    yield server
    server.close()


@pytest.fixture(scope="session")
def mariadb() -> Iterator[MariaDB]:
    """A MariaDB server, where it is asked for: it takes as long as the two others together."""
    if "OPTUNA_TTP_TEST_MARIADB" not in os.environ:
        pytest.skip("Set OPTUNA_TTP_TEST_MARIADB to run the tests of the store on MariaDB too.")
    pytest.importorskip("pymysql")
    try:
        server = MariaDB()
    except FileNotFoundError as error:
        pytest.skip(f"{error} Install MariaDB to run this test.")
    yield server
    server.close()


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def any_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database of every kind that is present."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'ttp.db'}"
        return
    server = request.getfixturevalue(request.param)
    url = server.new_database()
    yield url
    server.drop(url)
