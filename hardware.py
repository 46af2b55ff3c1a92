"""What the machine can do: its device, the fast dtype, the peak speed, memory, and whether a compiler works."""

import ctypes
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

from wheels import cause_of_uncovered_gpu, cause_of_unused_gpu

# ---------------------------------------------------------------- device


def pick_device(name: str, place: tuple[int, int] | None = None) -> torch.device:
    """The device of this process.

    Args:
        name: cpu, cuda, cuda:N, mps, or auto for the first of CUDA, Apple's mps and the CPU that is there.
        place: the number of this process among those on its machine, and how many they are; None if it trains alone.
            Processes that train together take the GPU of their own number.

    Raises:
        ValueError: this machine has no such device; or it has an NVIDIA GPU that this torch cannot use, which the CPU
            would replace without a word. The message names the cure.
    """
    alone = place is None
    if re.match("auto|cuda", name) and not torch.cuda.is_available() and (cause := cause_of_unused_gpu()):
        raise ValueError(f"device={name}: {cause}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() and alone else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name}: name auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        # All processes check the largest number, because the process that prints must see the error too.
        largest = (device.index or 0) if alone else place[1] - 1
        if not (count := torch.cuda.device_count()):
            cause = (
                "no GPU is visible" if torch.version.cuda or torch.version.hip else "this torch is built without CUDA"
            )
            raise ValueError(f"device={name}: there is no GPU to use ({cause}); pass --device cpu")
        if largest >= count:
            cure = "pass --device cpu" if alone else "start fewer processes, or pass --device cpu"
            raise ValueError(f"device={name}: GPU {largest} was asked for and {count} are visible, from 0 on; {cure}")
        for index in [largest] if alone else range(place[1]):  # those of the other processes, for the same reason
            if cause := cause_of_uncovered_gpu(index):
                raise ValueError(f"device={name}: {cause}")
        return torch.device("cuda", largest if alone else place[0])
    if device.type == "mps" and not (alone and torch.backends.mps.is_available()):
        raise ValueError(f"device={name}: needs an Apple GPU and a single process; pass --device cpu")
    if device.type not in ("cpu", "mps"):
        raise ValueError(f"device={name}: name auto, cpu, cuda, cuda:N or mps")
    return device


def device_name(device: torch.device) -> str:
    """What the maker calls the device: the name of the GPU or of the processor. Where nothing tells, its type."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    info = Path("/proc/cpuinfo")  # Linux; only x86 has the name in it
    found = re.search(r"^model name\s*: (.+)$", info.read_text() if info.is_file() else "", re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


# The least compute capability of an NVIDIA GPU that multiplies matrices of a dtype in hardware; the best dtype first.
LEAST_CAPABILITY = {torch.bfloat16: (8, 0), torch.float16: (7, 0)}


def has_in_hardware(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `device` multiplies matrices of `dtype` in hardware.

    Without it, as on most laptops' CPUs, bfloat16 is emulated, 10 to 100 times slower than float32. The float16 of CPUs
    counts as not there.
    """
    if device.type == "cuda" and dtype in LEAST_CAPABILITY:
        return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY[dtype]
    if device.type == "cpu" and dtype == torch.bfloat16:
        return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return device.type != "cpu" or dtype != torch.float16


def fastest_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which `device` multiplies matrices fastest: the first of bfloat16 and float16 that it has in
    hardware, else float32.

    Training in float16 needs its loss scaled. For a trained model see `dtype_as_trained`.
    """
    return next((dtype for dtype in LEAST_CAPABILITY if has_in_hardware(device, dtype)), torch.float32)


def dtype_as_trained(device: torch.device, trained_in: str | None) -> torch.dtype:
    """The dtype to run a model in whose products had the dtype `trained_in`: that one where `device` has it in
    hardware, else float32.

    float16 does not stand in for bfloat16: the numbers of a model trained in bfloat16 may be beyond its range.
    """
    dtypes = (dtype for dtype in LEAST_CAPABILITY if dtype_name(dtype) == trained_in)
    return next((dtype for dtype in dtypes if has_in_hardware(device, dtype)), torch.float32)


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32, and so on."""
    return str(dtype).removeprefix("torch.")


def set_tf32(device: torch.device, is_on: bool) -> None:
    """Let CUDA round the factors of float32 products to TF32, which has 10 bits of mantissa, or keep all their bits.

    torch.backends.cuda.matmul.fp32_precision is the newer switch. But where it alone says tf32,
    torch.get_float32_matmul_precision() raises, and inductor calls that one when it tunes a product (torch 2.13,
    _inductor/select_algorithm.py). The function below sets both alike. Off is set too, because NVIDIA's containers may
    have switched TF32 on with TORCH_ALLOW_TF32_CUBLAS_OVERRIDE.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if is_on else "highest")


def can_compile(device: torch.device, say: Callable[[str], None] = print) -> bool:
    """Whether torch.compile works here. It needs a C++ compiler or Triton, so one line is compiled to find out.

    If it does not work, `say` is told why.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
        return True
    except Exception as error:  # whatever the compiler says, training goes on without it
        say(f"torch.compile does not work here ({type(error).__name__}); training is slower")
        return False


# ---------------------------------------------------------------- memory


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next step of training.

    By default the C library returns large blocks to the system. The system hands them out again page by page, filled
    with zeros. That took a tenth of a training step on a CPU. The switches are glibc's, see mallopt(3). Other C
    libraries do not have them, and nothing changes there.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError):
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is given back


# ---------------------------------------------------------------- peak speed

# Dense peak of a card in FLOP/s, in bf16 and fp16 alike, with sums in float32: half of what a data sheet says "with
# sparsity". Only the whole name counts: a slice of a GPU ("MIG 3g.20gb"), a Ti, a laptop's card or an NVL is another
# device. A card whose figure two sources do not give alike is not here. It is measured.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200 (480GB|144G HBM3e)": 989e12,
    "H200": 989e12,
    "H100 80GB HBM3": 989e12,
    "H100 PCIe": 756e12,
    "A100-(SXM4|PCIE)-(40|80)GB": 312e12,
    "A100 80GB PCIe": 312e12,
    "L4": 121e12,
    "RTX A6000": 155e12,
    "GeForce RTX 5090": 209e12,
    "GeForce RTX 4090": 165e12,
    "GeForce RTX 3090": 71e12,
    "Tesla V100-SXM2-(16|32)GB": 125e12,
    "Tesla V100-PCIE-(16|32)GB": 112e12,
    "Tesla T4": 65e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s of a perfect program, and where the figure comes from: a known GPU's data sheet, or a product now."""
    if device.type == "cuda" and dtype in LEAST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        for card, flops in PEAK_FLOPS.items():
            if re.fullmatch(f"(NVIDIA )?{card}", name):
                return flops, f"data sheet of {name}"
    return measured_flops(device, dtype), "measured"


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of several square products in `dtype`."""
    # A GPU gets ten products at a time, so that it never waits for the next one.
    n, count = (1024, 1) if device.type == "cpu" else (4096, 10)
    # A generator of its own leaves a resumed run the random state that its checkpoint has.
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    if device.type != "cpu":
        multiply(a, count)  # the first products load the library, pick a kernel, and raise the clock
    seconds = []
    while len(seconds) < 10 and sum(seconds) < 0.5:  # an emulated product takes seconds on a CPU
        began = time.perf_counter()
        multiply(a, count)
        seconds.append(time.perf_counter() - began)
    return count * 2 * n**3 / min(seconds)


def multiply(a: torch.Tensor, count: int) -> None:
    """Multiply `a` (n, n) by itself `count` times, and wait for the device."""
    for _ in range(count):
        product = a @ a
    product[0, 0].item()  # a device works in order, so all are done


if __name__ == "__main__":
    best = pick_device("auto")
    fast = fastest_dtype(best)
    peak, source = peak_flops(best, fast)
    print(f"This machine trains on {best} in {fast}, at most {peak / 1e12:.2f} TFLOP/s ({source}).")
