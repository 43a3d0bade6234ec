"""Pipelines: an ordered list of named passes, verified, timed and dumped one by one."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ir.errors import GraphError
from ir.graph import Graph
from ir.text import to_text
from ir.verify import verify


@dataclass(frozen=True)
class Pass:
    """One step of a pipeline.

    Attributes:
        name: as in the dumps, the history and ``disable``.
        run: returns the new graph and how often it found something to do.
        stage_in, stage_out: the stage that it takes and the one that it makes.
        doc: one line.
        optional: may be disabled; the graph is valid, only slower.
        stages: the stages whose ops may stand in the result, if not those of ``stage_out`` only (raising goes step by step).
    """

    name: str
    run: Callable[[Graph], tuple[Graph, int]]
    stage_in: str
    stage_out: str
    doc: str
    optional: bool = False
    stages: tuple[str, ...] = ()


def run_passes(
    graph: Graph,
    passes: Sequence[Pass],
    *,
    disable: Collection[str] = (),
    dump_dir: Path | str | None = None,
    check: bool = True,
    log: Callable[[str], Any] | None = None,
    first: str = "import",
) -> Graph:
    """Run passes in order; ``graph.meta["passes"]`` gains a ``[name, matches, seconds]`` for each.

    Args:
        disable: names of optional passes to leave out. Names that no pass of this list has are ignored (they may belong to another pipeline; check them
            against ``optional_names``).
        dump_dir: where the graph goes as text before the first and after each pass: ``00-import.ir``, ``01-fold_constants.ir``, ... A graph that has a
            history continues its numbers.
        check: verify after each pass.
        log: gets one line per pass.
        first: name of the dump before the first pass; the dump is left out where the graph has a history.

    Raises:
        GraphError: a pass that must run is disabled, the graph is of another stage than the pass takes, or the result does not verify.
        UnsupportedError: a pass says so.
    """
    for p in passes:
        if p.name in disable and not p.optional:
            raise GraphError(
                f"pass {p.name} cannot be disabled; these can: {', '.join(optional_names(passes)) or 'none'}"
            )
    history: list[list[Any]] = [list(h) for h in graph.meta.get("passes", ())]
    if dump_dir is not None:
        Path(dump_dir).mkdir(parents=True, exist_ok=True)
        if not history:
            _dump(graph, Path(dump_dir) / f"00-{first}.ir")
    if check and not history:  # what has a history was verified after its last pass
        verify(graph)
    for p in passes:
        if p.name in disable:
            continue
        if graph.stage != p.stage_in:
            raise GraphError(f"pass {p.name} takes a graph of stage {p.stage_in}, not {graph.stage}")
        start = time.perf_counter()
        graph, matches = p.run(graph)
        seconds = round(time.perf_counter() - start, 4)
        history.append([p.name, matches, seconds])
        graph = replace(graph, meta={**graph.meta, "passes": [list(h) for h in history]})
        if log:
            log(f"{len(history):02} {p.name}: {matches} matches, {len(graph.nodes)} nodes, {seconds:.3f} s")
        if dump_dir is not None:
            _dump(graph, Path(dump_dir) / f"{len(history):02}-{p.name}.ir")
        if check:
            _check(graph, p)
    return graph


def optional_names(passes: Sequence[Pass]) -> list[str]:
    """The names that ``disable`` may hold."""
    return [p.name for p in passes if p.optional]


def _check(graph: Graph, p: Pass) -> None:
    if graph.stage != p.stage_out:
        raise GraphError(f"pass {p.name} made a graph of stage {graph.stage}, not {p.stage_out}")
    try:
        verify(graph, p.stages)
        json.dumps(graph.meta)
    except (GraphError, TypeError, ValueError) as error:
        raise GraphError(f"after pass {p.name}: {error}") from None


def _dump(graph: Graph, path: Path) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(to_text(graph), encoding="utf-8")
    os.replace(temporary, path)
