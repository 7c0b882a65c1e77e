"""Which process this is, under `torchrun` or alone."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState


def this_process() -> "PartialState":
    """accelerate's state: device, rank, number of processes; joins the process group where there is one to join."""
    import torch
    from accelerate import PartialState

    # Without being told, accelerate lets several processes without a GPU run side by side, each on all of the data.
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return PartialState(cpu=several and not torch.cuda.is_available())


def leave(state: "PartialState") -> None:
    """Close the process group, so that the end of one process is no failure to the others."""
    if state.num_processes > 1:
        state.destroy_process_group()
