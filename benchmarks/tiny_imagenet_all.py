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
from dataclasses import dataclass
from pathlib import Path

from parts import cut, joined
from tiny_imagenet import MODELS, WEIGHTS, arrays

SEEDS = (0, 1, 2)
LOOKING = ("forms", "finals", "training", "mixtures", "adders")
"""Groups that look for forms and ways to train: on the dev split only."""

ANGULAR = {
    "own-mean-l2": (),
    "own-sum-l2": ("angular.context=sum",),
    "mean-mean-none": ("angular.local=mean", "angular.output_norm=none"),
    "mean-mean-l2": ("angular.local=mean",),
    "mean-mean-similarity": ("angular.local=mean", "angular.output_norm=similarity"),
    "own-mean-none": ("angular.output_norm=none",),
}
"""Forms of linear attention, as settings over a recipe."""

CODES = {
    "token01": (),
    "token-pm1": ("binary.codes=plus-minus",),
    "token-pm1-unit": ("binary.codes=plus-minus", "angular.unit_codes=true"),
    "zero-pm1-unit": ("binary.threshold=zero", "binary.codes=plus-minus", "angular.unit_codes=true"),
    "zero01-unit": ("binary.threshold=zero", "angular.unit_codes=true"),
}
"""Forms of codes."""

FINALISTS = (("own-mean-l2", "own-mean-none"), ("token01", "token-pm1"))
"""Forms and codes that a first look at all of them, one seed each, could not tell from the best; `finals` gives them all seeds."""

SHIFTS = {
    "ps": (),
    "ps-lr1": ("--shift-lr", "1"),
    "q": ("--set", "shift.variant=q"),
    "ps-nearest-value": ("--set", "shift.rounding=value"),
    "ps-no-offset": ("--set", "shift.channel_offset=false"),
    "ps-4-bits": ("--set", "shift.bits=4"),
}
"""Forms of shift layers; settings of the run, not only of the recipe."""

TRAINING = {
    "lr5e-4": ("--lr", "5e-4"),
    "lr1e-3": ("--lr", "1e-3"),
    "distil": ("--distill", "0.5"),
    "distil-lr5e-4": ("--distill", "0.5", "--lr", "5e-4"),
}
"""Ways to fine-tune, of the dense control too; each beside the usual one."""

MIXTURES = {
    "base": (),
    "distil": ("--distill", "0.5"),
    "long": ("--epochs", "10", "30"),
    "long-distil": ("--epochs", "10", "30", "--distill", "0.5"),
    "q": ("--set", "shift.variant=q"),
    "lr1": ("--shift-lr", "1"),
    "free": ("--balance", "0"),
}
"""Forms and ways to train mixtures; the long ones beside a dense control and shifts of the same length."""

ADDER_RATES = {
    "shiftaddnet": {"lr0.1": ("--adder-lr", "0.1"), "lr0.01": ("--adder-lr", "0.01"), "both-lr0.1": ("--adder-lr", "0.1", "--shift-lr", "1")},
    "addernet": {"lr0.1": ("--adder-lr", "0.1"), "all-lr4": ("--lr", "1e-3")},
}
"""Rates of layers of adders, beside the usual ones."""

MAIN = ("msa", "ours-quant-linear", "ours-quant-add", "ours-quant-shift", "ours-quant-moe")
REST = (
    "pvt-moe", "ecoformer", "ours-ksh-linear", "ours-ksh-add", "ours-ksh-add-shift", "ours-ksh-add-shift-moe", "ours-ksh-moe",
    "attn-shift-add", "mlp-shift", "mlp-moe",
)  # fmt: skip
ADDERS = ("shiftaddnet", "addernet", "adder-attention")
BASELINES = ("shiftaddnet", "addernet", "adder-attention", "ecoformer", "performer", "deepshift-ps", "deepshift-q", "sra-linear")


@dataclass(frozen=True)
class Job:
    """One run of `tiny_imagenet.py row`."""

    name: str
    """Row name, part of the run's folder."""
    recipe: str
    """Recipe, or `dense`."""
    seed: int = 0
    """Of batches, augmentation and new parameters."""
    options: tuple[str, ...] = ()
    """More arguments of the command."""

    def folder(self, args: argparse.Namespace) -> Path:
        return args.out / f"{args.arch}-{self.name}-s{self.seed}"

    def command(self, args: argparse.Namespace) -> list[str]:
        return [
            *_script("row"), str(args.data), str(args.out), "--arch", args.arch, "--weights", str(args.out / args.arch / WEIGHTS),
            "--recipe", self.recipe, "--name", self.name, "--seed", str(self.seed), "--split", args.split,
            "--epochs", *map(str, args.epochs), *_speed(args), *self.options,
        ]  # fmt: skip


def jobs(groups: list[str]) -> list[Job]:
    """What each group runs, the most wanted first, the dense control always."""
    found = [Job("dense-ft", "dense", seed) for seed in (SEEDS if {"main", "finals"} & set(groups) else SEEDS[:1])]
    if "forms" in groups:
        found += [_add(form, "token01") for form in ANGULAR]
        found += [_add(form, codes) for codes in list(CODES)[1:] for form in ("own-mean-l2", "mean-mean-none")]
        found += [Job(f"shift-{name}", "ours-quant-shift", 0, options) for name, options in SHIFTS.items()]
        found += [Job(f"linear-{name}", "ours-quant-linear", 0, _set(settings)) for name, settings in ANGULAR.items()]
    if "finals" in groups:
        found += [_add(form, codes, seed) for seed in SEEDS for codes in FINALISTS[1] for form in FINALISTS[0]]
        found += [Job(f"linear-{form}", "ours-quant-linear", seed, _set(ANGULAR[form])) for seed in SEEDS for form in FINALISTS[0]]
    if "training" in groups:
        found += [Job("ours-quant-add", "ours-quant-add")]
        pairs = ("dense-ft", "dense"), ("ours-quant-add", "ours-quant-add")
        found += [Job(f"{row}-{way}", recipe, 0, options) for way, options in TRAINING.items() for row, recipe in pairs]
        found += [Job(recipe, recipe) for recipe in ("ours-quant-moe", "ours-quant-shift", "msa")]
    if "mixtures" in groups:
        found += [Job(f"moe-{name}", "ours-quant-moe", 0, options) for name, options in MIXTURES.items()]
        for row, recipe in (("dense-ft", "dense"), ("ours-quant-shift", "ours-quant-shift"), ("ours-quant-add", "ours-quant-add")):
            found += [Job(f"{row}-{name}", recipe, 0, MIXTURES[name]) for name in ("distil", "long", "long-distil")]
        found += [Job(f"shift-{name}", "ours-quant-shift", 0, options) for name, options in SHIFTS.items()]
    if "adders" in groups:
        found += [Job(f"{recipe}-{name}", recipe, 0, options) for recipe, rates in ADDER_RATES.items() for name, options in rates.items()]
    if "main" in groups:
        found += [Job(recipe, recipe, seed) for seed in SEEDS for recipe in reversed(MAIN)]
    if "rest" in groups:
        found += [Job(recipe, recipe) for recipe in REST]
        found += [Job(f"{row}-distil", recipe, 0, TRAINING["distil"]) for row, recipe in (("dense-ft", "dense"), ("ours-quant-moe", "ours-quant-moe"))]
    if "baselines" in groups:
        found += [Job(recipe, recipe) for recipe in BASELINES]
    return list(dict.fromkeys(found))


def _add(form: str, codes: str, seed: int = 0) -> Job:
    name = f"add-{form}" if codes == "token01" else f"add-{codes}-{form}"
    return Job(name, "ours-quant-add", seed, _set((*ANGULAR[form], *CODES[codes])))


def _set(settings: tuple[str, ...]) -> tuple[str, ...]:
    return ("--set", *settings) if settings else ()


def run(args: argparse.Namespace) -> None:
    end = time.monotonic() + 60 * args.minutes
    arrays(args.data)
    if not pretrained(args, end):
        print("pre-training goes on with the next call")
        return
    waiting = [job for job in jobs(args.group) if not (job.folder(args) / "result.json").exists()]
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
                    process = subprocess.Popen(job.command(args), env=_environment(slot[0]), stdout=log, stderr=subprocess.STDOUT)
                running[slot] = job, process, time.monotonic()
        time.sleep(0.2)
    for _, process, _ in running.values():
        process.kill()
    missing = [job for job in jobs(args.group) if not (job.folder(args) / "result.json").exists()]
    print(f"{len(missing)} rows are left: run the same command again" if missing else "all rows are done")


def _next(waiting: list[Job], longest: dict[str, float], end: float) -> Job | None:
    """The first row that is done by then, going by the longest of its kind so far."""
    return next((job for job in waiting if time.monotonic() + longest.get(_kind(job), 0.0) < end), None)


def _kind(job: Job) -> str:
    """Rows that take about as long: mixtures, layers of adders, others."""
    return "mixture" if job.recipe.endswith("moe") else "adder" if job.recipe in ADDERS else "other"


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
    return args.out / f"{job.folder(args).name}.txt"


def _environment(gpu: str) -> dict[str, str]:
    return os.environ | {"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": "2"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--arch", choices=MODELS, default="pvt_v2_b0")
    parser.add_argument("--group", nargs="+", choices=(*LOOKING, "main", "rest", "baselines"), default=["main"])
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
