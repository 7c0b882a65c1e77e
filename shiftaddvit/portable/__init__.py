"""A model as a file for a runtime that is not ours: `torch.export` programs and ONNX. Integers for hardware are in `hardware/`."""

from .program import FORMATS, ExportReport, export

__all__ = ["FORMATS", "ExportReport", "export"]
