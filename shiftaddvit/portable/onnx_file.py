"""Writing and running ONNX files."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.export import ExportedProgram

from shiftaddvit.errors import UserError

_NO_FORM = re.compile(r"No ONNX function found for <OpOverload\(op='([^']+)'(?:, overload='([^']+)')?")
_LARGEST = 2**31 - 2**20
"""Bytes of weights that one ONNX file (a protocol buffer) can hold."""

_LARGEST_FOLDED = 512
"""Elements of a constant that may be computed in advance."""


def write(program: ExportedProgram, path: Path, opset: int | None, about: Mapping[str, str]) -> None:
    """Write `program` to `path` with `about` as its metadata. UserError for an op without an ONNX form, or packages that are missing."""
    onnx, _ = _packages()
    size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    if size > _LARGEST:
        raise UserError(f"the weights take {size / 1e9:.1f} GB and one ONNX file holds 2 GB: keep them packed, or use format 'torch'")
    try:
        written = torch.onnx.export(
            program, dynamo=True, verbose=False, optimize=False, opset_version=opset, input_names=["images"], output_names=["logits"]
        )
    except torch.onnx.OnnxExporterError as error:
        raise UserError(_explain(error)) from error
    from onnxscript.optimizer import optimize

    # Without a limit, packed weights would be decoded here and stored as floats.
    written.model = optimize(written.model, output_size_limit=_LARGEST_FOLDED)
    proto = written.model_proto
    # The exporter notes where in the source every node comes from: as large as the graph, and full of this machine's paths.
    for part in (
        proto.graph,
        *proto.graph.node,
        *proto.graph.value_info,
        *proto.graph.initializer,
        *proto.graph.input,
        *proto.graph.output,
        *proto.functions,
    ):
        if hasattr(part, "metadata_props"):
            part.ClearField("metadata_props")
        if hasattr(part, "doc_string"):
            part.ClearField("doc_string")
    _name_batch(proto)
    onnx.helper.set_model_props(proto, dict(about))
    onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString())


def _name_batch(proto: "onnx.ModelProto") -> None:  # noqa: F821  (the package is an extra)
    """Call the free dimension `batch` instead of the tracer's symbol."""
    symbol = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if re.search(rf"\b{symbol}\b", dim.dim_param):
                dim.dim_param = re.sub(rf"\b{symbol}\b", "batch", dim.dim_param)


def runner(path: Path) -> tuple[Callable[[Float[Tensor, "B 3 H W"]], Float[Tensor, "B K"]], str]:
    """A function that runs the file in onnxruntime on the CPU, and the runtime's name and version."""
    _, onnxruntime = _packages()
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return run, f"onnxruntime {onnxruntime.__version__}"


def _packages() -> tuple:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise UserError(f"ONNX needs the package {error.name}: install shiftaddvit[export]") from None
    return onnx, onnxruntime


def _explain(error: BaseException) -> str:
    """The op that has no ONNX form, if that is what the exporter complains about; else the innermost reason."""
    cause: BaseException = error
    while cause.__cause__ is not None or cause.__context__ is not None:
        found = _NO_FORM.search(str(cause))
        if found:
            break
        cause = cause.__cause__ or cause.__context__
    found = _NO_FORM.search(str(cause))
    if found:
        name = found[1] + (f".{found[2]}" if found[2] and found[2] != "default" else "")
        return f"the op {name} has no ONNX form: nothing was written; format 'torch' takes it"
    return f"the model has no ONNX form: {str(cause).strip().splitlines()[0]}; nothing was written"
