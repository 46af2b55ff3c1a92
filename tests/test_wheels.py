"""wheels.py: an NVIDIA GPU that torch cannot use is named, with the wheel or the driver that it needs. A script stands
in for nvidia-smi."""

import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch

import wheels
from wheels import cause_of_uncovered_gpu, cause_of_unused_gpu, covers, gpu_of_machine

HEADER = "| NVIDIA-SMI {0}    Driver Version: {0}    CUDA Version: {1} |\n"
NEW_HEADER = "| NVIDIA-SMI {0}    KMD Version: {0}    CUDA UMD Version: {1} |\n"  # drivers of 2026
OPEN_KERNEL = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs)  Thu Jan 1 2026"
A100 = "NVIDIA A100-SXM4-40GB, 8.0\n"
CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]  # of the ordinary wheel


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Pretend what nvidia-smi prints (None: it is not installed), whether there is /dev/nvidia0, and a wheel."""

    def pretend(
        header=None, rows="", *, device=False, driver_file="", version="2.13.0+cu130", cuda="13.0", archs=CUDA_13
    ):
        if header is not None:
            program, cat = tmp_path / "nvidia-smi", shutil.which("cat")
            (tmp_path / "header").write_text(header)
            (tmp_path / "rows").write_text(rows)
            program.write_text(
                f'#!/bin/sh\ncase "$*" in *query*) {cat} "{tmp_path}/rows";; *) {cat} "{tmp_path}/header";; esac\n'
            )
            program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        for name, text in (("DEVICE_FILE", "" if device else None), ("DRIVER_FILE", driver_file)):
            if text is not None:
                (tmp_path / name).write_text(text)
            monkeypatch.setattr(wheels, name, tmp_path / name)
        monkeypatch.setattr(torch, "__version__", version)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: archs)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "_host_arch_key", lambda: "x86_64")
    gpu_of_machine.cache_clear()
    yield pretend
    gpu_of_machine.cache_clear()


CPU_WHEEL = {"version": "2.13.0+cpu", "cuda": None, "archs": []}


@pytest.mark.parametrize(
    ("header", "rows", "wheel", "cure"),
    [
        (HEADER.format("535.104.05", "12.2"), A100, {}, "torch==2.13.0+cu126 --index-url {}/cu126`"),
        (HEADER.format("535.104.05", "12.2"), A100, CPU_WHEEL, "torch==2.13.0+cu126 --index-url {}/cu126`"),
        (HEADER.format("580.65.06", "13.0"), A100, CPU_WHEEL, "torch==2.13.0+cu130 --index-url {}/cu130`"),
        (NEW_HEADER.format("610.57.04", "13.3"), A100, CPU_WHEEL, "torch==2.13.0+cu130 --index-url {}/cu130`"),
        (HEADER.format("580.65.06", "13.0"), "Tesla V100-SXM2-16GB, 7.0\n", CPU_WHEEL, "torch==2.13.0+cu126 "),
        (HEADER.format("570.86.15", "12.8"), "NVIDIA GeForce RTX 5090, 12.0\n", {}, "torch==2.13.0+cu129 "),
        (
            HEADER.format("470.82.01", "11.4"),
            "Tesla K80\n",
            {},
            "update it to 525 or newer, if that still supports",
        ),
        (HEADER.format("580.65.06", "13.0"), "NVIDIA GeForce GT 710, 3.5\n", {}, "no torch 2.13.0 is built for this G"),
        (HEADER.format("535.104.05", "12.2"), "", {}, "torch==2.13.0+cu126 "),  # a driver that knows no compute_cap
        (HEADER.format("535.104.05", "ERR!"), A100, {}, "torch==2.13.0+cu126 "),
    ],
)
def test_the_cure_fits_the_driver_and_the_gpu(machine, header, rows, wheel, cure):
    machine(header, rows, **wheel)
    found = cause_of_unused_gpu()
    assert cure.format("https://download.pytorch.org/whl") in found
    newest = header.split()[-2]
    assert f" for CUDA {'12' if newest == 'ERR!' else newest} and older" in found
    name, driver = rows.strip().partition(",")[0] or "an NVIDIA GPU", header.split()[2]
    for word in (name, f"driver {driver} for CUDA 1", wheel.get("version", "2.13.0+cu130"), "--device cpu goes on"):
        assert word in found
    assert ("built for CUDA 13.0" if wheel == {} else "built without CUDA") in found and "\n" not in found


def test_where_driver_and_wheel_fit_torch_is_asked_for_the_reason(machine, monkeypatch):
    def init():
        raise RuntimeError("Error 802: system not yet initialized\nmore lines")

    machine(HEADER.format("580.65.06", "13.0"), A100)
    monkeypatch.setattr(torch.cuda, "init", init)
    assert "torch says: Error 802: system not yet initialized; --device cpu" in cause_of_unused_gpu()


@pytest.mark.parametrize("text", [OPEN_KERNEL, "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 1"])
def test_without_nvidia_smi_the_kernel_tells_the_driver(machine, text):
    machine(device=True, driver_file=text)
    assert "an NVIDIA GPU (driver 570.86.15 for CUDA 12 and older)" in cause_of_unused_gpu()
    assert "torch==2.13.0+cu126 " in cause_of_unused_gpu()


def test_a_nvidia_smi_that_hangs_is_left(machine, monkeypatch, tmp_path):
    machine("", device=True, driver_file=OPEN_KERNEL)
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nexec {shutil.which('tail', path='/usr/bin:/bin')} -f /dev/null\n")
    monkeypatch.setattr(wheels, "PATIENCE", 0.05)
    assert "driver 570.86.15" in cause_of_unused_gpu()


def test_a_machine_that_shows_no_gpu_is_not_refused(machine):
    machine()
    assert cause_of_unused_gpu() == ""
    gpu_of_machine.cache_clear()
    machine("No devices were found\n")  # the login node of a cluster
    assert cause_of_unused_gpu() == ""


def test_no_process_is_started_without_a_device_file_and_nvidia_smi(machine, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a process was started"))
    machine()
    assert cause_of_unused_gpu() == ""


@pytest.mark.parametrize("value", ["", "-1", "NoDevFiles", "-1,0"])
def test_a_gpu_that_is_hidden_on_purpose_is_not_refused(machine, monkeypatch, value):
    machine(HEADER.format("535.104.05", "12.2"), A100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert cause_of_unused_gpu() == ""
    for shown in ("0", "3,-1", "GPU-8eaaebb8", "MIG-c6d4f1ef"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        assert "cu126" in cause_of_unused_gpu()


def test_a_gpu_that_torch_shows_and_has_no_code_for_is_named(machine, monkeypatch):
    machine(HEADER.format("580.65.06", "13.0"), A100)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Tesla V100 {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    found = cause_of_uncovered_gpu(2)
    assert "has Tesla V100 2 (compute capability 7.0, driver 580.65.06 for CUDA 13.0 and older)" in found
    assert "torch==2.13.0+cu126 " in found
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a process was started"))
    assert cause_of_uncovered_gpu(2) == ""


def test_torch_for_amd_is_left_alone(machine, monkeypatch):
    machine(archs=["gfx90a", "gfx942"])
    monkeypatch.setattr(torch, "version", SimpleNamespace(hip="7.2", cuda=None))
    assert cause_of_uncovered_gpu(0) == ""


@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        (["sm_80"], (8, 6), True),
        (["sm_86"], (8, 0), False),
        (["sm_80", "sm_86"], (9, 0), False),
        (["compute_80"], (9, 0), True),
        (["sm_75", "compute_90"], (8, 9), False),
        (["sm_90a"], (9, 0), True),
        (["sm_120", "compute_120"], (12, 1), True),
        (["sm_120"], (13, 0), False),
        (["sm_120", "compute_120"], (13, 0), True),
        ([], (8, 0), False),
        ([], None, True),
    ],
)
def test_code_covers_later_minor_versions_and_ptx_all_later_gpus(archs, capability, expected):
    assert covers(archs, capability) is expected


def test_machine_code_covers_what_torch_says_it_covers():
    """On the GPUs of PCs and servers. On Jetsons torch is stricter, and only warns."""
    jetsons = {53, 62, 72, 87, 101, 110}
    for built in torch.cuda.DEVICE_REQUIREMENT.keys() - jetsons:
        for gpu in (50, 52, 60, 61, 70, 75, 80, 86, 89, 90, 100, 103, 120, 121):
            expected = torch.cuda._code_compatible_with_device(gpu, built)
            assert covers([f"sm_{built}"], divmod(gpu, 10)) is expected, (built, gpu)


def test_torch_still_says_what_the_wheels_are_built_for():
    assert set(wheels.WHEELS) <= torch.cuda.PYTORCH_RELEASES_CODE_CC.keys()
    assert all(wheels.archs_of(wheel) for wheel in wheels.WHEELS)
