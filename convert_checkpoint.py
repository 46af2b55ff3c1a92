"""Bring weights in from Meta's layout, and out of a checkpoint.

    python convert_checkpoint.py to-hf --checkpoint runs/mine --out published --dtype bfloat16
    python convert_checkpoint.py to-meta --checkpoint runs/mine --out meta
    python convert_checkpoint.py from-meta --meta Llama3.2-1B --rope_scale 32 --out llama-3.2-1b

A checkpoint is a model in Hugging Face's layout already. `to-hf` makes a slim copy to publish: without the state of the
run, and with a short model card. Meta's layout is `consolidated.00.pth` with `params.json`. A .pth file is a pickle.
This is the only script that reads one: `weights_only=True` refuses code, and the file is memory-mapped.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch

from checkpoints import read_state
from files import allow_any_text_in_output, atomic_folder
from layouts import meta_params
from model import ModelConfig, Transformer, model_errors
from model_folders import find_checkpoint, read_model, verify_checkpoint, write_json, write_model
from tokenizer import VOCAB_SIZES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PARAMS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps")
PARAMS += ("rope_theta",)


def load(checkpoint: str) -> tuple[Transformer, Path]:
    """The model of a checkpoint, and the folder that it was in."""
    path = find_checkpoint(checkpoint)
    verify_checkpoint(path, training_state=False)
    return read_model(path)[0], path


def to_hf(checkpoint: str, out: Path, dtype: torch.dtype) -> None:
    """Write the model of a checkpoint into `out`: weights, configuration, tokenizer, model card."""
    model, path = load(checkpoint)
    with atomic_folder(out) as folder:
        write_model(folder, dict(model.named_parameters()), model.config, dtype)
        (folder / "README.md").write_text(model_card(model, path), encoding="utf-8")


def model_card(model: Transformer, path: Path) -> str:
    """A short README for the model, with the figures of its run where it has one."""
    c, count = model.config, sum(parameter.numel() for parameter in model.parameters())
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        "",
        f"A Llama 3 of {count:,} parameters: {c.n_layers} layers of width {c.dim}, {c.n_heads} query heads and "
        f"{c.n_kv_heads} key/value heads, {c.vocab_size:,} ids of Llama 3's tokenizer, {c.max_seq_len:,} positions. It "
        "continues texts; it has not been taught to follow instructions.",
    ]
    state = read_state(path)
    if state:
        config = state["config"]
        tokens = state["step"] * config["total_batch_size"]
        lines += [
            "",
            f"Trained for {state['step']:,} steps of {config['total_batch_size']:,} tokens: {tokens:,} tokens.",
        ]
        if state["best_val_loss"] is not None:
            lines += [f"Lowest validation loss: {state['best_val_loss']:.4f} nats a token."]
        lines += ["", "Built with Meta Llama 3: the tokenizer is under the Llama 3 Community License."]
    return "\n".join(lines) + "\n"


def to_meta(checkpoint: str, out: Path) -> None:
    """Write `consolidated.00.pth` and `params.json`, in the dtype in which the weights lie on the disk."""
    model, path = load(checkpoint)
    settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    dtype = DTYPES[settings.get("dtype") or settings.get("torch_dtype") or "float32"]
    weights = {name: weight.to(dtype) for name, weight in model.state_dict().items()}
    with atomic_folder(out) as folder:
        torch.save(weights, folder / "consolidated.00.pth")
        write_json(folder / "params.json", meta_params(model.config))


def from_meta(meta: Path, out: Path, rope_scale: float | None, max_seq_len: int) -> None:
    """Write the model of `consolidated.00.pth` and `params.json` into `out`, in the dtype in which it lies there.

    Raises:
        ValueError: the files do not make a Llama 3, or there are several of them.
    """
    files = sorted(meta.glob("consolidated.*.pth"))
    if [file.name for file in files] != ["consolidated.00.pth"]:
        found = f"{len(files)} files consolidated.*.pth" if files else "no consolidated.00.pth"
        raise ValueError(f"{meta}: {found}; a model that Meta has divided among several GPUs cannot be read")
    config = read_params(meta / "params.json", rope_scale, max_seq_len)
    try:
        weights = torch.load(files[0], map_location="cpu", weights_only=True, mmap=True)
        weights = {name: weight for name, weight in weights.items() if name != "rope.freqs"}
    except Exception as error:  # the errors of zip, pickle and torch all mean the same to the user
        raise ValueError(f"{files[0]}: not weights of Meta ({str(error).splitlines()[0][:120]})") from error
    if "output.weight" not in weights or torch.equal(weights["output.weight"], weights["tok_embeddings.weight"]):
        config = ModelConfig(**{**vars(config), "tie_embeddings": True})
    with torch.device("meta"):  # the shapes alone
        expected = {name: tuple(weight.shape) for name, weight in Transformer(config).named_parameters()}
    found = {
        name: tuple(weight.shape) for name, weight in weights.items() if name in expected or name != "output.weight"
    }
    if wrong := sorted(set(expected.items()) ^ set(found.items())):
        raise ValueError(
            f"{files[0]}: does not fit params.json: {wrong[0][0]} has another shape, is missing or unknown"
        )
    with atomic_folder(out) as folder:
        write_model(folder, weights, config, next(iter(weights.values())).dtype)


def read_params(path: Path, rope_scale: float | None, max_seq_len: int) -> ModelConfig:
    """The model that a `params.json` describes.

    Raises:
        ValueError: it cannot be honoured; or it says that the positions are scaled, and `rope_scale` is not given.
    """
    try:
        params = {**json.loads(path.read_text(encoding="utf-8"))}
        fields = {name: params[name] for name in PARAMS if name in params}
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    if params.get("use_scaled_rope") and rope_scale is None:
        raise ValueError(f"{path}: scales its positions; pass --rope_scale 8 for Llama 3.1, or 32 for Llama 3.2")
    fields.setdefault("n_kv_heads", fields.get("n_heads"))
    try:
        config = ModelConfig(**fields, rope_scale=rope_scale or 1.0, max_seq_len=max_seq_len)
        errors = model_errors(config)
    except TypeError as error:
        raise ValueError(f"{path}: not the parameters of a Llama 3 ({error})") from error
    if config.vocab_size not in VOCAB_SIZES:
        errors.append(f"vocab_size={config.vocab_size}: must be {VOCAB_SIZES[0]} to {VOCAB_SIZES[-1]}")
    if errors:
        raise ValueError(f"{path}: {'; '.join(errors)}")
    return config


def main() -> int:
    allow_any_text_in_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, what in (
        ("to-hf", "a slim copy to publish"),
        ("to-meta", "Meta's layout"),
        ("from-meta", "out of it"),
    ):
        one = commands.add_parser(command, help=what)
        if command == "from-meta":
            one.add_argument("--meta", required=True, type=Path, help="folder with consolidated.00.pth and params.json")
            one.add_argument(
                "--rope_scale", type=float, help="8 for Llama 3.1, 32 for 3.2; params.json does not say it"
            )
            one.add_argument("--max_seq_len", type=int, default=8192, help="positions of the model (default: 8192)")
        else:
            words = "a checkpoint, a run directory, or a Llama 3 in Hugging Face's layout"
            one.add_argument("--checkpoint", required=True, help=words)
        if command == "to-hf":
            one.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (default: bfloat16)")
        one.add_argument("--out", required=True, type=Path, help="folder to write; it must not exist")
    args = parser.parse_args()
    try:
        if args.out.exists():
            raise ValueError(f"--out {args.out}: exists already; choose another")
        if args.command == "to-hf":
            to_hf(args.checkpoint, args.out, DTYPES[args.dtype])
        elif args.command == "to-meta":
            to_meta(args.checkpoint, args.out)
        else:
            if args.rope_scale is not None and not 1 <= args.rope_scale < math.inf:
                raise ValueError(f"--rope_scale {args.rope_scale}: must be 1 (off) or more")
            from_meta(args.meta, args.out, args.rope_scale, args.max_seq_len)
    except (ValueError, OSError, MemoryError) as error:
        print(f"convert_checkpoint.py: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
