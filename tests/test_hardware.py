"""hardware.py: devices, the fast dtype, memory and peak speed. The tests need only a CPU and no network."""

import ctypes
import platform
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_model_utils import alone, set_ranks  # noqa: F401 (alone is autouse)

import hardware
import run_data
import train
import wheels
from config import config_errors
from config import local_device as pick_device
from hardware import (
    can_compile,
    device_name,
    dtype_as_trained,
    fastest_dtype,
    keep_freed_memory,
    measured_flops,
    peak_flops,
    set_tf32,
)
from train import SAMPLE

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that the machine has `count` CUDA GPUs of a compute capability, and an Apple GPU if `mps` is true."""

    def pretend(count: int, mps: bool = False, capability: tuple[int, int] = (8, 0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80"])
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    monkeypatch.setattr(wheels, "gpu_of_machine", lambda: None)  # that of the developer
    return pretend


def test_auto_takes_cuda_then_mps_then_the_cpu(gpus):
    gpus(1, mps=True)
    assert pick_device("auto") == torch.device("cuda", 0)
    gpus(0, mps=True)
    assert pick_device("auto") == torch.device("mps")
    gpus(0)
    assert pick_device("auto") == torch.device("cpu")


def test_named_devices_are_taken_as_they_are(gpus):
    gpus(2)
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("cuda") == torch.device("cuda", 0)
    assert pick_device("cuda:1") == torch.device("cuda", 1)


def test_each_rank_takes_the_gpu_of_its_own_number(gpus, monkeypatch):
    gpus(2)
    for rank in (0, 1):
        set_ranks(monkeypatch, rank, 2)
        assert pick_device("cuda") == pick_device("auto") == torch.device("cuda", rank)


def test_several_processes_on_a_mac_share_the_cpu(gpus, monkeypatch):
    gpus(0, mps=True)
    set_ranks(monkeypatch, 0, 2)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"device=mps: .*--device cpu"):
        pick_device("mps")


def test_processes_on_several_machines_take_the_device_of_their_place(gpus, monkeypatch):
    """Each machine has one process. They train together all the same."""
    set_ranks(monkeypatch, 0, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    gpus(0, mps=True)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="device=mps"):
        pick_device("mps")
    gpus(8)
    assert pick_device("cuda:3") == torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "count", "cure"),
    [
        ("cuda", 0, "--device cpu"),
        ("cuda:2", 2, "--device cpu"),
        ("mps", 0, "--device cpu"),
        ("tpu", 0, "name auto, cpu, cuda"),
        ("meta", 0, "name auto, cpu, cuda"),
        ("cuda:x", 1, "name auto, cpu, cuda"),
        ("", 0, "name auto, cpu, cuda"),
    ],
)
def test_device_that_is_not_there_is_refused_with_the_cure(gpus, name, count, cure):
    gpus(count)
    with pytest.raises(ValueError, match=f"device={name}: ") as refusal:
        pick_device(name)
    assert cure in str(refusal.value)


def test_more_processes_than_gpus_are_refused(gpus, monkeypatch):
    gpus(1)
    set_ranks(monkeypatch, 1, 2)
    with pytest.raises(ValueError, match=r"device=cuda: .*fewer processes"):
        pick_device("cuda")


def refused_in_one_line(device: str) -> str:
    [error] = config_errors(replace(SAMPLE, device=device, dtype="float32"))
    assert "\n" not in error
    return error


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_gpu_that_torch_cannot_use_is_not_replaced_by_the_cpu(gpus, monkeypatch, name):
    """test_wheels.py has what the sentence says."""
    gpus(0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(wheels, "gpu_of_machine", lambda: wheels.Gpu("NVIDIA L4", (8, 9), "535.104.05", "12.2"))
    error = refused_in_one_line(name)
    assert error.startswith(f"device={name}: this machine has NVIDIA L4 ") and "+cu126 --index-url " in error
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    if name == "auto":
        assert pick_device(name) == torch.device("cpu")
    else:
        assert refused_in_one_line(name).startswith(f"device={name}: there is no GPU to use")


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_gpu_that_torch_has_no_code_for_is_refused_on_all_ranks(gpus, monkeypatch, name):
    gpus(2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0) if index == 0 else (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Tesla V100 {index}")
    assert pick_device(name) == torch.device("cuda", 0)
    for rank in (0, 1):
        set_ranks(monkeypatch, rank, 2)
        with pytest.raises(ValueError, match=r"^device=cuda: this machine has Tesla V100 1 "):
            pick_device(name)


def test_a_device_has_the_name_that_its_maker_gives_it(monkeypatch):
    info = "processor\t: 0\nmodel name\t: AMD EPYC 7R13: Processor \nflags\t\t: fpu\n\nmodel name\t: another\n"
    monkeypatch.setattr(Path, "is_file", lambda path: str(path) == "/proc/cpuinfo")
    monkeypatch.setattr(Path, "read_text", lambda path: info)
    assert device_name(torch.device("cpu")) == "AMD EPYC 7R13: Processor"
    monkeypatch.setattr(Path, "read_text", lambda path: "processor\t: 0\nCPU part\t: 0xd0c\n")  # Linux on Arm
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert device_name(torch.device("cpu")) == "aarch64"
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    monkeypatch.setattr(platform, "processor", lambda: "arm")  # macOS
    assert device_name(torch.device("cpu")) == "arm"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert device_name(torch.device("cuda", 3)) == "GPU 3" and device_name(torch.device("mps")) == "mps"


def test_compiler_that_fails_is_not_used(monkeypatch, capsys):
    def broken(function):
        raise FileNotFoundError("g++")

    monkeypatch.setattr(torch, "compile", broken)
    assert can_compile(torch.device("cpu")) is False
    assert "FileNotFoundError" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_peak_of_a_known_gpu_comes_from_its_data_sheet(monkeypatch, dtype):
    gpu = torch.device("cuda", 0)
    cards = {
        "NVIDIA GB200": 2500e12,
        "NVIDIA B200": 2250e12,
        "NVIDIA GH200 480GB": 989e12,
        "NVIDIA H200": 989e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "A100-PCIE-40GB": 312e12,
        "NVIDIA A100 80GB PCIe": 312e12,
        "NVIDIA L4": 121e12,
        "NVIDIA RTX A6000": 155e12,
        "NVIDIA GeForce RTX 4090": 165e12,
        "Tesla V100-SXM2-32GB": 125e12,
        "Tesla T4": 65e12,
    }
    for name, flops in cards.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(gpu, dtype) == (flops, f"data sheet of {name}")


OTHER_CARDS = ["A100-SXM4-40GB MIG 3g.20gb", "A100-40C", "H100 80GB HBM3 MIG 1g.10gb", "H100 NVL", "H200 NVL", "L40S"]
OTHER_CARDS += ["GeForce RTX 3090 Ti", "GeForce RTX 4090 Laptop GPU", "GeForce RTX 4090 D", "RTX A1000 Laptop GPU"]
OTHER_CARDS += ["RTX 6000 Ada Generation", "GB300", "A10G", "H100"]


@pytest.mark.parametrize("name", OTHER_CARDS)
def test_peak_of_another_gpu_with_a_similar_name_is_measured(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA {name}")
    monkeypatch.setattr(hardware, "measured_flops", lambda device, dtype: 1e12)
    assert peak_flops(torch.device("cuda", 0), torch.bfloat16) == (1e12, "measured")


def test_peak_in_float32_is_measured_on_a_known_gpu_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(hardware, "measured_flops", lambda device, dtype: 1e12)
    assert peak_flops(torch.device("cuda", 0), torch.float32) == (1e12, "measured")


def test_peak_of_a_cpu_is_measured():
    peak, source = peak_flops(torch.device("cpu"), torch.float32)
    assert 1e8 < peak < 1e15 and source == "measured"


@pytest.mark.parametrize(("device", "size", "products", "fastest"), [("cpu", 1024, 1, 1e-3), ("cuda", 4096, 10, 3.0)])
def test_a_peak_is_that_of_the_fastest_products_and_on_a_gpu_the_first_do_not_count(
    monkeypatch, device, size, products, fastest
):
    """The first products take a millisecond here. The clock stands still but for products."""
    now, seconds, counts = [0.0], iter([1e-3, 3.0, 2.0, 4.0]), []

    def multiply(a, count):
        counts.append(count)
        now[0] += next(seconds)

    monkeypatch.setattr(hardware, "multiply", multiply)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch, "randn", lambda *shape, generator: SimpleNamespace(to=lambda *a: shape))
    assert measured_flops(torch.device(device), torch.float32) == products * 2 * size**3 / fastest
    assert counts == [products] * 2  # the second took longer than half a second


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((10, 0), torch.bfloat16),
        ((8, 0), torch.bfloat16),
        ((7, 5), torch.float16),
        ((7, 0), torch.float16),
        ((6, 1), torch.float32),
    ],
)
def test_a_gpu_takes_bf16_then_fp16_where_its_hardware_has_it(gpus, monkeypatch, capability, dtype):
    gpus(1, capability=capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", list)
    assert fastest_dtype(torch.device("cuda", 0)) == dtype
    for name, least in (("bfloat16", (8, 0)), ("float16", (7, 0))):
        refusal = f"dtype={name}: this GPU has none in hardware; leave it out, or pass --dtype float32"
        found = config_errors(replace(SAMPLE, device="cuda", dtype=name))
        assert found == ([] if capability >= least else [refusal])


@pytest.mark.parametrize("has_bf16", [False, True])
def test_a_cpu_takes_bf16_where_its_hardware_has_it(monkeypatch, has_bf16):
    for name in ("avx512_bf16", "amx_bf16", "bf16"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {"avx2": True, name: has_bf16})
        assert fastest_dtype(torch.device("cpu")) == (torch.bfloat16 if has_bf16 else torch.float32)


def test_a_model_is_run_in_the_dtype_that_it_was_trained_in_or_in_float32(gpus):
    gpu = torch.device("cuda", 0)
    gpus(1, capability=(7, 0))
    assert dtype_as_trained(gpu, "float16") == torch.float16
    assert dtype_as_trained(gpu, "bfloat16") == torch.float32  # its numbers may be beyond the range of float16
    gpus(1, capability=(9, 0))
    assert dtype_as_trained(gpu, "bfloat16") == torch.bfloat16
    for other in ("float32", None, ["float16"]):  # the file of another program may say anything
        assert dtype_as_trained(gpu, other) == torch.float32
    assert dtype_as_trained(torch.device("cpu"), "float16") == torch.float32


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "is_refused"),
    [
        ("cuda", (8, 0), "float32", False),
        ("cuda", (8, 0), "bfloat16", True),
        ("cuda", (8, 0), "auto", True),
        ("cuda", (7, 5), "float32", True),
        ("cpu", (8, 0), "float32", True),
    ],
)
def test_tf32_is_refused_where_nothing_would_use_it(gpus, monkeypatch, device, capability, dtype, is_refused):
    gpus(1, capability=capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", list)
    cfg = replace(SAMPLE, device=device, dtype=dtype)
    assert config_errors(cfg) == []
    found = config_errors(replace(cfg, tf32=True))
    assert len(found) == is_refused and all(error.startswith("tf32=True: ") for error in found)


def test_tf32_is_switched_on_and_off_for_both_of_torchs_interfaces():
    """Where only the newer one is switched on, the older one raises, and inductor calls both."""
    gpu = torch.device("cuda", 0)
    try:
        for is_on in (True, False):
            set_tf32(gpu, is_on)
            set_tf32(torch.device("cpu"), not is_on)
            assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if is_on else "ieee")
            assert torch.get_float32_matmul_precision() == ("high" if is_on else "highest")
            assert torch.backends.cuda.matmul.allow_tf32 is is_on
    finally:
        set_tf32(gpu, False)


def test_a_run_switches_tf32_before_anything_else(monkeypatch):
    gpu, said = torch.device("cuda", 0), []
    monkeypatch.setattr(train, "read_config", lambda *args, **kwargs: replace(SAMPLE, tf32=True, dry_run=True))
    monkeypatch.setattr(train, "local_device", lambda name: gpu)
    monkeypatch.setattr(train, "start_process", lambda device, *args: SimpleNamespace(device=device))
    monkeypatch.setattr(train, "set_tf32", lambda device, is_on: said.append((device, is_on)))
    monkeypatch.setattr(train, "dry_run", lambda *args: said.append("dry run") or 0)
    monkeypatch.setattr(train, "end_process", lambda *args: None)
    assert train.main() == 0
    assert said == [(gpu, True), "dry run"]


def test_a_run_in_float32_says_which_products_it_has(gpus):
    gpus(1)
    cfg, gpu = replace(SAMPLE, dtype="float32"), torch.device("cuda", 0)
    assert run_data.float32_products(cfg, gpu) == [
        "float32 products with all 23 bits of mantissa; --tf32 True is faster, with 10"
    ]
    assert "in TF32" in run_data.float32_products(replace(cfg, tf32=True), gpu)[0]
    assert run_data.float32_products(replace(cfg, dtype="bfloat16"), gpu) == []
    assert run_data.float32_products(cfg, torch.device("cpu")) == []
    gpus(1, capability=(7, 0))
    assert run_data.float32_products(cfg, gpu) == []


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the switches")
def test_kept_memory_comes_without_page_faults():
    """It runs in a process of its own, because a process keeps the switches until it ends."""
    lines = """
import resource, torch
from hardware import keep_freed_memory
keep_freed_memory()
for _ in range(30):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(50_000_000)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    run = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True, check=True)
    faults = list(map(int, run.stdout.split()))
    assert faults[0] > 90  # pages of 4 KB, or huge ones of 2 MB
    assert sum(faults[-5:]) < faults[0]  # the first blocks may not lie where the next one fits


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    keep_freed_memory()
