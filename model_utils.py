"""What a run needs around the model: the wrapped model (DDP), and loading a model."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import cpu_kernels
import cuda_kernels
from checkpoints import read_state
from config import Config
from hardware import can_compile
from model import Transformer
from model_folders import find_checkpoint, read_model, verify_checkpoint
from processes import Process

# ---------------------------------------------------------------- the model, as the loop trains it


def place_model(model: Transformer, device: torch.device) -> Transformer:
    """Move `model` to `device`, and put in the kernels that are faster there. The numbers stay the same."""
    (cpu_kernels if device.type == "cpu" else cuda_kernels).install(model)
    return model.to(device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. The process waits for the copy, unless it is from pinned memory to CUDA.

    From other memory a copy that nobody waits for may read what has been overwritten since.
    """
    return tensor.to(device, non_blocking=device.type == "cuda" and tensor.is_pinned())


def wrap_model(
    model: Transformer, optimizers: Sequence[torch.optim.Optimizer], cfg: Config, process: Process
) -> nn.Module:
    """`model` compiled, with few activations kept, in mixed precision, and with its gradients averaged over the
    processes, in this order.

    The result trains the parameters of `model`, so load a checkpoint into `model` first. Sharding over the processes
    would come here, before compiling.
    """
    process.progress.doing("test of the compiler")
    if cfg.compile is True or (cfg.compile == "auto" and can_compile(process.device, process.print)):
        compile_blocks(model)
        if cfg.document_mask and process.device.type == "cuda":
            cuda_kernels.use_document_blocks(model, getattr(torch, cfg.dtype), process.print)
        process.progress.compiles = True
        process.print("compiling; the first step takes up to a minute")
    checkpoint_activations(model, cfg.activation_checkpointing)
    wrapped: nn.Module = MixedPrecision(model, getattr(torch, cfg.dtype), optimizers)
    if process.world_size > 1:
        wrapped = DistributedDataParallel(wrapped, gradient_as_bucket_view=True, forward_sync_buffers=False)
    return wrapped


def compile_blocks(model: Transformer) -> None:
    """Compile each block, and the kernel of the loss. A step is as fast as with the whole model in one graph.

    The blocks share their code, so the first block is compiled for all, and the wait is half as long. The gradients of
    a block are there when its backward pass is done, so DDP can send them while the other blocks are computed.
    """
    torch._dynamo.config.optimize_ddp = False  # it would cut the graphs of the blocks again, by size
    if model.output.weight.device.type == "cpu":  # not measured on GPUs
        # Keep at most four fifths of a block's activations. The backward pass computes cheap ones again, such as norms.
        # MixedPrecision casts the weights outside of the blocks. Cast inside, they made it compute attention again too.
        functorch_config.activation_memory_budget = 0.8
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)
    model.loss.kernel = torch.compile(model.loss.kernel, dynamic=False)


def checkpoint_activations(model: Transformer, which: str) -> None:
    """Let no block ("none"), every second one ("blocks") or each ("all") keep nothing but its input for the backward
    pass, which computes the inside of the block again. Source: arXiv 1604.06174.

    Call it after compiling: then the same compiled code runs twice, and the numbers are the same to the last bit. (In
    torchtitan, compiling comes afterwards. The backward pass is then compiled anew, and rounds otherwise.)
    """
    for layer in [] if which == "none" else model.layers[:: 2 if which == "blocks" else 1]:
        layer.forward = partial(run_again_in_backward, Holder(layer, layer.forward))


class Holder(nn.Module):
    """A block and its function, so that `functional_call` can run the function with other weights."""

    def __init__(self, block: nn.Module, function: Callable):
        super().__init__()
        self.block, self.function = block, function

    def forward(self, *args: Any) -> Tensor:
        return self.function(*args)


def run_again_in_backward(holder: Holder, *args: Any) -> Tensor:
    """The output of a block. With gradients on, its activations are not kept: the backward pass computes them again.

    MixedPrecision puts casts in the places of the parameters, but only for the forward pass. So the second run gets the
    weights that the block has in the first one.
    """
    if not torch.is_grad_enabled():
        return holder(*args)
    weights = dict(holder.named_parameters())

    def run(*args: Any) -> Tensor:
        return functional_call(holder, weights, args, tie_weights=False)

    # The model draws no random numbers. So their state, which a GPU would have to send, need not be kept.
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)


class MixedPrecision(nn.Module):
    """Runs a model under autocast to `dtype`. Its parameters, their gradients and their updates stay float32.

    Autocast alone would cast the blocks' matrices in every micro-step. Here they are cast once an update: the casts of
    the first micro-step serve until one of the `optimizers` has made its step. Load weights before the first forward
    pass: a change by anything but these optimizers is not seen.
    """

    def __init__(self, model: Transformer, dtype: torch.dtype, optimizers: Sequence[torch.optim.Optimizer]):
        super().__init__()
        self.model, self.dtype = model, dtype
        self._casts: dict[str, Tensor] | None = None
        for optimizer in optimizers:
            optimizer.register_step_post_hook(self._drop_casts)

    def _drop_casts(self, *_: Any) -> None:
        self._casts = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._casts is None:
            with torch.enable_grad():  # a later forward pass may need gradients, even if this one does not
                self._casts = cast_weights(self.model, self.dtype)
        with autocast(self.model.output.weight.device, self.dtype):
            return functional_call(self.model, self._casts, args, kwargs, tie_weights=False)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in `dtype`, bfloat16 or float16. Nothing changes for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def cast_weights(model: Transformer, dtype: torch.dtype) -> dict[str, Tensor]:
    """The blocks' matrices by name, in `dtype`. Gradients flow back through them to the parameters.

    The embedding is a look-up and needs no cast. The gradient of the output layer is summed in float32, so the loss
    casts that matrix itself.
    """
    names = [name for name, p in model.named_parameters() if p.dim() == 2 and p.dtype != dtype and "layers." in name]
    weights = {name: model.get_parameter(name).to(dtype) for name in names}
    for weight in weights.values():
        if weight.grad_fn is None:  # its parameter is not trained
            continue
        # Autograd runs the newest nodes first. The casts are older than the forward pass, so without this line they
        # would all run at the end of the backward pass, and DDP could send no gradient before.
        weight.grad_fn._set_sequence_nr(2**63 - 1)
    return weights


def cast_parameters(model: Transformer, dtype: torch.dtype) -> None:
    """Change the parameters of `model` to `dtype`, one at a time, so that both copies of all never exist.

    The rotary tables stay in float32: in bfloat16 the angles of far positions would be wrong.
    """
    for parameter in model.parameters():  # tied weights are one parameter
        parameter.data = parameter.data.to(dtype)


def flops_per_token(model: Transformer) -> float:
    """Arithmetic of the forward and backward pass of one token: 6 for each weight of a matrix product, and 12 L H K T
    for attention (PaLM, arXiv 2204.02311, appendix B). The embedding is a look-up and does not count."""
    config = model.config
    weights = sum(p.numel() for name, p in model.named_parameters(remove_duplicate=False) if p.dim() == 2)
    weights -= model.tok_embeddings.weight.numel()
    return 6 * weights + 12 * config.n_layers * config.dim * config.max_seq_len


def load_model(path: str | Path, device: torch.device) -> tuple[Transformer, dict]:
    """The model of a checkpoint, a run directory, or any Llama 3 in Hugging Face's layout.

    Returns the model too with what is known of it: "step" (None for a folder of another program) and "dtype", that of
    its products in training.

    Raises:
        ValueError, OSError: there is no such folder, it is damaged, or it holds another model than a Llama 3.
    """
    path = find_checkpoint(path)
    verify_checkpoint(path, training_state=False)
    model, settings = read_model(path)
    state = read_state(path)
    dtype = state["config"].get("dtype") if state else settings.get("dtype", settings.get("torch_dtype"))
    return place_model(model, torch.device(device)).eval(), {"step": state.get("step"), "dtype": dtype}


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one. Run train.py.")
