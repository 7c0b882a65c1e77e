"""Pre-train a model on Tiny-ImageNet if need be, then fine-tune every row of its table: several at a time on each GPU.

    python benchmarks/tiny_imagenet_all.py DATA OUT --arch pvt_v2_b0 --group forms --split dev --keep runs/keep
    python benchmarks/tiny_imagenet_all.py DATA OUT --arch pvt_v2_b0 --group main rest baselines --split val --gpus 0 1

A row is done when OUT/RUN/result.json is there; the same command goes on with what is not (`--minutes` for machines that are lent). Every row starts from the same dense weights,
sees the same batches in the same order for a seed, and trains as long as the dense control: the baselines too. Forms are compared on the dev split only.
Experts' latencies are measured before the first row, while nothing else uses the GPU.
"""

import argparse
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from parts import cut, joined
from tiny_imagenet import MODELS, WEIGHTS, arrays
from tiny_imagenet_jobs import ADDERS, GROUPS, LOOKING, Job, jobs


def _folder(args: argparse.Namespace, job: Job) -> Path:
    return args.out / f"{args.arch}-{job.name}-s{job.seed}"


def _command(args: argparse.Namespace, job: Job) -> list[str]:
    return [
        *_script("row"), str(args.data), str(args.out), "--arch", args.arch, "--weights", str(args.out / args.arch / WEIGHTS),
        "--recipe", job.recipe, "--name", job.name, "--seed", str(job.seed), "--split", args.split,
        "--epochs", *map(str, args.epochs), *_speed(args), *job.options,
    ]  # fmt: skip


def run(args: argparse.Namespace) -> None:
    end = time.monotonic() + 60 * args.minutes
    arrays(args.data)
    if not pretrained(args, end):
        print("pre-training goes on with the next call")
        return
    waiting = [job for job in jobs(args.group) if not (_folder(args, job) / "result.json").exists()]
    mixtures = sorted({job.recipe for job in waiting if job.recipe.endswith("moe") and "ksh" not in job.recipe})  # hashed ones have the shapes of others
    if mixtures:
        subprocess.run([*_script("profile"), "--arch", args.arch, "--recipe", *mixtures], env=_environment(args.gpus[0]), check=True, stdout=subprocess.DEVNULL)
    running: dict[tuple[str, int], tuple[Job, subprocess.Popen, float]] = {}
    slots, longest = [(gpu, place) for place in range(args.at_once) for gpu in args.gpus], {}
    while time.monotonic() < end and (running or _next(waiting, longest, end)):
        for slot in slots:
            if slot in running and running[slot][1].poll() is not None:
                job, process, since = running.pop(slot)
                longest[_kind(job)] = max(longest.get(_kind(job), 0.0), 1.1 * (time.monotonic() - since))
                _report(args, job, process.returncode, time.monotonic() - since)
                keep(args)
            if slot not in running and (job := _next(waiting, longest, end)):
                waiting.remove(job)
                with _log(args, job).open("w") as log:
                    process = subprocess.Popen(_command(args, job), env=_environment(slot[0]), stdout=log, stderr=subprocess.STDOUT)
                running[slot] = job, process, time.monotonic()
        time.sleep(0.2)
    for _, process, _ in running.values():
        process.kill()
    missing = [job for job in jobs(args.group) if not (_folder(args, job) / "result.json").exists()]
    print(f"{len(missing)} rows are left: run the same command again" if missing else "all rows are done")


def _next(waiting: list[Job], longest: dict[str, float], end: float) -> Job | None:
    """The first row that is done by then, going by the longest of its kind so far."""
    return next((job for job in waiting if time.monotonic() + longest.get(_kind(job), 0.0) < end), None)


def _kind(job: Job) -> str:
    """Rows that take about as long: mixtures, layers of adders, others; of each, those with epochs of their own."""
    kind = "mixture" if job.recipe.endswith("moe") else "adder" if job.recipe in ADDERS else "other"
    return f"{kind}, own epochs" if "--epochs" in job.options else kind


def pretrained(args: argparse.Namespace, end: float) -> bool:
    """Whether the dense weights are there: from an earlier KEEP, or trained now, going on where an earlier call stopped."""
    args.out.mkdir(parents=True, exist_ok=True)
    weights = args.out / args.arch / WEIGHTS
    if weights.exists() or (args.dense is not None and joined(args.dense, f"{args.arch}-dense", weights)):
        return True
    command = [*_script("pretrain"), str(args.data), str(args.out), "--arch", args.arch, "--epochs", str(args.pretrain_epochs)]
    command += ["--start", str(args.start), "--lr", "1e-4"] if args.start else []
    with (args.out / f"{args.arch}.txt").open("a") as log:
        process = subprocess.Popen([*command, *_speed(args)], env=_environment(args.gpus[0]), stdout=log, stderr=subprocess.STDOUT)
    try:
        process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # which leaves a checkpoint
        process.wait()
    lines = (args.out / f"{args.arch}.txt").read_text().splitlines()
    print("\n".join(lines[-1 if weights.exists() else -8 :]), flush=True)
    keep(args)
    return weights.exists()


def keep(args: argparse.Namespace) -> None:
    """What is worth carrying away, into KEEP: the result files of all rows as one archive, and the dense weights in parts."""
    if args.keep is None:
        return
    args.keep.mkdir(parents=True, exist_ok=True)
    with tarfile.open(args.keep / f"{args.arch}.tgz", "w:gz") as archive:
        for result in sorted(args.out.glob(f"{args.arch}*/result.json")):
            name = result.parent.name
            archive.add(result, f"{f'{name}-dense-s0' if name == args.arch else name}.json")
    weights = args.out / args.arch / WEIGHTS
    if weights.exists() and not (args.keep / f"{args.arch}-dense.0").exists():
        cut(weights, args.keep, f"{args.arch}-dense")


def _speed(args: argparse.Namespace) -> list[str]:
    return ["--compile"] if args.compile else []


def _script(command: str) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name("tiny_imagenet.py")), command]


def _report(args: argparse.Namespace, job: Job, code: int, seconds: float) -> None:
    print(f"{job.name} s{job.seed}: {'done' if code == 0 else 'FAILED'} after {seconds:.0f} s", flush=True)
    if code:
        print("\n".join(_log(args, job).read_text().splitlines()[-8:]), flush=True)


def _log(args: argparse.Namespace, job: Job) -> Path:
    return args.out / f"{_folder(args, job).name}.txt"


def _environment(gpu: str) -> dict[str, str]:
    return os.environ | {"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": "2"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--arch", choices=MODELS, default="pvt_v2_b0")
    parser.add_argument("--group", nargs="+", choices=GROUPS, default=["main"])
    parser.add_argument("--split", choices=("dev", "val"), default="dev")
    parser.add_argument("--epochs", type=int, nargs=2, default=(10, 10))
    parser.add_argument("--pretrain-epochs", type=int, default=200)
    parser.add_argument("--compile", action="store_true", help="compile the training steps; what was compiled is kept by torch for the next run of a row")
    parser.add_argument("--start", type=Path, help="foundation weights to fine-tune as the dense model, instead of pre-training")
    parser.add_argument("--dense", type=Path, help="an earlier KEEP, to start from its dense weights")
    parser.add_argument("--keep", type=Path, help="where results and dense weights go after every row")
    parser.add_argument("--gpus", nargs="+", default=["0"])
    parser.add_argument("--at-once", type=int, default=5, help="runs at a time on each GPU")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no row that would end later, going by the longest of its kind so far; stop what still runs then")
    args = parser.parse_args()
    if {*LOOKING} & set(args.group) and args.split != "dev":
        parser.error("forms and ways to train are compared on the dev split: the validation images are for the table")
    run(args)


if __name__ == "__main__":
    main()
