"""The process that runs operators: a crash of InfiniCore ends it and not the command, which goes on behind the operator that crashed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from codegen.check_ops import CRASHED, REFUSED, Result, check, result_of
from codegen.check_ops_calls import COLLECTIVES, Use
from codegen.check_ops_collectives import Meeting
from codegen.check_ops_device import Device
from ir.errors import InfiniCoreError, Qwen3Error
from runtime import infinicore
from runtime.infinicore import Provider


@dataclass(frozen=True)
class Job:
    """What a process is told.

    Attributes:
        manifest: of the build.
        device: number of the device among those of its type, or of the first where several meet.
        clobbers: per op, the inputs that InfiniCore is known to destroy.
    """

    manifest: dict[str, Any]
    uses: list[Use]
    clobbers: dict[str, tuple[str, ...]]
    device: int = 0
    seed: int = 0


def open_library(manifest: dict[str, Any], number: int = 0) -> Provider:
    """The build's InfiniCore, whatever it lacks: what it has not is said per operator. ``number`` is the device to be used."""
    return infinicore.load({**manifest, "ops": []}, device_id=number)


def run_all(
    job: Job, timeout: float, done: Callable[[Result], Any] = lambda result: None
) -> tuple[dict[str, Any], list[Result]]:
    """Check every operator.

    Args:
        timeout: seconds that one operator may take.
        done: called with each result.

    Returns:
        what InfiniCore says of itself, and the results.

    Raises:
        Qwen3Error: the library or the device cannot be used at all.
    """
    context = multiprocessing.get_context("spawn")
    about: dict[str, Any] = {}
    results: list[Result] = []
    while len(results) < len(job.uses) or not about:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(job, len(results), theirs), daemon=True)
        process.start()
        theirs.close()
        before, started = len(results), False  # whether the operator at hand was begun
        try:
            while len(results) < len(job.uses) or not about:
                if not ours.poll(timeout):
                    process.kill()
                    break
                kind, value = ours.recv()
                if kind == "error":
                    raise value
                if kind == "about":
                    about = value
                elif kind == "start":
                    started = True
                else:
                    results.append(value)
                    done(value)
                    started = False
        except EOFError:
            pass
        finally:
            if len(results) == len(job.uses):
                process.join(timeout)
            if process.is_alive():
                process.kill()
            process.join()
            ours.close()
        if len(results) < len(job.uses) and (started or len(results) == before):
            ended = _end(process.exitcode, timeout)
            if not started:
                raise InfiniCoreError("the process that runs the operators", 1, f"{ended} before it ran one")
            crashed = result_of(job.uses[len(results)])
            crashed.status, crashed.reason = CRASHED, f"the process {ended}"
            results.append(crashed)
            done(crashed)
    return about, results


def _end(code: int | None, timeout: float) -> str:
    if code == -signal.SIGKILL:
        return f"took more than {timeout:g} s, or was killed"
    if code is not None and code < 0:
        return f"ended with {signal.Signals(-code).name}"
    return f"ended with exit status {code}"


def _serve(job: Job, first: int, pipe: Connection) -> None:
    os.dup2(sys.stderr.fileno(), 1)  # what a library prints must not get into the report
    try:
        provider = open_library(job.manifest, job.device)
        pipe.send(("about", infinicore.description()))
        kind = int(job.manifest["device"])
        with Device(provider, kind, job.device) as device, closing(Meeting(provider, kind, job.device)) as meeting:
            for use in job.uses[first:]:
                pipe.send(("start", None))
                if use.call.op in COLLECTIVES:
                    result = meeting.check(use, job.seed)
                else:
                    result = check(device, use, seed=job.seed, clobbers=job.clobbers.get(use.call.name, ()))
                pipe.send(("result", result))
                if result.status == CRASHED or (result.status == REFUSED and result.cases):
                    os._exit(0)  # some devices do nothing any more after a failure: a new process goes on
    except Qwen3Error as error:
        pipe.send(("error", _plain(error)))


def _plain(error: Qwen3Error) -> Qwen3Error:
    """An error that can be sent: InfiniCoreError takes more than a text."""
    return Qwen3Error(str(error))
