"""Training steps recorded as CUDA graphs: the same numbers as steps that are not."""

from dataclasses import replace

import pytest
import torch
from train_runs import STEPS, TWO_STAGES, loader, model

from shiftaddvit.layers import MoEConfig, MoELinear, Routing
from shiftaddvit.losses import balance_loss
from shiftaddvit.train import StageConfig, finetune
from shiftaddvit.train.run_folder import read_log

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("own_cache")]
RECORDED = "steps are recorded as a CUDA graph"


class Cycle:
    """The loader's batches; from the fifth on every third one has one image less."""

    def __init__(self, odd: bool = False):
        self.inner, self.odd, self.batch_size = loader(device="cuda"), odd, 4

    def __len__(self) -> int:
        return 4 * STEPS

    def __iter__(self):
        for number in range(len(self)):
            if number % STEPS == 0:
                batches = iter(self.inner)
            images, targets = next(batches)
            yield (images[:-1], targets[:-1]) if self.odd and number >= 4 and number % 3 == 0 else (images, targets)


def run(folder, recipe, batches, cuda_graph=True, **changes):
    """Losses of all steps, the notes of the log, and the trained weights."""
    stages = (StageConfig("attention", 2, warmup_epochs=1), StageConfig("all", 2, warmup_epochs=1))
    config = replace(TWO_STAGES, stages=stages, log_every=1, evaluate_every=0, cuda_graph=cuda_graph, **changes)
    built = model(recipe)
    finetune(built, batches, None, config, output=folder, show=False)
    events = read_log(folder / "log.jsonl")
    losses = [event["loss"] for event in events if event["event"] == "step"]
    return losses, [event["note"] for event in events if event["event"] == "note"], built.state_dict()


def assert_same(one, other):
    torch.testing.assert_close(torch.tensor(one[0]), torch.tensor(other[0]), rtol=2e-3, atol=2e-3)
    for name, value in one[2].items():
        torch.testing.assert_close(value.float(), other[2][name].float(), rtol=2e-2, atol=2e-3, msg=name)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("recipe", [None, "ours-quant-moe", "ours-ksh-add-shift", "adder-attention", "shiftaddnet"])
def test_recorded_steps_train_as_others_do(tmp_path, recipe, precision):
    found = run(tmp_path / "graph", recipe, Cycle(), precision=precision)
    expected = run(tmp_path / "plain", recipe, Cycle(), precision=precision, cuda_graph=False)
    assert found[1] and set(found[1]) == {RECORDED} and not expected[1]
    assert len(set(expected[0])) > len(expected[0]) // 2, "losses that do not change would show nothing"
    assert_same(found, expected)


@pytest.mark.parametrize("recipe", ["ours-quant-moe", "ecoformer"])
def test_recorded_steps_with_attention_compiled_train_as_others_do(tmp_path, recipe):
    found = run(tmp_path / "fast", recipe, Cycle(), precision="bf16", compile="attention")
    assert set(found[1]) == {RECORDED}
    assert_same(found, run(tmp_path / "plain", recipe, Cycle(), precision="bf16", cuda_graph=False))


def test_a_batch_of_another_size_runs_as_it_is(tmp_path):
    found = run(tmp_path / "graph", "ours-quant-moe", Cycle(odd=True))
    assert set(found[1]) == {RECORDED}
    assert_same(found, run(tmp_path / "plain", "ours-quant-moe", Cycle(odd=True), cuda_graph=False))


def test_a_step_that_waits_for_the_device_is_not_recorded(tmp_path, monkeypatch):
    from shiftaddvit.train.update import Update

    computed = Update.loss
    monkeypatch.setattr(Update, "loss", lambda self, *batch: (found := computed(self, *batch)) * (1.0 if found.item() else 1.0))
    found = run(tmp_path / "graph", "ours-quant-moe", Cycle())
    assert set(found[1]) == {"steps are not recorded as a CUDA graph: a step waits for the device"}
    assert_same(found, run(tmp_path / "plain", "ours-quant-moe", Cycle(), cuda_graph=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 160), (32, 256), (256, 32), (160, 640)])
def test_a_mixture_trained_by_its_kernels_equals_the_one_that_computes_every_expert(monkeypatch, inputs, outputs, dtype):
    torch.manual_seed(0)
    layer = MoELinear.from_linear(torch.nn.Linear(inputs, outputs)).cuda()
    for number, expert in enumerate(layer.experts):
        expert.bias.data += number
    x, upstream = torch.randn(7, 1611, inputs, device="cuda", requires_grad=True), torch.randn(7, 1611, outputs, device="cuda")

    def results():
        torch.manual_seed(1)  # of the router's noise
        with torch.autocast("cuda", dtype=dtype):
            y = layer(x)
        return y, torch.autograd.grad(y, (x, *layer.parameters()), upstream.to(y.dtype))

    assert layer.trains_by_kernel(x.to(dtype)) and not layer.trains_by_kernel(x)
    assert not MoELinear.from_linear(torch.nn.Linear(4, 4), MoEConfig(gate="paper")).cuda().trains_by_kernel(x.to(dtype))
    y, found = results()
    monkeypatch.setattr(MoELinear, "trains_by_kernel", lambda self, x: False)
    expected_y, expected = results()
    torch.testing.assert_close(y, expected_y, rtol=2e-2, atol=2e-2)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 2e-2 * b.norm()


def test_the_balance_loss_is_the_same_on_gpu_and_cpu_and_needs_no_sync():
    torch.manual_seed(0)
    clean = [torch.randn(*shape, 2) for shape in ((64, 197), (3, 7, 7), (5000,))]
    noisy = [tensor + torch.randn_like(tensor) / 2 for tensor in clean]
    results = {}
    for device in ("cpu", "cuda"):
        leaves = [[tensor.clone().to(device).requires_grad_() for tensor in tensors] for tensors in (noisy, clean)]
        records = {str(i): Routing(a.argmax(-1), torch.ones_like(a[..., 0]), a, b) for i, (a, b) in enumerate(zip(*leaves, strict=True))}
        costs = {name: torch.tensor([3.0, 1.0 + int(name)], device=device) for name in records}
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss = balance_loss(records, costs)
            gradients = torch.autograd.grad(loss, sum(leaves, []))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results[device] = [tensor.cpu() for tensor in (loss, *gradients)]
    for found, expected in zip(results["cuda"], results["cpu"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)
