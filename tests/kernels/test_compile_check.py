"""Parts of compile_check, and, where XLA's GPU compiler is available, that all kernels compile without spills.

The environment variable RADGS_GPU_WHEELS names the folder of the compiler's wheels; the program's message says how to fill it.
"""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl

from kernels.common import support
from kernels.splat import pallas_triton as splat_triton
from kernels.tools import chips
from kernels.tools import compile_check
from kernels.tools import compiler_output
from kernels.tools import compilers
from kernels.tools import lowering
from kernels.tools import operators
from kernels.tools import pair_counts
from kernels.tools import roofline
from kernels.voxelize import pallas_triton as voxelize_triton

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
WHEELS = os.environ.get("RADGS_GPU_WHEELS")
MODULES = {"splat": splat_triton, "voxelize": voxelize_triton}


def _run(*arguments):
    command = [sys.executable, "-m", "kernels.compile_check", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


@pytest.fixture
def own_flags():
    """A callable that forgets the flags that were read; called at the end too."""

    def forget():
        for name in compile_check.FLAGS:
            compile_check.FLAGS[name].unparse()

    yield forget
    forget()


PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'tidy' for 'sm_80'
ptxas info    : Function properties for tidy
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 380 bytes cmem[0]
ptxas info    : Compiling entry function 'greedy' for 'sm_80'
ptxas info    : Function properties for greedy
    24 bytes stack frame, 16 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, 4 bytes cmem[2]
ptxas info    : Function properties for helper
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""


def test_parse_ptxas():
    assert compiler_output.parse_ptxas(PTXAS) == {
        "tidy": {"registers": 40, "stack": 0, "spill_stores": 0, "spill_loads": 0},
        "greedy": {"registers": 255, "stack": 24, "spill_stores": 16, "spill_loads": 20},
    }
    assert compiler_output.parse_ptxas("ptxas fatal   : nothing\n") == {}


def test_parse_launches():
    text = (
        "  003: kGemm [prev=002] something else\n"
        "  004: kCustomKernel [prev=003 (1) | sink ] draw grid: [12, 2, 1] threads: [64, 2, 1]  shared_memory: 512 bytes\n"
    )
    assert compiler_output.parse_launches(text) == {"draw": {"grid": 24, "threads": 128, "shared": 512}}


def test_array_bytes():
    assert compiler_output.array_bytes("(f32[8,3]{1,0}, s32[], /*index=5*/pred[5]{0}, bf16[2,0])") == 96 + 4 + 5
    assert compiler_output.array_bytes("f64[3]{0:T(8,128)}, s4[6]{0}, f8e4m3fn[7]") == 24 + 3 + 7


HLO = """\
%body (p: f32[4,16]) -> f32[4,16] {
  %call.1 = f32[4,16]{1,0} custom-call(%a, %b), custom_call_target="__gpu$xla.gpu.triton", \
operand_layout_constraints={s32[9]{0}, f32[4,16]{1,0}}, output_to_operand_aliasing={{}: (1, {})}, \
metadata={op_name="jit(f)/while/body/draw/pallas_call"}, backend_config={debug = false, ir = "ML\\EF{\\22", name = "draw"}
  %other = f32[2]{0} custom-call(%c), custom_call_target="cublas", operand_layout_constraints={f32[2]{0}}
  ROOT %all-gather.2 = f32[8]{0} all-gather(%d), dimensions={0}
}
ENTRY %main () -> f32[] {
  %all-reduce-start = f32[8]{0} all-reduce-start(%e), to_apply=%add
  %all-reduce-done = f32[8]{0} all-reduce-done(%all-reduce-start)
  %all-gather.3 = f32[8]{0} all-gather(%f), dimensions={0}
  %fusion = f32[8]{0} fusion(%all-gather.3), kind=kLoop
}
"""


def test_parse_hlo():
    assert compiler_output.parse_pallas_calls(HLO) == [{"name": "draw", "bytes": 4 * (64 + 9 + 64)}]
    assert compiler_output.parse_collectives(HLO) == {"all-gather": 2, "all-reduce": 1}
    assert compiler_output.parse_collectives("%f = f32[8]{0} fusion(%g), kind=kLoop") == {}


def test_chips_have_the_peaks_of_their_data_sheets():
    peaks = {"a100": 19.5e12, "rtx4090": 82.6e12, "h100": 67e12}
    for name, peak in peaks.items():
        assert abs(chips.CHIPS[name].flops / peak - 1) < 0.005
    assert chips.CHIPS["a100"].specials == 108 * 16 * 1.41e9
    assert all(chip.source for chip in chips.CHIPS.values())
    assert {target.chip for target in chips.TARGETS.values()} == set(chips.CHIPS)


def test_roofline_by_hand():
    a100, v5e = chips.CHIPS["a100"], chips.CHIPS["v5e"]
    # 5e7 / (108 x 128 x 1.41e9), 4e6 / (108 x 16 x 1.41e9) and 1e7 / 2.039e12 seconds.
    found = roofline.bound(a100, 2e6, 25.0, 2.0, 1e7)
    assert found["flops_ms"] == pytest.approx(0.0025652, rel=1e-4)
    assert found["specials_ms"] == pytest.approx(0.0016417, rel=1e-4)
    assert found["bytes_ms"] == found["bound_ms"] == pytest.approx(0.0049044, rel=1e-4)
    assert found["by"] == "bytes"
    assert roofline.bound(a100, 2e8, 25.0, 2.0, 1e7)["by"] == "flops"
    assert roofline.bound(a100, 2e8, 5.0, 2.0, 1e7)["by"] == "specials"
    unknown = roofline.bound(v5e, 2e6, 25.0, 2.0, 0.0)
    assert unknown["specials_ms"] is None and unknown["by"] == "flops"


def test_operations_by_hand():
    """8 rows and 4 columns a step; a row's term counts for a quarter."""

    def kernel(x, out):
        row = x[...]

        def step(i, total):
            term = (2.0 * row)[:, None]  # 1 per row
            each = jnp.exp(term * total) / 3.0  # a product, an exp with its product, a constant divisor's product
            each = jnp.clip(each, 0.0, 1.0) / total  # a minimum and a maximum, a quotient: 2 and 1 and a special
            return jnp.where(each > i, each, total) + jnp.sum(each)  # 31 / 32 for the sum, 1 for adding it

        out[...] = lax.fori_loop(0, 5, lambda i, total: step(i.astype(jnp.float32), total), out[...] + 7.0)

    call = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((8, 4), jnp.float32), interpret=True)
    found = roofline.operations(jax.make_jaxpr(jax.jit(call))(jnp.zeros(8)).jaxpr)
    assert found == (1 / 4 + 1 + 1 + 1 + 2 + 1 + 31 / 32 + 1, 2.0)


@pytest.mark.parametrize("op", ["splat", "voxelize"])
def test_model_of_the_kernels(op):
    """Whole tiles hold more pairs than are needed, and whole blocks fewer than tiles."""
    spec = operators.OPERATORS[op].specs.SPECS["tiny"]
    found = roofline.model(op, "tiny", "gpu")
    for what in ("forward", "backward"):
        part = found[what]
        assert part["pairs"] == pair_counts.count_pairs(op, spec, spec.arrays()) < part["tiled"]
        # At least the weight of a pair (support.weight: 13 with the exp's product) and adding it up.
        assert part["flops"] > 14 and 1 <= part["specials"] <= 3
    assert found["backward"]["flops"] > 2 * found["forward"]["flops"]
    assert found["backward"]["tiled"] < found["forward"]["tiled"]
    assert found["forward"]["tiled"] % 256 == 0
    # 200 Gaussians have 1,024 instances a launch, and on bricks of voxels more than that.
    assert found["forward"]["launches"] == (1 if op == "splat" else 2) and found["backward"]["launches"] == 1


def test_tiled_work_by_hand():
    """One Gaussian of 4 sigma = 8 voxels round the middle of a cube of 32: 17 voxels a side, from 8 to 24."""

    class Spec:
        size = ((32, 32, 32),)

        @staticmethod
        def arrays():
            precision = jnp.array([[0.25, 0, 0, 0.25, 0, 0.25]], jnp.float32)
            return jnp.ones(1), jnp.full((1, 3), 16.0), precision

    found = roofline.tiled_work(Spec, voxelize_triton)
    # Bricks of 8 x 8 x 4: 3 x 3 x 5, 4 a launch for a single Gaussian; blocks of 4 x 4 x 4 from the box's corner: 5 x 5 x 5.
    assert voxelize_triton.BRICK == (8, 8, 4) and voxelize_triton.BLOCK == (4, 4, 4) and support.SIGMA_MAX == 4
    assert found == {"launches": 12, "forward": 45 * 256, "backward": 125 * 64}


def _row(**changes):
    return {"spill_stores": 0, "spill_loads": 0, "collectives": {"all-reduce": 1}} | changes


def test_what_counts_as_a_failure():
    assert compile_check._failure(_row()) is None
    assert compile_check._failure(_row(spill_stores=None, spill_loads=None)) is None
    assert "16 bytes of stores, 20 of loads" in compile_check._failure(_row(spill_stores=16, spill_loads=20))
    assert "all-gather" in compile_check._failure(_row(collectives={"all-gather": 2}))


def test_a_failure_names_kernel_and_target(own_flags, monkeypatch, capsys):
    rows = [{"kernel": "splat_forward", "failure": None}, {"kernel": "splat_backward", "failure": "spills: 8 bytes"}]
    result = {"ptxas": None, "chips": {}, "targets": {"h100": rows, "a100": "skipped for a test"}}
    monkeypatch.setattr(compile_check, "check", lambda wheels, libtpu: result)
    monkeypatch.setattr(sys, "argv", ["compile_check", "--json"])
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        compile_check.main()
    output = capsys.readouterr()
    assert ended.value.code == 1 and json.loads(output.out) == result
    assert output.err == "error: splat_backward for h100: spills: 8 bytes\n"


def test_a_compiler_that_dies_fails_every_program_it_leaves(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text(
        f"#!/bin/sh\necho '{{\"seconds\": 1.0}}' >'{tmp_path}/results'\necho 'Check failed: x' >&2\nexit 3\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    found = lowering.compile_target("h100", [("splat", "tiny", "forward")] * 3, [], tmp_path)
    assert found[0] == {"seconds": 1.0} and len(found) == 3
    assert all("status 3: Check failed: x" in each["error"] for each in found[1:])


def _cuda(folder, said):
    """A CUDA folder, as the package nvidia-cuda-nvcc-cu12 lays it out, whose ptxas refuses what it is given."""
    for part, text in (
        ("bin/ptxas", f"#!/bin/sh\necho '{said}' >&2\nexit 1\n"),
        ("nvvm/libdevice/libdevice.10.bc", ""),
    ):
        path = folder / "nvidia" / "cuda_nvcc" / part
        path.parent.mkdir(parents=True)
        path.write_text(text)
        path.chmod(0o755)
    return str(folder / "nvidia" / "cuda_nvcc")


def test_an_old_ptxas_gives_a_reason(tmp_path):
    cuda = _cuda(tmp_path, "ptxas fatal   : Unsupported .version 8.8; current version is 8.7")
    assert compilers.find_cuda([str(tmp_path)]) == cuda
    (tmp_path / "module.jit_draw.0.ptx").write_text(".version 8.8\n.target sm_90a\n.visible .entry draw(\n)\n")
    found = lowering.assembly_of(tmp_path, "draw", "draw", cuda)
    assert found["registers"] is None and "Unsupported .version" in found["registers_missing"]
    assert lowering.assembly_of(tmp_path, "draw", "other", cuda)["registers_missing"] == "XLA dumped no PTX of it"


def test_the_wheels_need_a_ptxas(monkeypatch):
    versions = dict.fromkeys(("jax-cuda12-pjrt", "jax-cuda12-plugin"), jax.__version__)
    monkeypatch.setattr(compilers, "versions", lambda folder, names: versions)
    monkeypatch.setattr(compilers, "find_cuda", lambda paths: "somewhere")
    assert compilers.missing_wheels(None) is None
    monkeypatch.setattr(compilers, "find_cuda", lambda paths: None)
    assert "no ptxas" in compilers.missing_wheels(None) and "nvidia-cuda-nvcc-cu12" in compilers.missing_wheels(None)


def test_without_compilers_every_target_is_skipped_with_a_reason(monkeypatch):
    monkeypatch.setattr(compilers, "versions", lambda folder, names: {})
    targets = compile_check.check()["targets"]
    for name in ("a100", "rtx4090", "h100", "8xh100"):
        assert f"pip install --no-deps --target DIR jax-cuda12-pjrt=={jax.__version__}" in targets[name]
    assert "libtpu" in targets["v5e:2x4"]
    old = {"jax-cuda12-pjrt": "0.1", "jax-cuda12-plugin": "0.1"}
    monkeypatch.setattr(compilers, "versions", lambda folder, names: old)
    assert "is 0.1, wanted" in compilers.missing_wheels(None)


@pytest.mark.skipif(compilers.missing_wheels(None) is None, reason="the GPU's compiler is installed")
def test_the_program_skips_and_succeeds():
    done = _run()
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if ": skipped: " in line]
    assert [line.split(":")[0] for line in lines[:4]] == ["a100", "rtx4090", "h100", "8xh100"]
    assert all("jax-cuda12-pjrt" in line and "pip install" in line for line in lines[:4])


def test_bad_flags_end_with_one_line_and_status_2(tmp_path, own_flags, monkeypatch, capsys):
    cases = {
        "'speed'": "--speed=1",
        "'h100'": "h100",
        "has no jax-cuda12-pjrt": f"--wheels={tmp_path}",
        "has no libtpu": f"--libtpu={tmp_path}",
        "is no folder": f"--libtpu={tmp_path / 'none'}",
    }
    for named, argument in cases.items():
        monkeypatch.setattr(sys, "argv", ["compile_check", argument])
        with pytest.raises(SystemExit) as ended:
            compile_check.main()
        own_flags()
        output = capsys.readouterr()
        (line,) = output.err.splitlines()
        assert ended.value.code == 2 and output.out == ""
        assert line.startswith("error: flags: ") and named in line


@pytest.mark.skipif(not WHEELS, reason="RADGS_GPU_WHEELS names no folder with jax-cuda12-pjrt and jax-cuda12-plugin")
def test_kernels_compile_for_every_gpu_without_spills():
    done = _run(f"--wheels={WHEELS}", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    for name in ("a100", "rtx4090", "h100", "8xh100"):
        rows = result["targets"][name]
        if isinstance(rows, str):
            pytest.skip(f"{name}: {rows}")
        assert [row["kernel"] for row in rows] == [
            f"{op}_{what}" for op in ("splat", "voxelize") for what in ("forward", "backward")
        ]
        for row in rows:
            assert row["failure"] is None and row["shared"] is not None and row["bytes"] > 0
            assert 0 < row["registers"] <= 255 and row["spill_stores"] == row["spill_loads"] == 0
            assert "all-gather" not in row["collectives"]


@pytest.mark.skipif(compilers.missing_wheels(None) is None, reason="the GPU's compiler is installed")
def test_the_compiling_process_starts(tmp_path):
    """Without a compiler it reports that, program by program; it does not end before it has read the job."""
    (found,) = lowering.compile_target("h100", [("splat", "tiny", "forward")], [], tmp_path)
    assert "process ended" not in found["error"]
