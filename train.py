"""Train a Llama 3 from scratch on one device, or on many with torchrun.

    python train.py                                      one GPU, or the CPU
    torchrun --standalone --nproc_per_node 8 train.py    a node of eight GPUs
    python train.py --max_steps 300 --model.n_layers 2   shorter and smaller
    python train.py --config original --dry_run          what it takes

Every field of the CONFIGURATION block is a flag. --config names the values
that the other flags change: `original` is a Llama 3 of 301 million parameters
on data that must be prepared; `recommended` spends the same arithmetic on
more blocks and fewer ids; `sample` is a small one on the Python standard
library, for two to ten minutes on two CPU cores. The default is the original
where its data is prepared, and else the sample.
"""

import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import threads  # noqa: F401 (it sets how threads wait)

import torch
from torch import Tensor, nn

import hellaswag_utils
from checkpoints import CheckpointSaver, TrainState, mark_best, ways_back
from config import Config, config_as_dict, local_device
from dry_run import dry_run
from environment import world_size
from evaluation import draw_samples, due_at, is_due, score_hellaswag, validate
from files import FolderLocked, allow_any_text_in_output, let_output_fail
from hardware import set_tf32
from memory import after_out_of_memory, find_batch_size
from model import ModelConfig, Transformer, document_positions
from model_utils import place_model, to_device, wrap_model
from optimizers import build_optimizers, set_schedules
from processes import (
    Process,
    RankZeroFailed,
    agree_on_stop,
    compare_ranks,
    end_process,
    gather_on_device,
    is_lost_connection,
    run_on_rank_zero,
    say_why,
    start_process,
)
from profiling import start_profiler
from progress import SAVING
from resuming import begin, open_records
from rows import SourceError
from run_config import read_config
from run_data import RunData, describe, open_data
from run_lock import RunLock
from updates import Update, Updates
from wandb_log import finish_after_error

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
    # Optimizer. None: what the optimizer's recipe has
    optimizer="muon",
    max_lr=None,
    embedding_lr=None,
    output_lr=None,
    norm_lr=None,
    muon_lr=None,
    betas=None,
    weight_decay=None,
    grad_clip=1.0,
    # Learning-rate schedule. None: the recipe's
    schedule=None,
    warmup_steps=None,
    min_lr_fraction=None,
    decay_fraction=None,
    # Device
    device="auto",
    dtype="auto",
    tf32=False,
    compile="auto",
    activation_checkpointing="none",
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

# A Llama 3 of 3 million parameters on the source of the Python standard library, for minutes on a laptop. Fields that
# are not named here are those of ORIGINAL.
SAMPLE = replace(
    ORIGINAL,
    data_root="data/sample",
    hellaswag_path="data/sample/sample_continuations.jsonl",
    out_dir="runs/sample",
    total_batch_size=128 * max(1, round(16 / world_size())) * world_size(),  # 16 sequences, or nearly: equal shares
    batch_size=max(1, round(16 / world_size())),
    max_steps=900,
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

# As much arithmetic a token as ORIGINAL. With 32,768 ids the output layer does 15% of it instead of 43%, so the blocks
# can have 165 million parameters instead of 104. A text of FineWeb-Edu has 10% more tokens (measured on 100 documents).
# Heads are 128 wide, as in Llama 3 8B. There are 50 tokens for each weight of a matrix product.
RECOMMENDED = replace(
    ORIGINAL,
    data_root="data/fineweb-edu-10BT-32768",
    out_dir="runs/recommended",
    model=ModelConfig(dim=1024, n_layers=14, n_heads=8, n_kv_heads=4, vocab_size=32_768, max_seq_len=1024),
)

# `--config NAME` takes one of these. Without it: original where its data is prepared, else sample.
CONFIGS = {"original": ORIGINAL, "recommended": RECOMMENDED, "sample": SAMPLE}

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
    scaler: torch.amp.GradScaler,
    process: Process,
) -> Update | None:
    """Update number `step`: accumulate, clip, learning rate, step. It takes a batch for each micro-step.

    This process asks the device for all of it, and waits for no number (but on mps). Returns None, with nothing
    changed, if a stop signal came before the last micro-step. memory.py and dry_run.py measure this function.
    """
    began, mean_loss = time.perf_counter(), torch.zeros((), device=process.device)
    for micro_step in range(accumulation):
        is_last = micro_step == accumulation - 1
        if process.stop and not is_last:
            continue  # this rank has heard a stop signal; before the last micro-step all agree
        if is_last and agree_on_stop(process):
            model.zero_grad(set_to_none=True)
            return None
        process.progress.micro_step(step, micro_step, accumulation)
        x, y = (to_device(t, process.device) for t in next(batches))  # (B, T) each
        # DDP decides in the forward pass whether the backward pass will send gradients: once a step is enough.
        model.require_backward_grad_sync = is_last
        positions = document_positions(x, bos_id) if cfg.document_mask else None
        loss = model(x, y, positions=positions)
        scaler.scale(loss / accumulation).backward()  # float16 needs larger gradients; elsewhere the scale is 1
        mean_loss += loss.detach() / accumulation
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
    rates, scale = set_schedules(optimizers, step, cfg), scaler.scale(torch.ones((), device=process.device))
    done = Update(step, began, rates, gather_on_device(mean_loss, process), grad_norm, scale)
    for optimizer in optimizers:
        optimizer.found_inf = done.is_left_out  # where it is 1, the step changes nothing
        if process.device.type != "mps" or done.is_finite:  # torch's step for mps may not look at it (pytorch 186360)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    return done


def train(cfg: Config, process: Process, saver: CheckpointSaver, notes: list[str]) -> int:
    """The run; returns the exit status. It prints the `notes` when nothing can be refused any more."""
    torch.manual_seed(cfg.seed)
    data = open_data(cfg, SAMPLE, process)
    bare_model = place_model(Transformer(cfg.model), process.device)
    optimizers = build_optimizers(bare_model, cfg, (process.rank, process.world_size))
    scaler = torch.amp.GradScaler(process.device.type, enabled=cfg.dtype == "float16")
    state = TrainState(bare_model, optimizers, data.windows, scaler)
    start = begin(state, cfg, process)
    compare_ranks(data.facts() | start.facts() | {"first step": state.step}, process)
    missing = due_at(state.step, cfg) - set(start.recorded)  # evaluations that a kill after the save has cut off
    if state.step < cfg.max_steps or missing:
        run_on_rank_zero(partial(state.check_room, saver.folder, cfg), process)
    process.print(*notes, *start.notes, sep="\n")  # from here on nothing refuses the run
    if state.step >= cfg.max_steps and not missing:
        process.print(f"step {state.step} of max_steps={cfg.max_steps} is done; nothing is left to do")
        return 0
    model = wrap_model(bare_model, optimizers, cfg, process)  # trains the parameters of bare_model
    records = open_records(state, start, cfg, process)
    process.print(*describe(cfg, process, data, records), sep="\n")
    accumulation, bos_id = data.windows.layout.accumulation, data.tokenizer.bos_id
    batches = data.windows.batches(state.step, cfg.max_steps, process.device)
    profiler = start_profiler(cfg.profile, Path(cfg.out_dir) / "profile", process)
    updates, stop = Updates(records, saver, cfg, process), agree_on_stop(process)
    val_loss = math.inf  # of the model as it is now, if that was validated
    saved = -1 if start.checkpoint and not start.same_run else state.step
    process.progress.begin(cfg, state.step, saved)
    for step in range(state.step, cfg.max_steps + 1):
        if step > state.step and not stop:  # the first pass only evaluates
            process.watch.begin(step)
            done = update(
                model,
                optimizers,
                batches,
                step,
                cfg,
                accumulation=accumulation,
                bos_id=bos_id,
                scaler=state.scaler,
                process=process,
            )
            if done:
                state.step, missing, val_loss = step, due_at(step, cfg), math.inf
                updates.add(done, is_awaited=bool(missing) or is_due(cfg.save_every, step))
                profiler.step()
            else:
                stop = agree_on_stop(process)
            process.watch.end("after the update")
        must_save = state.step != saved and (stop or saved < 0 or step == cfg.max_steps or is_due(cfg.save_every, step))
        updates.record(everything=bool(missing or must_save or stop))

        # ---- along the way: what a stop signal leaves out here, the resumed run makes up
        if "val_loss" in missing and not stop:
            row, stop = validate(bare_model, data.val_streams, data.tokenizer, cfg, process)
            if row:
                val_loss = row["val_loss"]
                if not math.isfinite(val_loss):
                    run_on_rank_zero(saver.wait, process)
                    raise ValueError(f"step {step}: the validation loss is {val_loss}; {ways_back(saver.folder)}")
                records.validation(step, row, data.windows.shares(step))
        is_best = val_loss < state.best_val_loss
        if state.step != saved and (stop or must_save):  # a signal may have come meanwhile
            is_end = stop > 0 or step == cfg.max_steps
            saved = save(state, val_loss, cfg, data, saver, process, is_last=is_end)
        elif is_best and state.step and state.step == saved:
            state.best_val_loss = val_loss
            run_on_rank_zero(partial(mark_best, saver.folder, state.step), process)
        # What takes longer comes after the save: torchrun kills 30 seconds after a signal.
        if "hellaswag_acc" in missing and not stop:
            row, stop = score_hellaswag(bare_model, data.examples, cfg, process)
            if row:
                records.hellaswag(step, row, hellaswag_utils.benchmark_name(cfg.hellaswag_path))
        if "samples_end" in missing and not stop:
            row, stop = draw_samples(bare_model, data.tokenizer, cfg, process, step)
            records.samples(step, row)
        if stop:
            if state.step != saved:  # the signal came after the validation
                save(state, val_loss, cfg, data, saver, process, is_last=True)
            break
    profiler.finish()
    process.progress.doing(SAVING)
    run_on_rank_zero(saver.finish, process)
    process.progress.is_over = not stop
    run_on_rank_zero(partial(records.close, state.step, stop), process)  # it may wait for Weights & Biases
    return 128 + stop if stop else 0


def save(
    state: TrainState,
    val_loss: float,
    cfg: Config,
    data: RunData,
    saver: CheckpointSaver,
    process: Process,
    *,
    is_last: bool,
) -> int:
    """Begin to save the run. `val_loss` is that of this step, or infinite. Returns the step."""
    process.progress.doing(SAVING)
    is_best, state.best_val_loss = val_loss < state.best_val_loss, min(state.best_val_loss, val_loss)
    checkpoint = state.as_checkpoint(cfg, data.tokenizer.fingerprint)
    run_on_rank_zero(partial(saver.save, checkpoint, is_best=is_best, is_last=is_last), process)
    process.progress.saved = state.step
    return state.step


def run(cfg: Config, process: Process, notes: list[str]) -> int:
    """Train in `out_dir`, where no other run may be. Returns the exit status."""
    compare_ranks(config_as_dict(cfg), process)
    lock = RunLock(cfg.out_dir)
    try:
        run_on_rank_zero(lock.acquire, process)
        process.watch.chores.append(lock.beat)
        if cfg.batch_size == "auto":
            open_data(replace(cfg, batch_size=1), SAMPLE, process)  # the search takes long, so refusals come first
            cfg.batch_size = find_batch_size(cfg, process, update, notes.append)  # the records have the number
        with CheckpointSaver(Path(cfg.out_dir) / "checkpoints", cfg.keep_checkpoints) as saver:
            process.watch.before_end = saver.wait
            return train(cfg, process, saver, notes)
    finally:
        lock.release()


def main() -> int:
    """Read the flags, train, and turn errors into a sentence and an exit status."""
    allow_any_text_in_output()
    let_output_fail()
    process, status, cause, is_said, notes = None, 1, "", False, []
    try:
        cfg = read_config(sys.argv[1:], CONFIGS, __doc__, say=notes.append)
        process = start_process(local_device(cfg.device), cfg.timeout)
        set_tf32(process.device, cfg.tf32)
        status = dry_run(cfg, process, update, notes) if cfg.dry_run else run(cfg, process, notes)
    except (ValueError, OSError, MemoryError, SourceError, FolderLocked) as error:
        cause = str(error)
    except torch.OutOfMemoryError as error:
        cause = f"{str(error).splitlines()[0]} To make it fit, {after_out_of_memory(cfg, world_size())}"
    except RankZeroFailed:
        cause, is_said = "rank zero has failed", True  # it says why
    except KeyboardInterrupt:
        status = 128 + ((process and process.stop) or signal.SIGINT)
        cause = "interrupted before the run began; nothing has changed"
    except Exception as error:
        if process and is_lost_connection(error):
            cause = f"lost the other ranks: {process.watch.failures(3)} ({str(error).splitlines()[0]})"
        elif process and process.stop and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            status, cause = 128 + process.stop, "interrupted while compiling"  # Ctrl-C has ended the C++ compiler, too
        else:
            cause = f"{type(error).__name__}: {error}"
            traceback.print_exc()
    if cause and not is_said:
        say_why(process, cause)
    if process:
        end_process(process, cause)
    finish_after_error()
    return status


if __name__ == "__main__":
    try:
        exit_status = main()
    except Exception:  # a rank was lost at the very end
        traceback.print_exc()
        exit_status = 1
    # No thread and no worker process may keep this one alive: gloo's, the loader's, those of Weights & Biases.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_status)
