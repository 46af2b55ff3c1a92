"""Bring weights in from Meta's layout, and out of a checkpoint.

    python convert_checkpoint.py to-hf --checkpoint runs/mine --out published --dtype bfloat16
    python convert_checkpoint.py to-meta --checkpoint runs/mine --out meta
    python convert_checkpoint.py from-meta --meta Llama3.2-1B --rope_scale 32 --out llama-3.2-1b

A checkpoint is a model in Hugging Face's layout already. `to-hf` makes a slim copy to publish: without the state of the
run, and with a short model card. Meta's layout is `consolidated.00.pth` with `params.json`. A .pth file is a pickle.
This is the only script that reads one: `weights_only=True` refuses code, and the file is memory-mapped.
"""

import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from checkpoints import STATE, read_state
from command_line import FlagParser, results_of
from files import allow_any_text_in_output, atomic_folder
from json_files import read_object, shown
from layouts import check_shapes, checked_config, meta_params
from model import ModelConfig, Transformer
from model_folders import find_checkpoint, read_model, verify_checkpoint, write_json, write_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PARAMS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps")
PARAMS += ("rope_theta",)


def load(checkpoint: str) -> tuple[Transformer, dict, Path]:
    """The model of a checkpoint, the `config.json` of its folder, and the folder."""
    path = find_checkpoint(checkpoint)
    verify_checkpoint(path, training_state=False)
    return *read_model(path), path


def to_hf(checkpoint: str, out: Path, dtype: torch.dtype) -> None:
    """Write the model of a checkpoint into `out`: weights, configuration, tokenizer, model card."""
    model, _, path = load(checkpoint)
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
    if state := read_state(path):
        try:
            lines += ["", *run_lines(state["step"], state["config"]["total_batch_size"], state["best_val_loss"])]
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{path / STATE}: not the state of a run; use another checkpoint") from error
        lines += ["", "Built with Meta Llama 3: the tokenizer is under the Llama 3 Community License."]
    return "\n".join(lines) + "\n"


def run_lines(step: int, batch_tokens: int, loss: float | None) -> list[str]:
    """How long a run was, and how good. Raises ValueError or TypeError if these are not numbers."""
    lines = [f"Trained for {step:,} steps of {batch_tokens:,} tokens: {step * batch_tokens:,} tokens."]
    return lines if loss is None else [*lines, f"Lowest validation loss: {loss:.4f} nats a token."]


def to_meta(checkpoint: str, out: Path) -> None:
    """Write `consolidated.00.pth` and `params.json`, in the dtype in which the weights lie on the disk."""
    model, settings, path = load(checkpoint)
    name = settings.get("dtype") or settings.get("torch_dtype") or "float32"
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"{path / 'config.json'}: dtype is {shown(name)}, not one of {', '.join(DTYPES)}")
    dtype = DTYPES[name]
    weights = {name: weight.to(dtype) for name, weight in model.state_dict().items()}
    with atomic_folder(out) as folder:
        torch.save(weights, folder / "consolidated.00.pth")
        write_json(folder / "params.json", meta_params(model.config))


def from_meta(meta: Path, out: Path, rope_scale: float | None, max_seq_len: int) -> None:
    """Write the model of `consolidated.00.pth` and `params.json` into `out`, in the dtype in which it lies there.

    Raises:
        ValueError: the files do not make a Llama 3, or there are several of them.
    """
    if not meta.is_dir():
        raise ValueError(f"{meta}: no such folder; give one with consolidated.00.pth and params.json")
    files = sorted(file for file in meta.glob("consolidated.*.pth") if file.is_file())
    if [file.name for file in files] != ["consolidated.00.pth"]:
        found = f"{len(files)} files consolidated.*.pth" if files else "no consolidated.00.pth"
        raise ValueError(f"{meta}: {found}; a model that Meta has divided among several GPUs cannot be read")
    config = read_params(meta / "params.json", rope_scale, max_seq_len)
    weights = read_meta_weights(files[0])
    output, embeddings = weights.get("output.weight"), weights.get("tok_embeddings.weight")
    if output is None or (embeddings is not None and torch.equal(output, embeddings)):
        config = replace(config, tie_embeddings=True)
        weights.pop("output.weight", None)
    try:
        check_shapes({name: tuple(weight.shape) for name, weight in weights.items()}, config)
    except ValueError as error:
        raise ValueError(f"{files[0]}: does not fit params.json: {error}") from error
    with atomic_folder(out) as folder:
        write_model(folder, weights, config, next(iter(weights.values())).dtype)


def read_meta_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights in a `consolidated.00.pth`, by name, memory-mapped. No code in the file is run.

    Raises:
        ValueError: it does not hold such weights, or they have several types.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        weights = {name: weight for name, weight in weights.items() if name != "rope.freqs"}
    except Exception as error:  # the errors of zip, pickle and torch all mean the same to the user
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path}: not weights of Meta ({type(error).__name__}: {reason})") from error
    for name, weight in weights.items():
        if not isinstance(name, str) or not isinstance(weight, torch.Tensor):
            raise ValueError(f"{path}: not weights of Meta ({shown(name)} is no weight)")
        # A view repeats numbers, so it may be far larger than the file.
        plain = weight.layout is torch.strided and weight.device.type == "cpu" and weight.is_contiguous()
        if weight.dtype not in DTYPES.values() or not plain:
            raise ValueError(f"{path}: {shown(name)} is no plain matrix of {', '.join(DTYPES)}")
    if len({weight.dtype for weight in weights.values()}) > 1:
        raise ValueError(f"{path}: its weights have several types; give a file with one")
    return weights


def read_params(path: Path, rope_scale: float | None, max_seq_len: int) -> ModelConfig:
    """The model that a `params.json` describes.

    Raises:
        ValueError: it cannot be honoured; or it says that the positions are scaled, and `rope_scale` is not given.
    """
    try:
        params = read_object(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    fields = {name: params[name] for name in PARAMS if name in params}
    if params.get("use_scaled_rope") and rope_scale is None:
        raise ValueError(f"{path}: scales its positions; pass --rope_scale 8 for Llama 3.1, or 32 for Llama 3.2")
    fields.setdefault("n_kv_heads", fields.get("n_heads"))
    try:
        return checked_config(fields | {"rope_scale": rope_scale or 1.0, "max_seq_len": max_seq_len})
    except ValueError as error:
        raise ValueError(f"{path}: not the parameters of a Llama 3 ({error})") from error


def check_out(out: Path) -> None:
    """Raises ValueError if there is something at `out`."""
    if out.exists():
        raise ValueError(f"--out {out}: exists already; choose another")


def command_line() -> FlagParser:
    parser = FlagParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="to-hf|to-meta|from-meta")
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
    return parser


def main() -> int:
    allow_any_text_in_output()
    args = command_line().parse_args()
    try:
        reads_meta = args.command == "from-meta"
        results_of(partial(check_out, args.out), *([] if reads_meta else [partial(find_checkpoint, args.checkpoint)]))
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
