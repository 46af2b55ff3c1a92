"""hardware.py: devices, the fast dtype, memory and peak speed. The tests need only a CPU and no network."""

import ctypes
import platform
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from test_model_utils import alone, set_ranks  # noqa: F401 (alone is autouse)

from config import local_device as pick_device
from hardware import can_compile, device_name, fastest_dtype, keep_freed_memory, peak_flops

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that the machine has `count` CUDA GPUs, and an Apple GPU if `mps` is true."""

    def pretend(count: int, mps: bool = False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

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


def test_peak_of_a_known_gpu_comes_from_its_data_sheet(monkeypatch):
    gpu = torch.device("cuda", 0)
    cards = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA GH200 480GB": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA L4": 121e12,
    }
    for name, flops in cards.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(gpu, torch.bfloat16) == flops


def test_peak_of_another_gpu_with_a_similar_name_is_measured(monkeypatch):
    def measured(*args, **kwargs):
        raise InterruptedError

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA RTX A1000 Laptop GPU")  # not an A100
    monkeypatch.setattr(torch, "randn", measured)
    with pytest.raises(InterruptedError):
        peak_flops(torch.device("cuda", 0), torch.bfloat16)


def test_peak_of_a_cpu_is_measured():
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32) < 1e15


@pytest.mark.parametrize("has_bf16", [False, True])
def test_bf16_is_taken_where_the_hardware_multiplies_it(monkeypatch, has_bf16):
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16 or including_emulation)
    expected = torch.bfloat16 if has_bf16 else torch.float32
    assert fastest_dtype(torch.device("cuda", 0)) == expected
    for name in ("avx512_bf16", "amx_bf16", "bf16"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {"avx2": True, name: has_bf16})
        assert fastest_dtype(torch.device("cpu")) == expected


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
