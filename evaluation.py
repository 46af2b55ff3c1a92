"""How good the model of a run is: validation, HellaSwag and samples, when they are due, and a row of each.

Every rank evaluates its share. The counts of all ranks are summed, then divided. A stop signal ends an evaluation at
once: then its row is empty, and the signal that all ranks have agreed on comes with it. A resumed run makes it up.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

import hellaswag_utils
from config import Config
from dataloaders import BatchLayout, validation_batches
from generate import complete
from model import Transformer, document_positions
from model_utils import autocast
from processes import Process, agree_on_stop, run_on_rank_zero, sum_over_processes
from shards import TokenStream
from tokenizer import Tokenizer


def is_due(every: int, step: int) -> bool:
    """Whether an activity with the interval `every` (0: never) is due at `step`."""
    return every > 0 and step % every == 0


def due_at(step: int, cfg: Config) -> set[str]:
    """The evaluations due at a step, by a field of their rows. The end of a run has all that are switched on."""
    every = {"val_loss": cfg.val_every, "hellaswag_acc": cfg.hellaswag_every, "samples_end": cfg.generate_every}
    due = {field for field, interval in every.items() if interval and (is_due(interval, step) or step == cfg.max_steps)}
    if step == 0:
        return due & {"val_loss"}
    return due | ({"val_loss"} if step == cfg.max_steps else set())


@contextmanager
def eager_mode(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Matrix products in `dtype`, without gradients, and without torch.compile: each evaluation has shapes of its own,
    and compiling for them would take longer than it saves."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), autocast(device, dtype):
        yield


def validate(
    model: Transformer, streams: Sequence[TokenStream], tokenizer: Tokenizer, cfg: Config, process: Process
) -> tuple[dict[str, float], int]:
    """`val_loss`, the mean loss in nats a token; and `val_bpb`, the same in bits a byte of text.

    Bits a byte compare across vocabularies. A control token has no bytes, but its bits count.
    """
    byte_lengths = torch.from_numpy(tokenizer.token_byte_lengths())  # (V,)
    layout = BatchLayout(cfg.model.max_seq_len, cfg.batch_size, rank=process.rank, world_size=process.world_size)
    sums = [0.0, 0.0, 0.0]  # nats, tokens, bytes
    parts = math.ceil(cfg.val_tokens / (cfg.model.max_seq_len * cfg.batch_size * process.world_size))  # or fewer
    with eager_mode(process.device, getattr(torch, cfg.dtype)):
        for part, (x, y) in enumerate(validation_batches(streams, layout, max_tokens=cfg.val_tokens)):
            if process.stop:
                break
            process.progress.doing("validation", part, max(parts, part + 1))
            x = x.to(process.device)
            positions = document_positions(x, tokenizer.bos_id) if cfg.document_mask else None
            loss = model(x, y.to(process.device), positions=positions)
            batch = (loss.item() * y.numel(), y.numel(), byte_lengths[y].sum().item())
            sums = [a + b for a, b in zip(sums, batch, strict=True)]
    nats, tokens, text_bytes = sum_over_processes(sums, process)
    if stop := agree_on_stop(process):
        return {}, stop
    return {"val_loss": nats / tokens, "val_bpb": nats / math.log(2) / max(1, text_bytes)}, 0


def score_hellaswag(
    model: Transformer, examples: Sequence[hellaswag_utils.Example], cfg: Config, process: Process
) -> tuple[dict[str, float], int]:
    """`hellaswag_acc` and `hellaswag_acc_norm`, shares of right answers, and `hellaswag_examples`, their number."""
    process.progress.doing("benchmark")
    with eager_mode(process.device, getattr(torch, cfg.dtype)):
        counts = hellaswag_utils.count_correct(
            model,
            examples,
            rank=process.rank,
            world_size=process.world_size,
            is_stopped=process.is_told_to_stop,
        )
    counts = sum_over_processes(counts, process)
    if stop := agree_on_stop(process):
        return {}, stop
    return hellaswag_utils.as_metrics(counts), 0


def draw_samples(
    model: Transformer, tokenizer: Tokenizer, cfg: Config, process: Process, step: int
) -> tuple[dict[str, list[str]], int]:
    """`samples`: each prompt with its continuation. Rank zero draws them. The others wait, and their rows are empty."""
    draw = partial(
        complete,
        model,
        tokenizer,
        cfg.prompts,
        max_new_tokens=cfg.generate_tokens,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        seed=cfg.seed + step,
        is_stopped=process.is_told_to_stop,
    )
    process.progress.doing("samples")
    with eager_mode(process.device, torch.float32):
        texts = run_on_rank_zero(draw, process)
    stop = agree_on_stop(process)
    return {} if stop or not process.is_main else {"samples": texts}, stop


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one. Run train.py.")
