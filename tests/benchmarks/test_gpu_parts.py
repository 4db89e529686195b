"""What benchmarks/gpu.py is made of: the worker, the cases, the predictions, the profile, NVIDIA's tools, outcomes."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import work

from adamae_sampler import ops
from adamae_sampler.ops import backend
from benchmarks.core.rows import COPY, OFFICIAL, OURS, RowWriter, read_rows
from benchmarks.core.worker import Worker, WorkFailed
from benchmarks.stages import every_op, gpu_run, outcomes, step_profile, tools
from benchmarks.stages.common import Failure, Told
from benchmarks.stages.gpu_run import Prediction
from benchmarks.stages.outcomes import Outcome
from benchmarks.steps.step import StepCase
from benchmarks.suites import gpu as gpu_cases
from benchmarks.suites.measure import measure

CUDA, H100 = torch.device("cuda"), "NVIDIA H100 80GB HBM3"


# ------------------------------------------------------------------------------------------------------- worker


def test_a_worker_goes_on_until_something_fails_and_then_anew():
    with Worker() as worker:
        assert list(worker.stream(work.count_to, 3, limit_s=60)) == [0, 1, 2]
        first = list(worker.stream(work.process_number, limit_s=60))
        assert list(worker.stream(work.process_number, limit_s=60)) == first
        for function, message in (
            (work.fail_after, "ValueError: broken on purpose"),
            (work.die_after, r"its process ended \(by signal 6\)"),
        ):
            found = []
            with pytest.raises(WorkFailed, match=message):
                found += worker.stream(function, 2, limit_s=60)
            assert list(worker.stream(work.count_to, 1, limit_s=60)) == [0]  # in another process
        assert list(worker.stream(work.process_number, limit_s=60)) != first


def test_what_a_worker_had_found_before_it_failed_is_kept():
    with Worker() as worker:
        found = worker.stream(work.sleep_after, 2, limit_s=5)
        assert [next(found), next(found)] == [0, 1]
        with pytest.raises(WorkFailed, match="took over 5 s"):
            next(found)


# --------------------------------------------------------------------------------------------- cases, predictions


def test_predictions_are_of_cases_that_are_measured():
    measured = {
        (suite, unit.case.subject(suite).case, unit.label, timing)
        for suite in gpu_cases.SUITES
        for unit in gpu_cases.units(suite, CUDA, quick=False)
        for timing in unit.timings(CUDA)
    }
    predictions = read_rows(gpu_run.PREDICTIONS, Prediction)
    assert {each.when for each in predictions} == {"before", "planned"}
    for each in predictions:
        assert 0 < each.low_s <= each.high_s, each
        if each.suite != "profile":
            assert (each.suite, each.case, each.implementation, each.timing) in measured
            assert 0 < each.floor_s < each.low_s
    families = {name for name, _ in step_profile.FAMILIES} | {"elementwise and LayerNorm"}
    assert {each.implementation for each in predictions if each.suite == "profile"} <= families


def test_ours_is_measured_before_what_it_is_compared_with():
    for suite in gpu_cases.SUITES:
        labels = [unit.label for unit in gpu_cases.units(suite, CUDA, quick=False)]
        ours = [place for place, label in enumerate(labels) if label == OURS]
        official = [place for place, label in enumerate(labels) if label == OFFICIAL]
        assert not official or max(ours) < min(official), suite
        assert len(set(gpu_cases.units(suite, CUDA, quick=False))) == len(labels)


def test_what_stores_its_scores_is_measured_with_few_clips():
    for suite in gpu_cases.SUITES:
        for unit in gpu_cases.units(suite, CUDA, quick=False):
            if isinstance(unit.case, StepCase):
                large = unit.case.implementation == OFFICIAL or unit.case.size == "large"
                assert unit.case.clips <= (64 if large else 256), unit.name


def test_official_code_is_not_captured_and_ours_is():
    timings = {
        unit.label: unit.timings(CUDA)
        for suite in ("ops", "compiled")
        for unit in gpu_cases.units(suite, CUDA, quick=False)
    }
    assert timings == {
        COPY: ("graph",),
        OURS: ("events", "graph"),
        OFFICIAL: ("events",),
        "official compiled": ("events",),
        f"{OURS}, blocks compiled": ("events", "graph"),
        f"{OURS} compiled": ("events",),
    }


@pytest.mark.slow
@pytest.mark.parametrize(("suite", "count"), [("options", 11), ("finetune", 1), ("sweep", 2)])
def test_the_quick_steps_of_every_suite_train(suite, count):
    """The rehearsal of gpu.py runs the other suites."""
    cpu = torch.device("cpu")
    units = gpu_cases.units(suite, cpu, quick=True)
    assert len(units) == count
    if suite == "options":
        assert all(math.isfinite(unit.case.make(cpu)()) for unit in units)
    else:
        rows = [row for unit in units for row in measure(unit, unit.timings(cpu), cpu, 0.0, "abc123")]
        assert [row.commit for row in rows] == ["abc123"] * count
        assert all(row.median_s > 0 for row in rows)


# ------------------------------------------------------------------------------------------------------- profile


@pytest.mark.parametrize(
    ("kernel", "family"),
    [  # as traces of H100s and the binaries of torch 2.11, cuDNN 9.19 and cuBLAS 13.1 have them
        ("_error_kernel", "package"),
        ("_sum_masked_rows_kernel", "package"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cga1x1x1_kernel__5x_cublas", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x64>", "matrix products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16>", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128", "attention"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true>", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<>", "attention"),
        ("fmha_cutlassB_bf16_aligned_128x64_k96_sm80", "attention"),
        ("sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128", "convolution"),
        ("sm90_xmma_wgrad_indexed_implicit_gemm_bf16", "convolution"),
        ("void cudnn::engines_precompiled::nchwToNhwcKernel<float>", "convolution"),
        ("void at::native::vol2col_kernel<c10::BFloat16>", "convolution"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float, false>", "LayerNorm"),
        ("void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float>", "LayerNorm"),
        (
            "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>",
            "casts and copies",
        ),
        ("Memcpy DtoD (Device -> Device)", "casts and copies"),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>, "
            "FusedAdamMathFunctor<float, 4>>",
            "optimizer",
        ),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>", "elementwise"),
        ("triton_poi_fused_add_native_layer_norm_3", "LayerNorm"),
        ("triton_poi_fused_gelu_2", "elementwise"),
        ("Memset (Device)", "elementwise"),
        ("some_kernel_of_tomorrow", "other"),
    ],
)
def test_families_of_kernels(kernel, family):
    assert step_profile.family_of(kernel) == family


def test_which_attention_ran():
    names = (
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma",
        "void pytorch_flash::flash_fwd_kernel<>",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80",
        "aten::_scaled_dot_product_attention_math",
    )
    assert [step_profile.attention_of(name) for name in names] == ["cuDNN", "flash", "memory-efficient", "math"]


def test_waits_are_those_within_steps():
    def event(name, start, end, kind=step_profile.DeviceType.CPU):
        return type("Event", (), {"name": name, "device_type": kind, "time_range": Range(start, end)})

    @dataclasses.dataclass
    class Range:
        start: float
        end: float

    found = step_profile.waits_of(
        [
            event("training step", 10, 20),
            event("cudaStreamSynchronize", 12, 13),
            event("cudaDeviceSynchronize", 25, 26),
            event("cudaLaunchKernel", 15, 16),
        ]
    )
    assert found == {"cudaStreamSynchronize": 1}


@pytest.mark.slow
def test_the_modules_that_workers_share_never_ask_for_a_gpu():
    """Workers are forked from a server that has imported them. CUDA works in no fork of a process that has used it."""
    code = """
import torch
def refuse(*args):
    raise SystemExit("asked for a GPU")
torch._C._cuda_getDeviceCount = refuse
for name in ("is_available", "device_count", "current_device", "get_device_properties", "_lazy_init"):
    setattr(torch.cuda, name, refuse)
import benchmarks.suites.measure
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------- NVIDIA's tools


@pytest.mark.slow
def test_every_kernel_runs_once_for_the_sanitizer(monkeypatch, capsys):
    """Without a GPU in Triton's interpreter; `launch` is told of every kernel."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    seen, launch = set(), backend.launch

    def recorded(kernel, *args, **constants):
        seen.add(kernel.fn.__name__)
        launch(kernel, *args, **constants)

    for name, module in list(sys.modules.items()):
        if name.startswith("adamae_sampler.ops") and hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", recorded)
    # A program of the error kernel takes long in the interpreter, and all of them are alike.
    few = {"reconstruction_error": {"tokens": 16, "visible": 7, "grid": (1, 4, 4)}}
    cases = [dataclasses.replace(case, **few.get(case.op, {})) for case in every_op._SMALL]
    monkeypatch.setattr(every_op, "_SMALL", cases)
    with ops.use_backend("triton"):
        every_op.main(full=False)
    assert seen == set(tools.kernel_names())
    assert capsys.readouterr().out.strip() == every_op.DONE


def fake_program(folder, name, text):
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport sys\n{text}")
    path.chmod(0o755)


SANITIZER = """
log = sys.argv[sys.argv.index("--log-file") + 1]
tool = sys.argv[sys.argv.index("--tool") + 1]
assert sys.argv[-2:] == ["-m", "benchmarks.stages.every_op"]
open(log, "w").write({text!r}[tool])
print({printed!r})
"""


@pytest.mark.parametrize(
    ("text", "printed", "errors"),
    [
        (("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"), "ran", [0, 0]),
        (("ERROR SUMMARY: 1 error", "RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)"), "", [1, 2]),
        (("ERROR SUMMARY: 0 errors", "Internal error"), "ran", [0, "without a summary of every op"]),
        (("ERROR SUMMARY: 0 errors", ""), "", ["without a summary of every op"] * 2),
    ],
)
def test_what_the_sanitizer_says(tmp_path, monkeypatch, text, printed, errors):
    texts = {
        tool: f"========= COMPUTE-SANITIZER\n========= {each}\n" for tool, each in zip(tools.CHECKS, text, strict=True)
    }
    printed = every_op.DONE if printed else "Segmentation fault"
    fake_program(tmp_path, "compute-sanitizer", SANITIZER.format(text=texts, printed=printed))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    where = Told(tmp_path, "abc", quick=True, device=torch.device("cpu"))
    failed = tools.main("sanitizer", where)
    rows = {row.tool: row.value for row in read_rows(where.file("sanitizer"), tools.Finding)}
    failures = {row.what: row.error for row in read_rows(where.file("failures"), Failure)}
    for check, wanted in zip(tools.CHECKS, errors, strict=True):
        if isinstance(wanted, int):
            assert rows[check] == wanted
            assert (check in failures) == (wanted > 0)
        else:
            assert check not in rows
            assert wanted in failures[check]
    assert failed == (1 if failures else 0)


NCU = """==PROF== Connected to process 12
"ID","Process ID","Kernel Name","Context","{names}"
"","","","","{units}"
"0","12","_draw_mask_kernel","1","28,448","5,156,128","5,760","81.2","1,000","63.1","70"
"1","12","_error_kernel","1","1,100,000","1","2","61.5","2,000","n/a","128"
"2","12","_error_kernel","1","1,200,000","3","4","62.5","3,000","24","128"
"""


def test_ncus_counters():
    units = ("ns", "byte", "byte", "%", "inst", "%", "register/thread")
    text = NCU.format(names='","'.join(tools.NCU_METRICS), units='","'.join(units))
    found = tools.counters(text.splitlines())
    assert len(found) == 3 * 7 - 1
    assert ("_draw_mask_kernel", 0, "dram__bytes_read.sum", 5156128.0, "byte") in found
    assert ("_error_kernel", 1, "gpu__time_duration.sum", 1.2e6, "ns") in found
    assert tools.counters(["==ERROR== no permission"]) == []


# ------------------------------------------------------------------------------------------------------- outcomes


def test_tests_that_passed_are_passed_over_and_those_that_failed_run_again(tmp_path):
    kinds = {"a": ["passed"], "b": ["failed"], "c": ["skipped"], "d": ["passed", "failed"]}
    known = [Outcome(test, kind, 0.1, "", "2") for test, each in kinds.items() for kind in each]
    path = tmp_path / "tests_cpu.csv"
    with RowWriter(path, Outcome, known):
        pass
    recorder = outcomes.Recorder(path, is_worker=False)
    items = [type("Item", (), {"nodeid": name}) for name in "abcde"]
    gone = []
    hook = type("Hook", (), {"pytest_deselected": lambda self, items: gone.extend(items)})()
    recorder.pytest_collection_modifyitems(type("Config", (), {"hook": hook}), items)
    assert [item.nodeid for item in items] == ["b", "d", "e"]
    assert [item.nodeid for item in gone] == ["a", "c"]
    report_of = {"nodeid": "b", "when": "call", "outcome": "failed", "duration": 1.0, "longrepr": "one\ntwo"}
    recorder.pytest_runtest_logreport(type("Report", (), report_of))
    recorder.pytest_runtest_logreport(type("Report", (), {**report_of, "when": "teardown", "outcome": "passed"}))
    assert [(row.test, row.outcome, row.message) for row in read_rows(path, Outcome)] == [
        ("a", "passed", ""),
        ("b", "failed", ""),
        ("c", "skipped", ""),
        ("d", "failed", ""),  # of another stage, which runs it again
        ("b", "failed", "one"),
    ]
    recorder.pytest_runtest_logreport(type("Report", (), {**report_of, "outcome": "passed", "longrepr": None}))
    assert {row.test: row.outcome for row in outcomes.last_outcomes(read_rows(path, Outcome))} == {
        "a": "passed",
        "b": "passed",
        "c": "skipped",
        "d": "failed",
    }
    assert outcomes.Recorder(path, is_worker=True).writer is None  # a worker's reports come to the other


def test_a_profile_of_nothing_is_an_error():
    with pytest.raises(RuntimeError, match="saw nothing run on the device"):
        list(step_profile.shares([], CUDA, 3))
