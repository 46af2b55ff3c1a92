"""Train a Llama 3 from scratch on one device, or on many with torchrun.

    python train.py                                          one GPU, or the CPU
    torchrun --standalone --nproc_per_node 8 train.py        a node of eight GPUs
    python train.py --max_steps 1000 --model.dim 512         every field of the CONFIGURATION block is a flag
    python train.py --dry_run                                what a run takes: memory, time, disk

Edit the block, or pass flags. If the corpus that `data_root` names has not been prepared, a small sample model is
trained on the Python standard library instead. That takes two to eight minutes on two CPU cores.
"""

import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import hellaswag_utils
from checkpoints import TrainState, save_checkpoint
from config import Config, local_device, local_rank, read_config, world_size
from dataloaders import BLOCK, BatchLayout, TrainWindows, open_streams, validation_batches
from dry_run import dry_run
from evaluation import draw_samples, score_hellaswag, validate
from files import allow_any_text_in_output
from load_hellaswag_dataset import write_sample
from model import ModelConfig, Transformer, document_positions
from model_folders import checkpoints_in, find_checkpoint, load_weights
from model_utils import (
    Process,
    RankZeroFailed,
    StopSignal,
    place_model,
    run_on_rank_zero,
    share_loss_and_stop,
    start_process,
    wrap_model,
)
from optimizers import build_optimizers, lr_factor, set_learning_rates
from preparation import prepare
from profiling import start_profiler
from records import Records
from report import write_report
from rows import SourceError
from shards import TokenStream, is_prepared
from tokenizer import Tokenizer

# ================================ CONFIGURATION ================================
# config.py says what each field means, and so does `python train.py --help`.

# A Llama 3 of 301 million parameters on 10 billion tokens of educational web pages.
ORIGINAL = Config(
    # Data
    data_root="data/fineweb-edu-10BT",
    hellaswag_path="data/hellaswag/hellaswag_val.jsonl",
    out_dir="runs/llama3",
    document_mask=False,
    # Batch and length of the run
    total_batch_size=524_288,  # 2^19, as GPT-3 Small had
    batch_size=16,
    max_steps=19_073,  # 19,073 x 524,288 tokens is one epoch of 10 billion
    # Optimizer
    optimizer="adamw",
    max_lr=6e-4,  # GPT-3 Small's, a model of about this size
    muon_lr=0.02,
    betas=(0.9, 0.95),
    weight_decay=0.1,
    grad_clip=1.0,
    # Learning-rate schedule
    schedule="cosine",
    warmup_steps=715,  # 375 million tokens, as GPT-3 had
    min_lr_fraction=0.1,
    decay_fraction=0.2,
    # Device
    device="auto",
    dtype="auto",
    compile="auto",
    seed=1337,
    timeout=600,
    # Along the way
    log_every=10,
    val_every=250,
    val_tokens=1_048_576,
    hellaswag_every=1000,
    hellaswag_limit=0,
    generate_every=1000,
    save_every=1000,  # a checkpoint of this model is 3.6 GB
    keep_checkpoints=2,
    profile=0,
    resume=False,
    skip_nonfinite=0,
    init_from="",
    # Generation
    prompts=("Hello, I'm a language model,", "The theory of evolution says that"),
    generate_tokens=64,
    temperature=0.8,
    top_p=0.95,
    # Weights & Biases
    wandb_project="llama3",
    wandb_artifact=False,
    tensorboard=False,
    # The model
    model=ModelConfig(dim=768, n_layers=16, n_heads=16, n_kv_heads=8, vocab_size=128_256, max_seq_len=1024),
)

# A Llama 3 of 3 million parameters on the source of the Python standard library, for minutes on a laptop. It is trained
# where the data of ORIGINAL has not been prepared. Fields that are not named here are those of ORIGINAL.
SAMPLE = replace(
    ORIGINAL,
    data_root="data/sample",
    hellaswag_path="data/sample/sample_continuations.jsonl",
    out_dir="runs/sample",
    total_batch_size=128 * max(1, round(16 / world_size())) * world_size(),  # 16 sequences, or nearly: equal shares
    batch_size=max(1, round(16 / world_size())),
    max_steps=900,
    optimizer="muon",
    max_lr=2e-2,
    muon_lr=0.01,
    weight_decay=0.0,
    warmup_steps=20,
    min_lr_fraction=0.0,
    log_every=50,
    val_every=150,
    val_tokens=65_536,
    hellaswag_every=300,
    generate_every=300,
    save_every=300,
    prompts=("class ", "def read_", "def main():\n"),
    generate_tokens=100,
    model=ModelConfig(dim=192, n_layers=4, n_heads=3, n_kv_heads=1, vocab_size=4096, multiple_of=64, max_seq_len=128),
)

# ============================== END CONFIGURATION ==============================


def update(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Iterator[tuple[Tensor, Tensor]],
    step: int,
    cfg: Config,
    *,
    accumulation: int,
    bos_id: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, float]:
    """Update number `step`: accumulate, clip, learning rate, step. It takes a batch for each micro-step.

    Returns the mean loss of this process, the norm of the gradient before clipping, and the share of the peak learning
    rate. dry_run.py measures this function.
    """
    mean_loss = torch.zeros((), device=device)
    for micro_step in range(accumulation):
        x, y = (t.to(device, non_blocking=True) for t in next(batches))  # (B, T) each
        # DDP decides in the forward pass whether the backward pass will send gradients: once a step is enough.
        model.require_backward_grad_sync = micro_step == accumulation - 1
        positions = document_positions(x, bos_id) if cfg.document_mask else None
        loss = model(x, y, positions=positions)
        (loss / accumulation).backward()
        mean_loss += loss.detach() / accumulation
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
    factor = lr_factor(step, cfg)
    set_learning_rates(optimizers, factor)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return mean_loss, grad_norm, factor


def train(cfg: Config, process: Process) -> int:
    """The run; returns the exit status."""
    device, out_dir = process.device, Path(cfg.out_dir)
    torch.manual_seed(cfg.seed)
    data = open_data(cfg, process)
    bare_model = place_model(Transformer(cfg.model), device)
    optimizers = build_optimizers(bare_model, cfg)
    state = TrainState(bare_model, optimizers, data.windows)
    saved = checkpoints_in(out_dir / "checkpoints")[-1:] if cfg.resume else []
    if saved:
        state.resume(saved[0], cfg)
        process.print(f"resuming from {saved[0]} after step {state.step}")
    elif cfg.init_from:
        load_weights(find_checkpoint(cfg.init_from), bare_model)
    run_on_rank_zero(partial(state.check_room, out_dir / "checkpoints", cfg), process)
    model = wrap_model(bare_model, optimizers, cfg, process)  # trains the parameters of bare_model
    records = Records(bare_model, cfg, process, state.run_id, last_step=state.step if saved else -1)
    process.print(describe(cfg, process, data, records))

    if state.step == 0 and cfg.val_every:
        row = validate(bare_model, data.val_streams, data.tokenizer, cfg, process)
        check_finite(0, {"validation loss": row["val_loss"]}, out_dir)
        records.validation(0, row, shares={})
    accumulation, bos_id = data.windows.layout.accumulation, data.tokenizer.bos_id
    batches = data.windows.batches(state.step, cfg.max_steps, device)
    profiler = start_profiler(cfg.profile, out_dir / "profile", process)
    stop_signal, stop = StopSignal(), 0  # what this process has heard, and the signal that all have agreed on
    for step in range(state.step + 1, cfg.max_steps + 1):
        began = time.perf_counter()
        mean_loss, grad_norm, factor = update(
            model, optimizers, batches, step, cfg, accumulation=accumulation, bos_id=bos_id, device=device
        )

        # ---- record: all ranks agree on the loss, on whether it is a number, and on whether someone asked to stop
        losses, stop = share_loss_and_stop(mean_loss.item(), stop_signal.number, process)
        seconds = time.perf_counter() - began
        check_finite(step, {f"loss on rank {rank}": value for rank, value in enumerate(losses)}, out_dir)
        check_finite(step, {"gradient": grad_norm.item()}, out_dir)
        row = {"train_loss": sum(losses) / len(losses), "lr": factor * cfg.max_lr, "grad_norm": grad_norm.item()}
        profiler.step()
        records.training(step, seconds, row)

        # ---- along the way
        last, val_loss = step == cfg.max_steps, math.inf
        if last or is_due(cfg.val_every, step):
            row = validate(bare_model, data.val_streams, data.tokenizer, cfg, process)
            val_loss = row["val_loss"]
            check_finite(step, {"validation loss": val_loss}, out_dir)
            records.validation(step, row, data.windows.shares(step))
        if last or stop or is_due(cfg.save_every, step):
            is_best, state.step = val_loss < state.best_val_loss, step
            state.best_val_loss = min(state.best_val_loss, val_loss)
            checkpoint, folder = state.as_checkpoint(cfg, data.tokenizer.fingerprint), out_dir / "checkpoints"
            save = partial(save_checkpoint, folder, checkpoint, keep=cfg.keep_checkpoints, is_best=is_best)
            run_on_rank_zero(save, process)
            process.print(f"step {step:>6}  saved in {folder}")
        # What takes longer comes after the save: torchrun kills 30 seconds after a signal.
        if cfg.hellaswag_every and (last or is_due(cfg.hellaswag_every, step)):
            name = hellaswag_utils.benchmark_name(cfg.hellaswag_path)
            records.hellaswag(step, score_hellaswag(bare_model, data.examples, cfg, process), name)
        if cfg.generate_every and (last or is_due(cfg.generate_every, step)):
            records.samples(step, draw_samples(bare_model, data.tokenizer, cfg, process, step))
        if stop:
            break
    profiler.finish()
    records.close(finished=not stop)
    if stop and state.step < cfg.max_steps:
        process.print(f"stopped after step {state.step} by {signal.Signals(stop).name}; --resume True goes on there")
        return 128 + stop
    if process.is_main:
        write_report([out_dir], out_dir / "report.html")
        print(
            f"done: {out_dir / 'report.html'} has the plots; `python generate.py --checkpoint {out_dir} --prompt ...`"
        )
    return 0


@dataclass
class RunData:
    """What a run reads."""

    tokenizer: Tokenizer
    windows: TrainWindows  # training batches
    val_streams: list[TokenStream]
    examples: list[hellaswag_utils.Example]  # HellaSwag's, none where it is switched off


def open_data(cfg: Config, process: Process) -> RunData:
    """Open the data of the run, after writing the sample's if that is asked for and not there.

    Raises:
        ValueError, OSError: data that is missing, too short, damaged, or does not fit the model; a prompt too long.
    """
    run_on_rank_zero(partial(prepare_sample, cfg), process)
    tokenizer = Tokenizer(vocab_size=cfg.model.vocab_size)
    for prompt in cfg.prompts if cfg.generate_every else ():
        if (n := len(tokenizer.encode(prompt, bos=True))) >= cfg.model.max_seq_len:
            raise ValueError(f"prompts={prompt!r}: its {n} tokens fill model.max_seq_len={cfg.model.max_seq_len}")
    train_streams, val_streams = (
        open_streams(cfg.data_root, split, vocab_size=tokenizer.vocab_size, fingerprint=tokenizer.fingerprint)
        for split in ("train", "val")
    )
    accumulation = cfg.total_batch_size // (cfg.batch_size * cfg.model.max_seq_len * process.world_size)
    layout = BatchLayout(cfg.model.max_seq_len, cfg.batch_size, accumulation, process.rank, process.world_size)
    windows = TrainWindows(train_streams, layout, seed=cfg.seed)
    # The end of every run is validated. So try now whether the data fill a batch: the first one, on every rank alike.
    next(validation_batches(val_streams, replace(layout, rank=0), max_tokens=cfg.val_tokens))
    examples = []
    if cfg.hellaswag_every:
        examples = hellaswag_utils.load_examples(cfg.hellaswag_path, tokenizer, cfg.hellaswag_limit or None)
    return RunData(tokenizer, windows, val_streams, examples)


def prepare_sample(cfg: Config) -> None:
    """Write the sample's files if the sample is asked for and they are not there."""
    if cfg.data_root != SAMPLE.data_root:
        return
    if not is_prepared(cfg.data_root):
        prepare(["sample"], cfg.data_root, vocab_size=cfg.model.vocab_size)
    if cfg.hellaswag_path == SAMPLE.hellaswag_path and not Path(cfg.hellaswag_path).is_file():
        write_sample(cfg.data_root, cfg.hellaswag_path, cfg.model.vocab_size)


def describe(cfg: Config, process: Process, data: RunData, records: Records) -> str:
    """The run in a line: size of the model, length of the run, shape of a step, peak of the devices."""
    tokens = cfg.max_steps * cfg.total_batch_size
    epochs = [
        f"{tokens * stream.quota / BLOCK / len(stream):.2f} epochs of {len(stream):,} tokens"
        for stream in data.windows.streams
    ]
    return (
        f"{records.num_parameters / 1e6:.1f}M parameters; {cfg.max_steps:,} steps, {' + '.join(epochs)}; "
        f"a step is {cfg.total_batch_size:,} tokens = {process.world_size} x {process.device} x "
        f"{data.windows.layout.accumulation} micro-steps x {cfg.batch_size} x {cfg.model.max_seq_len}; "
        f"peak {records.peak / 1e12:.2f} TFLOP/s"
    )


def is_due(every: int, step: int) -> bool:
    """Whether an activity with the interval `every` (0: never) is due at `step`."""
    return every > 0 and step % every == 0


def check_finite(step: int, figures: dict[str, float], out_dir: Path) -> None:
    """Raises ValueError if one of the `figures` of a step is not a finite number, and names the last checkpoint."""
    for name, figure in figures.items():
        if not math.isfinite(figure):
            last = checkpoints_in(out_dir / "checkpoints")
            raise ValueError(
                f"step {step}: the {name} is not finite, so the run stops; the last good checkpoint is "
                f"{last[-1] if last else 'none'}; lower max_lr, or look at the data of this step"
            )


def main() -> int:
    """Read the flags, train, and turn errors into a sentence and an exit status."""
    allow_any_text_in_output()
    process = None
    try:
        cfg = read_config(sys.argv[1:], ORIGINAL, SAMPLE, description=__doc__)
        process = start_process(local_device(cfg.device))
        status = dry_run(cfg, process, update) if cfg.dry_run else train(cfg, process)
    except (ValueError, OSError, MemoryError, SourceError) as error:
        # Before the process group exists, all ranks of a machine find the same error, so one of them prints it. Later
        # a rank may fail alone, so each prints its own.
        if local_rank() == 0 or process:
            print(f"train.py{f' [rank {process.rank}]' if process and process.rank else ''}: {error}", file=sys.stderr)
        return 1
    except RankZeroFailed:
        return 1
    except torch.OutOfMemoryError as error:
        print(f"train.py: {str(error).splitlines()[0]} Halve --batch_size; the update stays the same", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if process.is_main if process else local_rank() == 0:
            print("train.py: interrupted outside of a training step; what was saved before is whole", file=sys.stderr)
        return 130
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return status


if __name__ == "__main__":
    exit_status = main()
    if world_size() > 1:
        # DDP keeps gloo's threads alive. One that wakes while the interpreter shuts down would abort the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_status)
    sys.exit(exit_status)
