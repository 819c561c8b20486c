"""Faults at random moments, on SQLite and PostgreSQL: what is lost, and what is damaged.

After each fault every spectrum in the store is read and compared with its checksums, and all that
were committed before must be there. A fault "hit" where the worker was still at work. The same
faults are in the tests, a few times each. Writes ``faults.json`` and ``faults.md``.

Run with ``python -m benchmarks.store.faults``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
import json
from pathlib import Path
import random
import tempfile
import time
from typing import Any

from benchmarks.environment import environment
from tests import faults
from tests.servers import PostgreSQL


_SECONDS = 1.5


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="each fault twice")
    parser.add_argument("--only", nargs="*", help="names of faults")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    n_times = 2 if options.smoke else 50
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "faults.json"
    results: dict[str, Any] = {}
    if path.exists() and options.only:
        results = json.loads(path.read_text())["results"]
    server = PostgreSQL(durable=True)
    try:
        for name, (kind, run) in _faults(server).items():
            if options.only and name not in options.only:
                continue
            results[name] = _repeat(name, kind, run, n_times, server)
            summary = {"environment": environment(), "results": results}
            path.write_text(json.dumps(summary, indent=2) + "\n")
    finally:
        server.close()
    text = _table(results)
    (options.output / "faults.md").write_text(text)
    print(text)


def _faults(server: PostgreSQL) -> dict[str, tuple[str, Callable[..., dict[str, Any]]]]:
    faulty: dict[str, tuple[str, Callable[..., dict[str, Any]]]] = {}
    for kind in ("sqlite", "postgresql"):
        faulty[f"{kind}: kill -9 of the owner"] = (kind, faults.kill_owner)
        faulty[f"{kind}: kill -9 of a reader"] = (kind, faults.kill_reader)
        faulty[f"{kind}: kill -9 of a writer"] = (kind, faults.kill_writer)
        faulty[f"{kind}: owner stopped for longer than its lease"] = (kind, faults.stop_owner)
        faulty[f"{kind}: disk full"] = (f"{kind} on a small disk", faults.fill_disk)
    restart = partial(faults.restart_server, server=server)
    faulty["postgresql: server crashes and restarts mid-write"] = ("postgresql", restart)
    faulty["postgresql: connections cut"] = ("postgresql", faults.cut_connection)
    return faulty


def _repeat(
    name: str,
    kind: str,
    run: Callable[..., dict[str, Any]],
    n_times: int,
    server: PostgreSQL,
) -> dict[str, Any]:
    generator = random.Random(name)
    started = time.perf_counter()
    outcomes = []
    if kind.endswith("small disk"):
        outcomes = [_on_small_disk(kind, run, i, generator, server) for i in range(n_times)]
    else:
        with tempfile.TemporaryDirectory(prefix="ttp-faults-") as folder:
            url = f"sqlite:///{folder}/ttp.db" if kind == "sqlite" else server.new_database()
            for seed in range(n_times):
                outcomes.append(_tried(run, url, seed, generator, _SECONDS))
                outcomes[-1]["clean"] = _tried(_checked, url, seed)
    result = {
        "times": n_times,
        "hit": sum(bool(o.get("hit")) for o in outcomes),
        "failures": [o["error"] for o in outcomes if "error" in o]
        + [o["clean"]["error"] for o in outcomes if "error" in o.get("clean", {})],
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(name, json.dumps(result), flush=True)
    return result


def _checked(url: str, seed: int) -> dict[str, Any]:
    faults.check(url, list(range(seed + 1)))
    return {}


def _tried(run: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What happened; an error is a result, not the end of the measurement."""
    try:
        return run(*arguments)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _on_small_disk(
    kind: str,
    run: Callable[..., dict[str, Any]],
    seed: int,
    generator: random.Random,
    server: PostgreSQL,
) -> dict[str, Any]:
    with faults.small_disk(48) as disk:
        if kind.startswith("sqlite"):
            return _tried(run, f"sqlite:///{disk / 'ttp.db'}", disk, 2 * seed, generator)
        space, location = f"small_{seed}", disk / "space"
        server.make_folder(location)
        server.execute(f"CREATE TABLESPACE {space} LOCATION '{location}'")
        url = server.new_database(space)
        try:
            return _tried(run, url, disk, 2 * seed, generator)
        finally:
            server.drop(url)
            server.execute(f"DROP TABLESPACE {space}")


def _table(results: dict[str, Any]) -> str:
    lines = [
        "| fault | times | hit a worker at work | lost, damaged or wrong |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {name} | {r['times']} | {r['hit']} | {len(r['failures'])} |"
        for name, r in results.items()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
