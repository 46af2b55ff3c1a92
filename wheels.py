"""Why torch cannot use the NVIDIA GPU of this machine, and which wheel of torch, or which driver, can.

nvidia-smi is started only where a GPU may be there that torch cannot use.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from command_line import joined

INDEX = "https://download.pytorch.org/whl"
# The CUDA versions of the wheels that INDEX has of torch 2.13, in the order in which to try them. A wheel for 13.2 fits
# nothing that these do not fit. torch.cuda.PYTORCH_RELEASES_CODE_CC has the GPUs that each is built for.
WHEELS = ("13.0", "12.6", "12.9")
# The oldest driver for all programs of a major version of CUDA (docs.nvidia.com/deploy/cuda-compatibility).
OLDEST_DRIVER = {13: 580, 12: 525}
DEVICE_FILE = Path("/dev/nvidia0")
DRIVER_FILE = Path("/proc/driver/nvidia/version")
PATIENCE = 10.0  # seconds that nvidia-smi may take: it hangs where a driver does


@dataclass(frozen=True)
class Gpu:
    """What is known of an NVIDIA GPU without torch's help."""

    name: str = "an NVIDIA GPU"
    capability: tuple[int, int] | None = None  # compute capability; None: unknown
    driver: str = ""  # version; "": unknown
    cuda: str = ""  # newest CUDA version that the driver supports; "": unknown

    @property
    def newest_cuda(self) -> int:
        """The newest major version of CUDA whose programs the driver runs; 0 for a driver older than all of them."""
        if self.cuda:
            return int(self.cuda.partition(".")[0])
        if not self.driver:
            return max(OLDEST_DRIVER)  # unknown, so not to blame
        branch = int(self.driver.partition(".")[0])
        return max((major for major, oldest in OLDEST_DRIVER.items() if branch >= oldest), default=0)


def nvidia_smi(*flags: str) -> str:
    """What nvidia-smi prints; "" where it is missing, fails or hangs."""
    program = shutil.which("nvidia-smi")
    if not program:
        return ""
    with suppress(OSError):
        process = subprocess.Popen(
            [program, *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
        )
        try:
            printed, _ = process.communicate(timeout=PATIENCE)
            return printed if process.returncode == 0 else ""
        except subprocess.TimeoutExpired:
            process.kill()  # and no wait: a process that the driver holds cannot even be killed
    return ""


@cache
def gpu_of_machine() -> Gpu | None:
    """The first NVIDIA GPU of this machine, whether or not torch can use it; None where there is none."""
    if not (DEVICE_FILE.exists() or shutil.which("nvidia-smi")):
        return None
    header = nvidia_smi()
    driver = re.search(r"(?:Driver|KMD) Version:\s*([\d.]+)", header)
    cuda = re.search(r"CUDA (?:UMD )?Version:\s*([\d.]+)", header)
    if not driver:
        if not DEVICE_FILE.exists():
            return None  # nvidia-smi is installed on machines without a GPU, too
        with suppress(OSError):
            driver = re.search(r"\b(\d{3,}\.[\d.]+)\b", DRIVER_FILE.read_text())
    gpu = Gpu(driver=driver[1] if driver else "", cuda=cuda[1] if cuda else "")
    if not header:  # it is missing, or the driver holds it
        return gpu
    # Drivers of branch 470 and older do not know the field compute_cap.
    printed = (nvidia_smi(f"--query-gpu={fields}", "--format=csv,noheader") for fields in ("name,compute_cap", "name"))
    rows = next(filter(None, printed), "").splitlines()
    row = re.fullmatch(r"(.+?)(?:, (\d+)\.(\d+))?", rows[0].strip()) if rows else None
    if not row:
        return gpu
    return replace(gpu, name=row[1], capability=(int(row[2]), int(row[3])) if row[2] else None)


def covers(archs: Iterable[str], capability: tuple[int, int] | None) -> bool:
    """Whether code for one of `archs` (sm_80, compute_120) runs on a GPU of a compute `capability`; None: assumed.

    Machine code (sm) runs on the same and later minor versions of its major version. The driver compiles PTX (compute)
    for every later GPU.
    """
    if capability is None:
        return True
    found = (re.match(r"(sm|compute)_(\d+)", arch) for arch in archs)
    built = [(match[1], divmod(int(match[2]), 10)) for match in found if match]
    return any(own <= capability and (kind == "compute" or own[0] == capability[0]) for kind, own in built)


def archs_of(wheel: str) -> list[str]:
    """What the wheel for a CUDA version is built for, on this kind of machine."""
    return [f"sm_{code}" for code in torch.cuda.PYTORCH_RELEASES_CODE_CC[wheel][torch.cuda._host_arch_key()]]


def is_hidden() -> bool:
    """Whether CUDA_VISIBLE_DEVICES hides every GPU. CUDA reads its list up to the first entry that names none."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names is not None and not re.match(r"\s*(\d|GPU-|MIG-)", names)


def cause_of_unused_gpu() -> str:
    """What is wrong where torch finds no CUDA though the machine has an NVIDIA GPU, with the cure.

    Returns "" for a machine without such a GPU, and where CUDA_VISIBLE_DEVICES hides it.
    """
    gpu = None if is_hidden() else gpu_of_machine()
    return misfit(gpu, torch.cuda.get_arch_list()) if gpu else ""


def cause_of_uncovered_gpu(index: int) -> str:
    """What is wrong where this torch has no code for GPU `index`, which CUDA shows, with the cure; "" where it has."""
    archs = torch.cuda.get_arch_list()
    if torch.version.hip or not archs or covers(archs, capability := torch.cuda.get_device_capability(index)):
        return ""
    gpu = replace(gpu_of_machine() or Gpu(), name=torch.cuda.get_device_name(index), capability=capability)
    return misfit(gpu, archs)


def misfit(gpu: Gpu, archs: list[str]) -> str:
    """A sentence with the GPU, its driver and this torch, which is built for `archs`, and the cure."""
    capability = "compute capability {}.{}, ".format(*gpu.capability) if gpu.capability else ""
    newest = gpu.cuda or gpu.newest_cuda
    driver = f"driver {gpu.driver} for CUDA {newest} and older" if gpu.driver else "its driver is not known"
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return (
        f"this machine has {gpu.name} ({capability}{driver}), and torch {torch.__version__} ({built}) cannot use it; "
        f"{cure(gpu, archs)}; --device cpu goes on without the GPU"
    )


def cure(gpu: Gpu, archs: list[str]) -> str:
    """What to install so that torch can use `gpu`; or what torch says, where this torch, built for `archs`, fits."""
    own = torch.version.cuda
    if own and int(own.partition(".")[0]) <= gpu.newest_cuda and covers(archs, gpu.capability):
        return f"driver and torch fit, but torch says: {reason()}"
    version = torch.__version__.partition("+")[0]
    covering = [wheel for wheel in WHEELS if covers(archs_of(wheel), gpu.capability)]
    fitting = [wheel for wheel in covering if int(wheel.partition(".")[0]) <= gpu.newest_cuda]
    if fitting:
        tag = f"cu{fitting[0].replace('.', '')}"
        words = [sys.executable, "-m", "pip", "install", f"torch=={version}+{tag}", "--index-url", f"{INDEX}/{tag}"]
        return f"`{joined(words)}` installs one that can"
    if covering:
        oldest = min(OLDEST_DRIVER[int(wheel.partition(".")[0])] for wheel in covering)
        unless = "" if gpu.capability else ", if that still supports this GPU"
        return f"no torch {version} is for so old a driver: update it to {oldest} or newer{unless}"
    return f"no torch {version} is built for this GPU"


def reason() -> str:
    """What torch says when it is told to use CUDA, in one line."""
    try:
        torch.cuda.init()
    except Exception as error:  # whatever it is, it is only quoted
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return "nothing"


if __name__ == "__main__":
    print(cause_of_unused_gpu() if not torch.cuda.is_available() else "torch can use CUDA here.")
