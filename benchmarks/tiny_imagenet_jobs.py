"""The rows of the Tiny-ImageNet tables: what each group of runs trains, and how. `tiny_imagenet_all.py` runs them."""

from dataclasses import dataclass

SEEDS = (0, 1, 2)
LOOKING = ("forms", "finals", "training", "mixtures", "adders")
"""Groups that look for forms and ways to train: on the dev split only."""
GROUPS = (*LOOKING, "main", "rest", "baselines")

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
