"""Compile kernels in processes of their own: each holds a program and runs one step with one tile, once, so that the compiled kernel lies
in Triton's cache when it is wanted. Not `multiprocessing`, which would run the caller's script again in every process."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from time import monotonic

import torch

from shiftaddvit.ops import tiling
from shiftaddvit.ops.tiling import Tile

from .program import Launch, Program


@dataclass(frozen=True)
class Job:
    """One kernel to compile."""

    step: int
    """The step that launches it."""
    shape: tuple[int, ...]
    """Of the step's input."""
    problem: str
    """The launch's name in the table of tiles."""
    tile: Tile
    """What to compile it with."""


@contextmanager
def compilers(program: Program, launch: Launch, workers: int) -> Iterator[Callable[[list[Job], float], None]]:
    """Yields `compile_all(jobs, end)`, which returns when all are compiled, or soon after `end` (monotonic seconds). With fewer than two
    workers it does nothing: whoever measures then compiles."""
    if workers < 2:
        yield lambda jobs, end: None
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.pt"
        torch.save((program, launch), file)
        start = "import sys; from shiftaddvit.engine.compilers import main; main(*sys.argv[1:])"
        command = [sys.executable, "-c", start, str(file), str(program.device)]
        processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(workers)]
        idle: SimpleQueue = SimpleQueue()
        for process in processes:
            idle.put(process)

        def compile_one(job: Job, end: float) -> None:
            process = idle.get()
            try:
                # One that died, of memory say, is left: its kernels are compiled where they are measured.
                if monotonic() < end and process.poll() is None:
                    process.stdin.write(json.dumps(asdict(job)) + "\n")
                    process.stdin.flush()
                    process.stdout.readline()
            finally:
                idle.put(process)

        try:
            with ThreadPoolExecutor(workers) as threads:
                yield lambda jobs, end: list(threads.map(lambda job: compile_one(job, end), jobs))
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.communicate()


@torch.no_grad()
def compile_job(program: Program, launch: Launch, job: Job) -> None:
    """Run the job's step once; a tile that does not fit the device is left."""
    with tiling.trial(program.device, job.problem, job.tile), tile_may_not_fit():
        program.steps[job.step].run(torch.zeros(job.shape, dtype=program.dtype, device=program.device), launch)


@contextmanager
def tile_may_not_fit() -> Iterator[None]:
    """Ends the block quietly where a kernel cannot be built or launched with its tile."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    try:
        yield
    except (OutOfResources, CompilationError):
        return
    except RuntimeError as error:
        # What Triton raises when a compiler pass gives up; errors of the device are RuntimeErrors too and must be seen.
        if "PassManager" not in str(error):
            raise


def main(file: str, device: str) -> None:
    """A compiling process: one JSON job a line in, one line out when it is done."""
    # The parent wrote the file a moment ago, in a folder that only this user can read.
    program, launch = torch.load(file, map_location=device, weights_only=False)
    for line in sys.stdin:
        values = json.loads(line)
        compile_job(program, launch, Job(values["step"], tuple(values["shape"]), values["problem"], Tile(**values["tile"])))
        print("done", flush=True)
