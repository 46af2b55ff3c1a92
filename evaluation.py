"""How good the model of a run is: validation, HellaSwag and samples. Each function returns a row for the records.

Every rank evaluates its share. The counts of all ranks are summed, then divided.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

import hellaswag_utils
from config import Config
from dataloaders import BatchLayout, validation_batches
from generate import complete
from model import Transformer, document_positions
from model_utils import Process, autocast, sum_over_processes
from shards import TokenStream
from tokenizer import Tokenizer


@contextmanager
def eager_mode(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Matrix products in `dtype`, without gradients, and without torch.compile: each evaluation has shapes of its own,
    and compiling for them would take longer than it saves."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), autocast(device, dtype):
        yield


def validate(
    model: Transformer, streams: Sequence[TokenStream], tokenizer: Tokenizer, cfg: Config, process: Process
) -> dict[str, float]:
    """`val_loss`, the mean loss in nats a token; and `val_bpb`, the same in bits a byte of text.

    Bits a byte compare across vocabularies. A control token has no bytes, but its bits count.
    """
    byte_lengths = torch.from_numpy(tokenizer.token_byte_lengths())  # (V,)
    layout = BatchLayout(cfg.model.max_seq_len, cfg.batch_size, rank=process.rank, world_size=process.world_size)
    sums = [0.0, 0.0, 0.0]  # nats, tokens, bytes
    with eager_mode(process.device, getattr(torch, cfg.dtype)):
        for x, y in validation_batches(streams, layout, max_tokens=cfg.val_tokens):
            x = x.to(process.device)
            positions = document_positions(x, tokenizer.bos_id) if cfg.document_mask else None
            loss = model(x, y.to(process.device), positions=positions)
            batch = (loss.item() * y.numel(), y.numel(), byte_lengths[y].sum().item())
            sums = [a + b for a, b in zip(sums, batch, strict=True)]
    nats, tokens, text_bytes = sum_over_processes(sums, process.device)
    return {"val_loss": nats / tokens, "val_bpb": nats / math.log(2) / max(1, text_bytes)}


def score_hellaswag(
    model: Transformer, examples: Sequence[hellaswag_utils.Example], cfg: Config, process: Process
) -> dict[str, float]:
    """`hellaswag_acc` and `hellaswag_acc_norm`, shares of right answers, and `hellaswag_examples`, their number."""
    with eager_mode(process.device, getattr(torch, cfg.dtype)):
        counts = hellaswag_utils.count_correct(model, examples, rank=process.rank, world_size=process.world_size)
    return hellaswag_utils.as_metrics(sum_over_processes(counts, process.device))


def draw_samples(
    model: Transformer, tokenizer: Tokenizer, cfg: Config, process: Process, step: int
) -> dict[str, list[str]]:
    """`samples`: each prompt with its continuation. Rank zero alone draws them; the row of the others is empty."""
    if not process.is_main:
        return {}
    with eager_mode(process.device, torch.float32):
        texts = complete(
            model,
            tokenizer,
            cfg.prompts,
            max_new_tokens=cfg.generate_tokens,
            temperature=cfg.temperature,
            top_p=cfg.top_p,
            seed=cfg.seed + step,
        )
    return {"samples": texts}


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one. Run train.py.")
