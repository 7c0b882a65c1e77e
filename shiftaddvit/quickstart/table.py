"""What the quickstart says: the table, how to read it, and what to do next."""

from rich import box
from rich.table import Table
from rich.text import Text

from .rows import RowResult

PLAIN_WORDS = (
    "This data is far too easy, and two epochs are far too few, to rank methods by. "
    "The table shows that the whole path works on this machine, not which row is best."
)
COMMANDS = """\
  shiftaddvit finetune pvt_v2_b0 IMAGES --weights WEIGHTS.pth --recipe ours-quant-moe --output runs/mine
  shiftaddvit convert runs/mine/model.safetensors --packed --half --output mine.safetensors
  shiftaddvit evaluate mine.safetensors IMAGES
  shiftaddvit energy mine.safetensors --images IMAGES/val
"""
PYTHON = """\
  model = sav.create_model("pvt_v2_b0"); sav.load_pretrained(model, "WEIGHTS.pth")         # import shiftaddvit as sav
  sav.finetune(sav.reparameterize(model, "ours-quant-moe"), train_loader, val_loader, output="runs/mine")
  sav.save(model, "mine.safetensors", packed=True)
"""


def results_table(rows: list[RowResult]) -> Table:
    """One line a row."""
    table = Table(title=f"Fashion-MNIST, {rows[0].evaluation.images:,} test images; measured in this run", title_style="", box=box.SIMPLE_HEAD)
    table.add_column("row", no_wrap=True)
    for heading in ("top-1\n%", "95 %\ninterval", "tokens\non shift", "mults\nremoved", "file", "of fp32\ndense"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        low, high = row.evaluation.interval95
        cells = [f"{row.evaluation.top1:.1f}", f"{low:.1f}–{high:.1f}", share(row.shift_share), percent(row.removed)]
        table.add_row(row.name, *cells, f"{row.bytes / 1000:,.0f} kB", f"{row.bytes / row.dense_bytes:.2f}×")
    return table


def share(value: float | None) -> str:
    """A share of tokens in a cell."""
    return "–" if value is None else f"{100 * value:.0f} %"


def percent(value: float) -> str:
    """A share of multiplications in a cell; a true minus sign."""
    return f"{100 * value:.1f} %".replace("-", "−") if abs(value) >= 0.0005 else "0.0 %"


def reading() -> Text:
    """How to read the columns."""
    lines = (
        "rows: attention over all tokens (MSA), linear attention, with additions for its products of queries and keys (add), with shifts for multiplications "
        "in its linear layers and the MLPs (both), with a mixture (MoE): one expert that multiplies and one that shifts, and a router that sends each token to one.",
        "tokens on shift: over all mixtures and test images; all where every linear layer shifts, – where none does.",
        "mults removed: of the dense model's multiplications in linears, convolutions and attention products; below zero there are more of "
        "them (attention over all tokens costs more than attention with spatial reduction).",
        "file: packed, that is shift weights as integer codes and the rest in half precision; dense in fp32.",
    )
    return Text("\n".join(lines), style="dim")


def saved(row: RowResult) -> Text:
    """Whether the row's file holds the same model."""
    same = "identical logits" if row.largest_difference == 0 else f"logits differ by up to {row.largest_difference:.2g}, which is a bug"
    return Text(f"Saved {row.file} ({row.bytes / 1000:,.0f} kB) and loaded it again: {same}.")


def see(folder: str) -> Text:
    """How to look at the results rather than read them."""
    return Text.assemble("To see them, and which image regions went to which expert:  ", (f"shiftaddvit report {folder}", "cyan"), "  (then open report.html in a browser)")


def next_steps() -> Text:
    """What to do with one's own model; lines to copy."""
    intro = "Next, your own model (any timm PVTv2, DeiT or ViT, or PVTv1) and your images (IMAGES/train/CLASS/…, IMAGES/val/CLASS/…):\n\n"
    return Text.assemble(intro, (COMMANDS, "cyan"), "\nor in Python:\n\n", (PYTHON, "cyan"))
