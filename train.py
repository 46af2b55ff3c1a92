"""Train a Llama 3 from scratch on one device, or on many with torchrun.

    python train.py                                          one GPU, or the CPU
    torchrun --standalone --nproc_per_node 8 train.py        a node of eight GPUs
    python train.py --max_steps 1000 --model.dim 512         every field of the CONFIGURATION block is a flag

Edit the block, or pass flags. Where the corpus that `data_root` names has not been prepared, a small sample
model is trained on the Python standard library instead, in two to eight minutes on two CPU cores.
"""

import itertools
import json
import math
import os
import signal
import sys
import time
import uuid
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

import hellaswag_utils
from dataloaders import BLOCK, TokenStream, TrainWindows, folder_quotas, open_streams, validation_batches
from files import atomic_write, is_prepared
from generate import complete
from load_fineweb_dataset import prepare
from load_hellaswag_dataset import write_sample
from model import ModelConfig, Transformer, document_positions
from model_utils import (
    MetricsLog,
    Process,
    StopSignal,
    can_compile,
    cast_weights,
    checkpoints_in,
    config_as_dict,
    fastest_dtype,
    flops_per_token,
    in_main_process,
    is_main_process,
    load_checkpoint,
    peak_flops,
    pick_device,
    random_state,
    restore_random_state,
    save_checkpoint,
    share,
    start_process,
    start_wandb,
    sum_over_processes,
    world_size,
)
from optimizers import build_optimizers, load_moments, lr_factor
from profiling import start_profiler
from report import write_report
from sources import SourceError
from tokenizer import VOCAB_SIZES, Tokenizer

# ================================ CONFIGURATION ================================


@dataclass
class Config:
    # Data
    data_root: str | tuple[str, ...] = "data/fineweb-edu-10BT"  # prepared folder; or several to mix, as path:weight
    hellaswag_path: str = "data/hellaswag/hellaswag_val.jsonl"  # file that load_hellaswag_dataset.py fetched
    out_dir: str = "runs/llama3"  # folder of this run: metrics, samples, checkpoints
    document_mask: bool = False  # attention stays within a document, as Llama 3 was trained; slower on long sequences

    # Batch and length of the run
    total_batch_size: int = 524_288  # tokens an optimizer step, over all processes; 2^19, as GPT-3 Small had
    batch_size: int = 16  # sequences a micro-step in each process; lower it when memory runs out
    max_steps: int = 19_073  # optimizer steps; 19,073 x 524,288 tokens is one epoch of 10 billion

    # Optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the blocks, AdamW for the rest
    max_lr: float = 6e-4  # AdamW's peak learning rate; GPT-3 Small's, for a model of this size
    muon_lr: float = 0.02  # Muon's peak learning rate, on a scale of its own; with optimizer=muon alone
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's decay of the first and second moments
    weight_decay: float = 0.1  # on matrices alone
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0 does not clip

    # Learning-rate schedule
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: warm up, hold, decay at the end
    warmup_steps: int = 715  # steps of linear warm-up; 375 million tokens, as GPT-3 had
    min_lr_fraction: float = 0.1  # learning rate at the last step, as a share of the peak
    decay_fraction: float = 0.2  # with wsd: share of the steps that decay

    # Device
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the matrix products; auto: bfloat16 where it is fast
    compile: bool | Literal["auto"] = "auto"  # torch.compile; auto: where a compiler is found
    seed: int = 1337  # of the initial weights and of the order of the data

    # Along the way; an interval of 0 switches that activity off, the end of a run is always validated and saved
    log_every: int = 10  # steps between printed lines; metrics.jsonl has every step
    val_every: int = 250  # steps between validations
    val_tokens: int = 1_048_576  # tokens of the validation shard that each one reads
    hellaswag_every: int = 1000  # steps between HellaSwag evaluations
    hellaswag_limit: int = 0  # rows of it that count; 0 is all 10,042
    generate_every: int = 1000  # steps between continuations of the prompts, into samples.txt
    save_every: int = 1000  # steps between checkpoints; one of the default model is 3.6 GB
    keep_checkpoints: int = 2  # newest ones kept, besides the best
    profile: int = 0  # steps recorded with torch.profiler, into the folder of the run; 0 records none
    resume: bool = False  # go on from the newest checkpoint in out_dir, if there is one

    # Generation
    prompts: tuple[str, ...] = ("Hello, I'm a language model,", "The theory of evolution says that")  # to continue
    generate_tokens: int = 64  # tokens for each prompt
    temperature: float = 0.8  # 0 takes the likeliest token
    top_p: float = 0.95  # probability of the nucleus that tokens are drawn from

    # Weights & Biases, used where WANDB_API_KEY is set
    wandb_project: str = "llama3"  # project that the run appears in

    # The model; its fields are flags too, --model.dim and so on
    model: ModelConfig = field(
        default_factory=lambda: ModelConfig(
            dim=768,
            n_layers=16,
            n_heads=16,
            n_kv_heads=8,
            vocab_size=128_256,
            max_seq_len=1024,
        )
    )


# Trained where the default corpus has not been prepared: minutes on a laptop, on the Python standard library's source.
SAMPLE = Config(
    data_root="data/sample",
    hellaswag_path="data/sample/sample_continuations.jsonl",
    out_dir="runs/sample",
    total_batch_size=2048,
    batch_size=max(1, 16 // world_size()),
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
    model=ModelConfig(
        dim=192,
        n_layers=4,
        n_heads=3,
        n_kv_heads=1,
        vocab_size=4096,
        multiple_of=64,
        max_seq_len=128,
    ),
)

# ============================== END CONFIGURATION ==============================


def config_errors(cfg: Config) -> list[str]:
    """One sentence for every field that cannot be honoured: its name, its value, the cure."""
    errors = [f"model.{error}" for error in cfg.model.errors()]
    if cfg.model.vocab_size not in VOCAB_SIZES:
        errors.append(f"model.vocab_size={cfg.model.vocab_size}: must be {VOCAB_SIZES[0]} to {VOCAB_SIZES[-1]}")
    counts = ("total_batch_size", "batch_size", "max_steps", "log_every", "val_tokens", "keep_checkpoints")
    for name in (*counts, "generate_tokens"):
        if getattr(cfg, name) < 1:
            errors.append(f"{name}={getattr(cfg, name)}: must be at least 1")
    intervals = ("val_every", "hellaswag_every", "generate_every", "save_every")
    for name in (*intervals, "hellaswag_limit", "warmup_steps", "seed", "profile"):
        if getattr(cfg, name) < 0:
            errors.append(f"{name}={getattr(cfg, name)}: must be 0 or more")
    for name in ("max_lr", "muon_lr", "grad_clip", "weight_decay", "temperature"):
        if not 0 <= getattr(cfg, name) < math.inf:
            errors.append(f"{name}={getattr(cfg, name)}: must be 0 or more")
    for name in ("min_lr_fraction", "decay_fraction"):
        if not 0 <= getattr(cfg, name) <= 1:
            errors.append(f"{name}={getattr(cfg, name)}: must be between 0 and 1")
    if not 0 < cfg.top_p <= 1:
        errors.append(f"top_p={cfg.top_p}: must be above 0 and at most 1")
    if not all(0 <= beta < 1 for beta in cfg.betas):
        errors.append(f"betas={cfg.betas}: both must be 0 or more and below 1")
    if cfg.generate_every and not cfg.prompts:
        errors.append("prompts=(): must hold at least one; --generate_every 0 goes without")
    sequences = cfg.batch_size * world_size()
    tokens = sequences * cfg.model.max_seq_len
    if tokens > 0 and cfg.total_batch_size % tokens:
        nearest = max(1, round(cfg.total_batch_size / tokens)) * tokens
        errors.append(
            f"total_batch_size={cfg.total_batch_size}: must be a multiple of batch_size={cfg.batch_size} x "
            f"{world_size()} processes x model.max_seq_len={cfg.model.max_seq_len} = {tokens}; {nearest} would do"
        )
    try:
        device = pick_device(cfg.device)
        fastest = fastest_dtype(device)
        if cfg.dtype == "bfloat16" and device.type == "cuda" and fastest == torch.float32:
            errors.append(f"dtype={cfg.dtype}: this GPU has none; pass --dtype float32")
    except ValueError as error:
        errors.append(str(error))
    return errors


def read_config(args: list[str]) -> Config:
    """The CONFIGURATION block under the flags in `args`; the sample's where the default corpus is not prepared.

    Raises:
        ValueError: fields that cannot be honoured, all of them in one message.
    """
    parse = partial(tyro.cli, Config, args=args, use_underscores=True, config=(tyro.conf.FlagConversionOff,))
    cfg, sample = parse(description=__doc__), parse(default=SAMPLE)
    errors = []
    data_given = cfg.data_root == sample.data_root  # the two configurations differ in it, unless a flag set it
    hellaswag_given = cfg.hellaswag_path == sample.hellaswag_path
    missing = []
    try:
        missing = [folder for folder in folder_quotas(cfg.data_root) if not is_prepared(folder)]
    except ValueError as error:
        errors.append(str(error))
    if missing:
        if data_given:
            errors += [f"data_root={m}: not a prepared folder; load_fineweb_dataset.py makes one" for m in missing]
        else:
            if is_main_process():
                print(f"{cfg.data_root} is not prepared: `python load_fineweb_dataset.py` prepares 10 billion tokens.")
                print("Training the sample configuration instead: a small Llama 3 on the Python standard library.")
            cfg = sample
    if cfg is not sample and cfg.hellaswag_every and not Path(cfg.hellaswag_path).is_file():
        cure = "`python load_hellaswag_dataset.py` fetches HellaSwag; --hellaswag_every 0 goes without"
        if hellaswag_given:
            errors.append(f"hellaswag_path={cfg.hellaswag_path}: no such file; {cure}")
        else:
            if is_main_process():
                print(f"{cfg.hellaswag_path} is not there, so this run goes without it; {cure}")
            cfg.hellaswag_every = 0
    errors += config_errors(cfg)
    if errors:
        raise ValueError("\n".join(errors))
    if cfg.dtype == "auto":  # what it stands for belongs into the records
        cfg.dtype = "bfloat16" if fastest_dtype(pick_device(cfg.device)) == torch.bfloat16 else "float32"
    return cfg


def prepare_sample(cfg: Config) -> None:
    """Write the sample's files where the sample is asked for and they are not there."""
    if cfg.data_root != SAMPLE.data_root:
        return
    if not is_prepared(cfg.data_root):
        prepare(["sample"], cfg.data_root, vocab_size=cfg.model.vocab_size)
    if cfg.hellaswag_path == SAMPLE.hellaswag_path and not Path(cfg.hellaswag_path).is_file():
        write_sample(cfg.data_root, cfg.hellaswag_path, cfg.model.vocab_size)


def open_run_folder(cfg: Config) -> None:
    """Make out_dir and its config.json; an earlier run there, unless this one resumes it, is moved aside, not lost."""
    out_dir = Path(cfg.out_dir)
    if not cfg.resume and ((out_dir / "metrics.jsonl").is_file() or any(out_dir.glob("checkpoints/*.pt"))):
        aside = next(p for i in itertools.count(1) if not (p := out_dir.with_name(f"{out_dir.name}.{i}")).exists())
        out_dir.rename(aside)
        print(f"{out_dir} held an earlier run, now in {aside}; --resume True would have gone on with it")
    (out_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    with atomic_write(out_dir / "config.json", "w") as file:
        json.dump(config_as_dict(cfg), file, indent=1)


@torch.no_grad()
def validate(
    model: Transformer,
    streams: list[TokenStream],
    tokenizer: Tokenizer,
    byte_lengths: Tensor,
    cfg: Config,
    process: Process,
) -> dict:
    """Mean loss in nats a token, and bits a byte of text, which compares across vocabularies. The bits of control
    tokens count, though they have no bytes."""
    sums = [0.0, 0.0, 0.0]  # nats, tokens, bytes
    for x, y in validation_batches(
        streams,
        seq_len=cfg.model.max_seq_len,
        batch_size=cfg.batch_size,
        max_tokens=cfg.val_tokens,
        rank=process.rank,
        world_size=process.world_size,
    ):
        x = x.to(process.device)
        positions = document_positions(x, tokenizer.bos_id) if cfg.document_mask else None
        loss = model(x, y.to(process.device), positions=positions)
        batch = (loss.item() * y.numel(), y.numel(), byte_lengths[y].sum().item())
        sums = [a + b for a, b in zip(sums, batch, strict=True)]
    nats, tokens, text_bytes = sum_over_processes(sums, process.device)
    return {"val_loss": nats / tokens, "val_bpb": nats / math.log(2) / max(1, text_bytes)}


def train(cfg: Config, process: Process) -> int:
    """The run; returns the exit status."""
    device, out_dir = process.device, Path(cfg.out_dir)
    torch.manual_seed(cfg.seed)
    in_main_process(partial(prepare_sample, cfg), process)

    # Data
    tokenizer = Tokenizer(vocab_size=cfg.model.vocab_size)
    for prompt in cfg.prompts if cfg.generate_every else ():
        if (n := len(tokenizer.encode(prompt, bos=True))) >= cfg.model.max_seq_len:
            raise ValueError(f"prompts={prompt!r}: its {n} tokens fill model.max_seq_len={cfg.model.max_seq_len}")
    train_streams, val_streams = (
        open_streams(cfg.data_root, split, vocab_size=tokenizer.vocab_size, fingerprint=tokenizer.fingerprint)
        for split in ("train", "val")
    )
    byte_lengths = torch.from_numpy(tokenizer.token_byte_lengths())
    tokens_per_micro_step = cfg.batch_size * cfg.model.max_seq_len * process.world_size
    accumulation = cfg.total_batch_size // tokens_per_micro_step
    windows = TrainWindows(
        train_streams,
        seq_len=cfg.model.max_seq_len,
        batch_size=cfg.batch_size,
        accumulation=accumulation,
        seed=cfg.seed,
        rank=process.rank,
        world_size=process.world_size,
    )
    examples = []
    if cfg.hellaswag_every:
        examples = hellaswag_utils.load_examples(cfg.hellaswag_path, tokenizer, cfg.hellaswag_limit or None)

    # Model and optimizers, new or as a checkpoint left them
    model = Transformer(cfg.model).to(device)
    optimizers = build_optimizers(
        model,
        optimizer=cfg.optimizer,
        max_lr=cfg.max_lr,
        muon_lr=cfg.muon_lr,
        weight_decay=cfg.weight_decay,
        betas=cfg.betas,
    )
    start_step, best_val_loss, run_id = 0, math.inf, uuid.uuid4().hex[:8]
    saved = checkpoints_in(out_dir / "checkpoints")[-1:] if cfg.resume else []
    if saved:
        checkpoint = load_checkpoint_to_resume(saved[0], cfg, device)
        windows.check_state(checkpoint["data"])
        model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            load_moments(optimizer, state)
        restore_random_state(checkpoint["random_state"])
        start_step, best_val_loss, run_id = (checkpoint[key] for key in ("step", "best_val_loss", "run_id"))
        del checkpoint  # its second copy of the weights
        process.print(f"resuming from {saved[0]} after step {start_step}")

    # The wrappers see the loaded weights; evaluation and saving use the bare `model`
    if cfg.compile is True or (cfg.compile == "auto" and can_compile(device)):
        model.compile_blocks()
        process.print("compiling; the first step takes up to a minute")
    ddp: torch.nn.Module = model
    if process.world_size > 1:
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, forward_sync_buffers=False)
    dtype = getattr(torch, cfg.dtype)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    # Records
    in_main_process(partial(open_run_folder, cfg), process)
    wandb_run = start_wandb(
        project=cfg.wandb_project,
        name=out_dir.name,
        run_id=run_id,
        config=config_as_dict(cfg),
        folder=out_dir,
        is_main=process.is_main,
    )
    metrics = MetricsLog(out_dir, wandb_run, process.is_main, last_step=start_step if saved else -1)
    peak = process.world_size * peak_flops(device, dtype)
    flops = flops_per_token(model)
    tokens = cfg.max_steps * cfg.total_batch_size
    epochs = [f"{tokens * s.quota / BLOCK / len(s):.2f} epochs of {len(s):,} tokens" for s in train_streams]
    process.print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters; {cfg.max_steps:,} steps, "
        f"{' + '.join(epochs)}; "
        f"a step is {cfg.total_batch_size:,} tokens = {process.world_size} x {device} x {accumulation} micro-steps x "
        f"{cfg.batch_size} x {cfg.model.max_seq_len}; peak {peak / 1e12:.2f} TFLOP/s"
    )

    def evaluate(step: int, *, val: bool, hellaswag: bool, sample: bool) -> dict:
        """Run what is asked for, print and record it; return the figures of the validation."""
        figures: dict = {}
        if not (val or hellaswag or sample):
            return figures
        with torch.compiler.set_stance("force_eager"):  # shapes of their own, not worth compiling
            if val:
                with autocast:
                    row = validate(model, val_streams, tokenizer, byte_lengths, cfg, process)
                if not math.isfinite(row["val_loss"]):
                    raise ValueError(not_finite(f"step {step}: the validation loss", out_dir))
                shares = windows.shares(step)
                mixture = {"data_shares": shares} if shares else {}
                metrics.write({"step": step, "tokens": step * cfg.total_batch_size, **row, **mixture})
                process.print(
                    f"step {step:>6}  validation {row['val_loss']:.4f} nats a token, {row['val_bpb']:.4f} bits a byte"
                    + "".join(f", {share:.1%} of {folder}" for folder, share in shares.items())
                )
                figures = row
            if hellaswag:
                with autocast:
                    counts = hellaswag_utils.count_correct(
                        model, examples, rank=process.rank, world_size=process.world_size
                    )
                row = hellaswag_utils.as_metrics(sum_over_processes(counts, device))
                metrics.write({"step": step, "tokens": step * cfg.total_batch_size, **row})
                name = hellaswag_utils.benchmark_name(cfg.hellaswag_path)
                process.print(
                    f"step {step:>6}  {name}: acc {row['hellaswag_acc']:.1%}, acc_norm "
                    f"{row['hellaswag_acc_norm']:.1%} of {row['hellaswag_examples']:,} (chance 25%)"
                )
            if sample and process.is_main:
                texts = complete(
                    model,
                    tokenizer,
                    cfg.prompts,
                    max_new_tokens=cfg.generate_tokens,
                    temperature=cfg.temperature,
                    top_p=cfg.top_p,
                    seed=cfg.seed + step,
                )
                text = "\n\n".join(texts)
                with open(out_dir / "samples.txt", "a", encoding="utf-8") as file:
                    file.write(f"===== step {step}\n{text}\n\n")
                process.print(f"----- step {step}\n{text}\n-----")
        return figures

    step = start_step
    if step == 0 and cfg.val_every:
        evaluate(0, val=True, hellaswag=False, sample=False)
    batches = windows.batches(start_step, cfg.max_steps, device)
    profiler = start_profiler(cfg.profile, out_dir / "profile", process)
    wish, stop = StopSignal(), 0  # this process's, and what all have agreed on: a signal's number
    loop_began = time.perf_counter()
    while step < cfg.max_steps and not stop:
        # ---- one update: accumulate, clip, learning rate, step
        step += 1
        began = time.perf_counter()
        mean_loss = torch.zeros((), device=device)
        weights = cast_weights(ddp, dtype)  # once for all micro-steps
        for micro_step in range(accumulation):
            x, y = (t.to(device, non_blocking=True) for t in next(batches))
            # DDP decides in the forward pass whether the backward pass will send gradients: once a step is enough.
            ddp.require_backward_grad_sync = micro_step == accumulation - 1
            positions = document_positions(x, tokenizer.bos_id) if cfg.document_mask else None
            with autocast:
                loss = functional_call(ddp, weights, (x, y), {"positions": positions}, tie_weights=False)
            (loss / accumulation).backward()
            mean_loss += loss.detach() / accumulation
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        factor = lr_factor(
            step,
            schedule=cfg.schedule,
            warmup_steps=cfg.warmup_steps,
            max_steps=cfg.max_steps,
            min_factor=cfg.min_lr_fraction,
            decay_fraction=cfg.decay_fraction,
        )
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * group["initial_lr"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        # ---- what all processes must agree on: the loss, whether it is a number, whether someone asked to stop
        losses, stop = share(mean_loss.item(), wish.number, process)
        seconds = time.perf_counter() - began
        broken = [rank for rank, value in enumerate(losses) if not math.isfinite(value)]
        if broken or not math.isfinite(grad_norm):
            what = f"loss on rank {broken[0]}" if broken else "gradient"
            raise ValueError(not_finite(f"step {step}: the {what}", out_dir))
        tokens_per_sec = cfg.total_batch_size / seconds
        row = {
            "step": step,
            "tokens": step * cfg.total_batch_size,
            "train_loss": sum(losses) / len(losses),
            "lr": factor * cfg.max_lr,
            "grad_norm": grad_norm.item(),
            "tokens_per_sec": tokens_per_sec,
            "mfu": tokens_per_sec * flops / peak,
        }
        metrics.write(row)
        profiler.step()

        # ---- along the way
        last = step == cfg.max_steps
        if step == start_step + 1:  # compilation happens in the first step and would spoil the estimate
            loop_began = time.perf_counter()
        if step % cfg.log_every == 0 or last:
            left = (time.perf_counter() - loop_began) / max(1, step - start_step - 1) * (cfg.max_steps - step)
            process.print(
                f"step {step:>6}  loss {row['train_loss']:.4f}  lr {row['lr']:.2e}  norm {row['grad_norm']:.2f}  "
                f"{tokens_per_sec:,.0f} tokens/s  mfu {row['mfu']:.0%}  {timedelta(seconds=round(left))} left"
            )
        figures = evaluate(step, val=last or is_due(cfg.val_every, step), hellaswag=False, sample=False)
        if last or stop or is_due(cfg.save_every, step):
            is_best = figures.get("val_loss", math.inf) < best_val_loss
            best_val_loss = min(best_val_loss, figures.get("val_loss", math.inf))
            checkpoint = {
                "step": step,
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "config": config_as_dict(cfg),
                "tokenizer_fingerprint": tokenizer.fingerprint,
                "data": windows.state(),
                "random_state": random_state(),
                "best_val_loss": best_val_loss,
                "run_id": run_id,
            }
            folder, keep = out_dir / "checkpoints", cfg.keep_checkpoints
            in_main_process(partial(save_checkpoint, folder, checkpoint, keep=keep, is_best=is_best), process)
            process.print(f"step {step:>6}  saved in {folder}")
        evaluate(  # what takes longer, when the step is safe: torchrun kills 30 seconds after a signal
            step,
            val=False,
            hellaswag=is_due(cfg.hellaswag_every, step) or (last and cfg.hellaswag_every > 0),
            sample=is_due(cfg.generate_every, step) or (last and cfg.generate_every > 0),
        )
    profiler.finish()
    metrics.close()
    if step < cfg.max_steps:
        process.print(f"stopped after step {step} by {signal.Signals(stop).name}; --resume True goes on there")
        return 128 + stop
    if process.is_main:
        write_report([out_dir], out_dir / "report.html")
        print(
            f"done: {out_dir / 'report.html'} has the plots; `python generate.py --checkpoint {out_dir} --prompt ...`"
        )
    return 0


def is_due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def not_finite(what: str, out_dir: Path) -> str:
    last = checkpoints_in(out_dir / "checkpoints")
    return (
        f"{what} is not finite, so the run stops; the last good checkpoint is {last[-1] if last else 'none'}; "
        "lower max_lr, or look at the data of this step"
    )


def load_checkpoint_to_resume(path: Path, cfg: Config, device: torch.device) -> dict:
    """Raises ValueError where the checkpoint is not one of a run with this model, optimizer and masking."""
    checkpoint = load_checkpoint(path, device)
    parts = {"step", "model", "optimizers", "config", "data", "random_state", "best_val_loss", "run_id"}
    if missing := parts - checkpoint.keys():
        raise ValueError(f"{path}: holds a model but no run to resume ({', '.join(sorted(missing))} missing)")
    was, now = checkpoint["config"], config_as_dict(cfg)
    was = {"document_mask": False} | was  # older runs had none
    different = [f"{k} was {was[k]}, is {now[k]}" for k in ("optimizer", "document_mask") if was[k] != now[k]]
    different += [
        f"model.{k} was {was['model'].get(k)}, is {v}" for k, v in now["model"].items() if was["model"].get(k) != v
    ]
    if different:
        raise ValueError(f"{path}: cannot go on with another run's settings: {'; '.join(different)}; restore these")
    return checkpoint


def main() -> int:
    process = None
    try:
        cfg = read_config(sys.argv[1:])
        process = start_process(pick_device(cfg.device))
        status = train(cfg, process)
    except (ValueError, OSError, MemoryError, SourceError) as error:
        if is_main_process() or process:  # all find the same wrong flags; later, one may fail alone
            print(f"train.py{f' [rank {process.rank}]' if process and process.rank else ''}: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(f"train.py: {str(error).splitlines()[0]} Halve --batch_size; the update stays the same", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if is_main_process():
            print("train.py: interrupted outside of a training step; what was saved before is whole", file=sys.stderr)
        return 130
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return status


if __name__ == "__main__":
    exit_status = main()
    if world_size() > 1:
        # DDP keeps gloo's threads alive, and one that wakes while the interpreter shuts down aborts the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_status)
    sys.exit(exit_status)
