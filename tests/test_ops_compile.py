"""Every kernel compiles for compute capability 9.0 with the tiles it is launched with, spills nothing and uses the matrix units."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ops_sass import unset_uniform

pytest.importorskip("triton")

HERE = Path(__file__).parent
ON_WARPGROUP_UNITS = {
    "matshift_kernel", "matshift_int8_kernel", "norm_linear_kernel", "wide_linear_kernel", "dual_kernel",
    "partition_kernel", "view_attention_kernel", "feed_forward_kernel", "ray_transformer_kernel", "apply_kernel",
    "conv_mlp_kernel",
}  # fmt: skip


@pytest.mark.slow
def test_kernels_compile_for_hopper_without_spills(tmp_path):
    # A program of its own, because this one runs kernels in the interpreter; a fresh cache, so that the compiler is what is tested.
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, HERE / "ops_compile.py", "--representative"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    launches = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len({launch["kernel"] for launch in launches}) >= 12
    for launch in launches:
        spilled = {name: launch[name] for name in ("stack", "local", "spill_instructions") if launch[name]}
        assert not spilled, f"{launch['launch']}: {spilled}"
        assert launch["shared"] <= 232448, launch["launch"]
        assert not launch["unset"], f"{launch['launch']}: the assembler reads registers that nothing set: {launch['unset']}"
        if launch["kernel"] in ON_WARPGROUP_UNITS:
            assert launch["wgmma"] > 0, f"{launch['launch']} does not use the warpgroup matrix instructions"


def test_registers_that_nothing_set_are_found():
    right = """
        /*0060*/                   ULDC.64 UR4, c[0x0][0x230] ;
        /*0210*/                   UMOV UR6, 0x400 ;
        /*03d0*/                   USHF.R.U32.HI UR42, URZ, 0x4, UR6 ;
        /*03e0*/                   UMOV UR43, 0x40000040 ;
        /*2160*/              @!P6 LDG.E.128 R72, desc[UR4][R76.64] ;
        /*2170*/                   HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR40], RZ, !UPT ;
    """
    assert unset_uniform(right) == []
    assert unset_uniform(right + "/*2190*/ HGMMA.64x64x16.F32.BF16 R24, gdesc[UR40], RZ, !UPT ;") != []
    # CUDA 12.8: the sum that makes a descriptor, before the address of shared memory is known.
    wrong = "/*00b0*/                   UIADD3 UR10, UP0, UR10, 0x20, URZ ;\n"
    assert unset_uniform(wrong + right) == ["UIADD3 UR10, UP0, UR10, 0x20, URZ"]
