"""The trace sees every product whoever computes it, leaves the model as it was, and follows the tokens of each expert."""

import time

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from shiftaddvit.cost import BitWidths, Nest, Stream, energy, expert_energies, mapper, subjects, tiles
from shiftaddvit.cost.experts import forced, measured
from shiftaddvit.cost.mapper import best_mapping
from shiftaddvit.cost.trace import trace
from shiftaddvit.errors import UserError
from shiftaddvit.layers.attention import MatAdd
from shiftaddvit.layers.moe import MoELinear
from shiftaddvit.layers.packed import pack
from shiftaddvit.layers.router import record_routing
from shiftaddvit.layers.shift import ShiftConfig, ShiftLinear
from shiftaddvit.losses import balance_loss
from shiftaddvit.reparam import reparameterize


def nests(model: nn.Module, *shapes: tuple[int, ...]) -> list[Nest]:
    return [operation for operation in trace(model, *shapes).operations if isinstance(operation, Nest)]


def sizes(found: list[Nest]) -> list[tuple]:
    return [(nest.kind, nest.groups, nest.N, nest.C, nest.M) for nest in found]


class Does(nn.Module):
    """Executes one function of its inputs."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (lambda a, b: a @ b, [(2, 5, 7, 3), (2, 5, 3, 4)], [("product", 10, 7, 3, 4)]),
        (lambda a, b: torch.einsum("bnd,bmd->bnm", a, b), [(2, 7, 3), (2, 4, 3)], [("product", 2, 7, 3, 4)]),
        (lambda a, b: torch.matmul(a, b), [(7, 3), (3, 4)], [("product", 1, 7, 3, 4)]),
        (lambda a, b: torch.baddbmm(a @ b, a, b), [(2, 7, 3), (2, 3, 4)], [("product", 2, 7, 3, 4)] * 2),
        (
            lambda q: F.scaled_dot_product_attention(q, q, q),
            [(2, 4, 9, 8)],
            [("product", 8, 9, 8, 9), ("product", 8, 9, 9, 8)],
        ),
        (lambda x: F.linear(x, torch.zeros(6, 8), torch.zeros(6)), [(2, 9, 8)], [("linear", 1, 18, 8, 6)]),
        (lambda x: x @ torch.zeros(8, 6), [(2, 9, 8)], [("linear", 1, 18, 8, 6)]),
    ],
    ids=["@", "einsum", "matmul", "baddbmm", "sdpa", "F.linear", "weight"],
)
def test_products_are_seen_whoever_computes_them(function, shapes, expected):
    assert sizes(nests(Does(function), *shapes)) == expected


def test_convolutions_keep_their_groups_kernels_and_strides():
    (found,) = nests(nn.Conv2d(8, 12, (3, 5), stride=2, padding=(1, 2), groups=4), (2, 8, 16, 20))
    assert (found.groups, found.N, found.C, found.M, found.R, found.S) == (4, 2, 2, 3, 3, 5)
    assert (found.H, found.W, found.E, found.F, found.stride) == (16, 20, 8, 10, (2, 2))
    (line,) = nests(nn.Conv1d(4, 6, 3, padding=1), (2, 4, 10))
    assert (line.R, line.S, line.E, line.F) == (1, 3, 1, 10)
    (spread,) = nests(nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 5, 5))
    assert spread.macs == 5 * 5 * 4 * 6 * 4


def test_modules_with_a_primitive_are_taken_as_a_whole():
    layer = ShiftLinear(8, 6, config=ShiftConfig(bits=4))
    for module in (layer, pack(nn.Sequential(layer))[0]):
        operations = trace(module, (2, 9, 8)).operations
        assert [(o.primitive, o.N, o.C, o.M, o.weight_bits) for o in operations] == [("shift", 18, 8, 6, 4)]
    (found,) = trace(MatAdd(), (2, 3, 5, 9), (2, 3, 9, 4)).operations
    assert (found.primitive, *sizes([found])[0]) == ("add", "product", 6, 5, 9, 4)


def test_a_shift_layer_that_is_switched_off_multiplies():
    layer = ShiftLinear(8, 6)
    layer.enabled = False
    assert trace(layer, (1, 8)).operations[0].primitive == "mult"


def test_a_primitive_nobody_knows_is_an_error_naming_the_class():
    layer = nn.Linear(2, 2)
    layer.primitive = "divide"
    with pytest.raises(UserError, match="Linear.primitive must be one of mult, shift"):
        trace(layer, (1, 2))


def test_what_depends_on_the_weights_alone_is_not_counted():
    weight = torch.randn(6, 8)
    assert trace(Does(lambda x: x + (weight @ weight.t()).sum()), (3,)).operations == (
        Stream("Does", "pointwise", "add", 0, 0, 3),
    )


def test_an_operator_that_is_not_known_is_listed():
    found = trace(Does(lambda x: torch.special.i0(x)), (5,))
    assert [(entry.name, entry.count) for entry in found.uncosted] == [("i0", 1)]
    assert found.operations == ()


def test_a_learned_query_is_seen_beside_tokens():
    """Attention pooling, as in SigLIP: the query depends on the weights alone, and lives where they live."""
    for device in ("cpu", "meta"):
        query = torch.zeros(1, 2, 1, 8, device=device)
        found = nests(Does(lambda x, query=query: F.scaled_dot_product_attention(query, x, x)), (1, 2, 9, 8))
        assert sizes(found) == [("product", 2, 1, 8, 9), ("product", 2, 1, 9, 8)], device


def test_what_comes_from_one_tensor_is_read_once():
    """A guard such as `where(isnan(x), x, step(x))` happens as an element passes; a sum with another tensor reads that one."""
    guard = trace(Does(lambda x: torch.where(torch.isnan(x), x, (x > 0).float())), (4, 9)).operations
    assert {o.kind for o in guard} == {"pointwise"} and sum(o.reads for o in guard) == 0
    (_, _, residual) = trace(Does(lambda x: x + torch.relu(F.linear(x, torch.zeros(9, 9)))), (4, 9)).operations
    assert (residual.kind, residual.reads) == ("elementwise", 36)
    halves = trace(Does(lambda x: x[:, :4] * x[:, 4:]), (3, 8)).operations
    assert [(o.kind, o.reads) for o in halves] == [("elementwise", 12)]


@pytest.mark.parametrize(
    ("function", "rows"),
    [
        (lambda x: F.layer_norm(x, (8,)), 18),
        (lambda x: F.layer_norm(x, (9, 8)), 0),
        (lambda x: F.group_norm(x, 3), 0),
        (lambda x: x.softmax(-1), 18),
        (lambda x: x.softmax(1), 0),
        (lambda x: x.sum(-1, keepdim=True), 18),
        (lambda x: x.amax(dim=2), 18),
        (lambda x: x.argmax(-1), 18),
        (lambda x: x.topk(2)[0], 18),
        (lambda x: x.mean(dim=1), 0),
        (lambda x: x.mean(dim=(1, 2)), 0),
        (lambda x: x.mean(), 0),
        (lambda x: F.avg_pool1d(x, 2), 0),
    ],
)
def test_work_on_rows_is_told_from_work_that_takes_more(function, rows):
    found = trace(Does(function), (2, 9, 8)).operations
    assert [o.rows for o in found if o.kind in ("norm", "softmax", "reduction")] == [rows]


@pytest.mark.parametrize("fused", [True, False], ids=["sdpa", "by hand"])
def test_the_products_that_write_and_read_scores_are_marked(fused):
    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v) if fused else (q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v

    assert [nest.scores for nest in nests(Does(attention), *[(2, 4, 9, 8)] * 3)] == ["written", "read"]
    assert {nest.scores for nest in nests(_small("ours-quant-add").stages[0].blocks[0].attn, (1, 16, 32))} == {""}


def test_kinds_of_elementwise_work():
    block = nn.Sequential(nn.LayerNorm(8), nn.GELU(), nn.Softmax(dim=-1))
    found = [(o.kind, o.function) for o in trace(block, (2, 9, 8)).operations]
    assert found == [("norm", "layer_norm"), ("pointwise", "gelu"), ("softmax", "softmax")]
    (add,) = trace(Does(lambda a, b: a + b), (2, 9), (9,)).operations
    assert (add.kind, add.reads, add.elements) == ("elementwise", 9, 18)


def test_tracing_leaves_the_model_as_it_was():
    model = _small("ours-quant-moe")
    model.train()
    model.stages[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    trace(model, (1, 3, 64, 64))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in model.modules())


def test_a_real_model_and_its_meta_twin_have_the_same_trace():
    with torch.device("meta"):
        meta = _small("ours-ksh-moe")
    real = _small("ours-ksh-moe")
    assert trace(real, (1, 3, 64, 64)).operations == trace(meta, (1, 3, 64, 64)).operations


def test_a_size_that_the_model_cannot_run_on_is_an_error():
    with pytest.raises(UserError, match="cannot run on inputs of shape .1, 3, 2, 2."):
        trace(_small("pvt"), (1, 3, 2, 2))


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnet18", "mobilevit_s", "convnext_atto", "pvt_tiny"])
def test_models_of_other_families_are_costed_completely(name):
    found = energy(name)
    assert found.total_mj > 0
    assert found.uncosted == ()


def test_macs_are_those_that_everyone_knows():
    with torch.device("meta"):
        model = timm.create_model("deit_tiny_patch16_224")
    total = sum(nest.macs for nest in nests(model, (1, 3, 224, 224)))
    assert total == pytest.approx(1.26e9, rel=0.01)


def test_mixtures_divide_their_tokens_as_forced():
    found = energy(_small("ours-quant-moe"), shift_share=0.25, image_size=64)
    assert all(entry.shares == (0.75, 0.25) for entry in found.tokens)
    assert found.settings["shift_share"] == pytest.approx(0.25)
    assert found.tokens[0].mean == (192.0, 64.0)


def test_the_whole_model_falls_with_the_share_between_all_multiplications_and_all_shifts():
    model = _small("ours-quant-moe")
    totals = [energy(model, shift_share=share, image_size=64).total_mj for share in (0, 0.1, 0.5, 0.9, 1)]
    assert totals == sorted(totals, reverse=True)
    free = ("router", "dispatch")

    def without_routers(network: nn.Module, share: float | None = None) -> float:
        found = energy(network, shift_share=share, image_size=64)
        return sum(layer.pj for layer in found.per_layer if layer.role not in free and layer.kind not in free)

    pure = [without_routers(_small(recipe)) for recipe in ("ours-quant-add", "ours-quant-shift")]
    assert pure[0] * (1 + 1e-9) >= without_routers(model, 0.5) >= pure[1] * (1 - 1e-9)


def test_measured_shares_are_those_of_the_routing_records():
    model = _small("ours-quant-moe").eval()
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    shares = measured(model, images)
    with torch.no_grad(), record_routing(model) as records:
        model(images)
    for name, routing in records.items():
        index = routing.index.reshape(4, -1)
        assert shares.by_mixture[name][1] == pytest.approx(float((index == 1).float().mean())), name
    found = energy(model, images)
    assert "measured over 4 images" in found.settings["shift_share_source"]
    assert found.sd_mj > 0 and all(entry.sd is not None for entry in found.tokens)
    by_hand = [energy(model, image.unsqueeze(0)).total_mj for image in images]
    assert found.total_mj == pytest.approx(sum(by_hand) / 4, rel=1e-9)
    assert found.sd_mj == pytest.approx(float(torch.tensor(by_hand, dtype=torch.float64).std()), rel=1e-6)


def test_batches_of_a_loader_are_routed_like_one_tensor():
    model = _small("mlp-moe").eval()
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    loader = [(images[:3], torch.zeros(3)), (images[3:], torch.zeros(1))]
    whole = measured(model, images).by_mixture
    for name, shares in measured(model, loader).by_mixture.items():
        assert shares == pytest.approx(whole[name]), name


def test_a_mixture_of_equals_divides_evenly():
    shares = forced(trace(_small("ours-quant-moe"), (1, 3, 64, 64)).mixtures, 1.0)
    assert set(shares.by_mixture.values()) == {(0.0, 1.0)}


@pytest.mark.parametrize("name", ["pvt_tiny", "pvt_v2_b0"])
def test_expert_energies_fit_the_balance_loss(name):
    with torch.device("meta"):
        model = timm.create_model(name)
        reparameterize(model, "mlp-moe")
    costs = expert_energies(model, (1, 3, 224, 224))
    assert set(costs) == {module for module, child in model.named_modules() if isinstance(child, MoELinear)}
    assert all(mult > shift > 0 for mult, shift in costs.values())


def test_balance_loss_takes_energy_as_the_cost():
    model = _small("mlp-moe").eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    costs = {name: torch.tensor(values) / sum(values) for name, values in expert_energies(model, images).items()}
    with record_routing(model) as records:
        model(images)
    assert torch.isfinite(balance_loss(records, costs))


def test_a_larger_batch_costs_no_more_an_image():
    one, eight = (energy(_small("ours-quant-moe"), batch=batch, image_size=64) for batch in (1, 8))
    assert eight.total_mj / 8 <= one.total_mj
    assert eight.tokens[0].mean == one.tokens[0].mean


def test_layers_add_up_to_the_model():
    found = energy("pvt_v2_b0", recipe="ours-quant-moe")
    total = sum(layer.pj for layer in found.per_layer) * 1e-9
    assert total == pytest.approx(found.total_mj)
    assert sum(found.by_level().values()) == pytest.approx(found.total_mj)
    assert sum(found.by_operand().values()) == pytest.approx(found.total_mj)
    assert sum(sum(levels.values()) for levels in found.by_kind().values()) == pytest.approx(found.total_mj)


def test_released_coverage_sees_layers_only():
    full, released = (energy("pvt_v2_b0", recipe="msa", coverage=coverage) for coverage in ("full", "released"))
    assert {layer.kind for layer in released.per_layer} == {"linear", "conv"}
    assert released.total_mj < full.total_mj
    assert any("hooks on leaf modules" in entry.reason for entry in released.uncosted)


def test_widths_follow_the_setting():
    narrow, wide = (energy("pvt_v2_b0", bits=BitWidths(activation=bits, weight=bits)).total_mj for bits in (8, 32))
    assert narrow < wide / 3


def test_warm_is_fast():
    model = _small("ours-quant-moe")
    energy(model, image_size=64)
    energy("pvt_v2_b0", recipe="ours-quant-moe")
    for again in (lambda: energy(model, image_size=64), lambda: energy("pvt_v2_b0", recipe="ours-quant-moe")):
        start = time.process_time()
        again()
        assert time.process_time() - start < 0.05


def test_240_operations_are_traced_and_mapped_in_a_second():
    """Processor time, caches empty, of a network that exists; the limit leaves room for a busy machine."""
    with torch.device("meta"):
        model = reparameterize(timm.create_model("pvt_v2_b2"), "ours-quant-moe")
    times = {"cold": [], "warm": []}
    for _ in range(2):
        for cache in (best_mapping, mapper._triples, mapper._pairs, tiles.tight_sizes, subjects._traced):
            cache.cache_clear()
        for state in times:
            start = time.process_time()
            found = energy(model)
            times[state].append(time.process_time() - start)
    assert sum(layer.primitive != "stream" for layer in found.per_layer) >= 240
    assert min(times["cold"]) < 1.5, times
    assert min(times["warm"]) < 0.075, times


def test_a_change_of_the_model_is_noticed():
    model = _small("ours-quant-moe")
    before = energy(model, image_size=64).total_mj
    for module in model.modules():
        if isinstance(module, ShiftLinear):
            module.enabled = False
    assert energy(model, image_size=64).total_mj > before



def _small(recipe: str) -> nn.Module:
    torch.manual_seed(0)
    return reparameterize(timm.create_model("pvt_v2_b0", num_classes=10, depths=(1, 1, 1, 1)), recipe)
