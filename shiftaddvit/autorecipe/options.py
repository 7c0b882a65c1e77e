"""What every attention and MLP of a model may become, and the recipe that says so."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from shiftaddvit.errors import UserError, unknown
from shiftaddvit.evaluation.sensitivity import closed, settings_of
from shiftaddvit.reparam import Recipe, recipes
from shiftaddvit.reparam.sites import find_sites
from shiftaddvit.search_terms import DENSE, PRIMITIVES, change_of

SEARCHED = ("msa", "linear", "add", "attn-shift", "attn-moe", "mlp-shift", "mlp-moe")
"""Primitives that are tried unless told otherwise; `hash` needs images to learn from."""

Options = Mapping[str, tuple[str, ...]]
"""Names of what each site may become: primitives, `form+linears` for an attention that changes both, and `dense`."""


def options_of(model: nn.Module, primitives: Iterable[str] = SEARCHED, settings: Recipe = Recipe()) -> dict[str, tuple[str, ...]]:
    """The options of every attention and MLP, in the order of the model. UserError for an unknown primitive."""
    primitives = tuple(dict.fromkeys(primitives))
    for name in primitives:
        if name not in PRIMITIVES:
            raise unknown("primitive", name, PRIMITIVES)
    mlp = [name for name in primitives if "mlp" in PRIMITIVES[name]]
    forms = [name for name in primitives if "attention" in PRIMITIVES[name]]
    linears = [name for name in primitives if "attn_linear" in PRIMITIVES[name]]
    attentions, mlps = find_sites(model)
    found = {}
    for site in attentions:
        open_forms = [name for name in forms if not closed(site, PRIMITIVES[name], settings)]
        found[site.name] = (DENSE, *linears, *(joined for form in open_forms for joined in (form, *(f"{form}+{linear}" for linear in linears))))
    for site in mlps:
        found[site.name] = (DENSE, *mlp)
    return {name: found[name] for name, _ in model.named_modules() if name in found}


def changes(options: Options) -> tuple[str, ...]:
    """Every option but `dense`, each once."""
    return tuple(dict.fromkeys(name for names in options.values() for name in names if name != DENSE))


def recipe_of(choice: Mapping[str, str], settings: Recipe = Recipe(), name: str = "", description: str = "") -> Recipe:
    """The recipe that makes `choice` (option by site), one override a site that changes."""
    overrides = tuple((site, change_of(option)) for site, option in choice.items() if option != DENSE)
    return replace(settings_of(settings), overrides=overrides, name=name, description=description)


def choice_of(recipe: Recipe, options: Options) -> dict[str, str] | None:
    """The inverse, for any recipe; None if a site would become what is not among its options."""
    found = {}
    for site, names in options.items():
        here = recipe.at(site)
        wanted = {"mlp": here.mlp} if _is_mlp(names) else {"attention": here.attention, "add": here.add, "attn_linear": here.attn_linear}
        option = next((name for name in names if _columns(name, names) == wanted), None)
        if option is None and not _is_mlp(names):
            # Where the form cannot change, it stays.
            wanted |= {"attention": "keep", "add": "none"}
            open_forms = any("attention" in change_of(name) for name in names if name != DENSE)
            option = None if open_forms else next((name for name in names if _columns(name, names) == wanted), None)
        if option is None:
            return None
        found[site] = option
    return found


def fixed_rows(options: Options, settings: Recipe = Recipe()) -> dict[str, dict[str, str]]:
    """Every shipped recipe (but those for view synthesis) that the options can express and that makes primitives as `settings` does:
    its choice, by name."""
    found = {}
    for name, recipe in recipes.items():
        choice = None if name.startswith("gnt-") else choice_of(recipe, options)
        if choice is not None and settings_of(recipe) == settings_of(settings) and choice not in found.values():
            found[name] = choice
    return found


def check_options(options: Options, found: Mapping[str, Mapping[str, float]], source: str) -> None:
    """Raise UserError naming the first option that `found` (values by site and option, of `source`) has no value for."""
    for site, names in options.items():
        for name in names:
            if name not in found.get(site, {}):
                raise UserError(f"{source} has no value for {name!r} at {site}: measure it again, or leave the primitive out")


def _is_mlp(names: tuple[str, ...]) -> bool:
    return any(name.startswith("mlp-") for name in names)


def _columns(option: str, names: tuple[str, ...]) -> dict[str, str]:
    change = {} if option == DENSE else change_of(option)
    return ({"mlp": "mult"} if _is_mlp(names) else {"attention": "keep", "add": "none", "attn_linear": "mult"}) | change
