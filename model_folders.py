"""Folders that hold a model in Hugging Face's layout: written, found, verified, read. A checkpoint is such a folder.

No file is a pickle, so no code in a file is run.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from files import sha256_of
from layouts import check_tokenizer, from_hf, hf_config, hf_name, model_config, to_hf, tokenizer_files
from model import ModelConfig, Transformer, rope_tables

CHECKPOINT_FORMAT_VERSION = 2  # version 1 was a .pt file
MARK, BEST = "checkpoint.json", "best"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_FILE_BYTES = 5 * 10**9  # of weights in one file, as on the hub


# ---------------------------------------------------------------- found and verified


def checkpoints_in(folder: str | Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(path for path in Path(folder).glob("step_*") if (path / MARK).is_file())


def best_in(folder: str | Path) -> Path | None:
    """The checkpoint that the file `best` names."""
    path = Path(folder) / BEST
    return Path(folder) / path.read_text(encoding="utf-8").strip() if path.is_file() else None


def verify_checkpoint(path: Path, *, training_state: bool) -> None:
    """Compare the files of a checkpoint with checkpoint.json. Another program's folder has none.

    Raises:
        ValueError: a file is missing or has changed; or the format is another.
    """
    if not (path / MARK).is_file():
        return
    try:
        mark = json.loads((path / MARK).read_text(encoding="utf-8"))
        version, files = mark["format_version"], dict(mark["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / MARK}: damaged ({error}); delete {path} and use an older checkpoint") from error
    if version != CHECKPOINT_FORMAT_VERSION:
        raise ValueError(
            f"{path}: of format {version}, this code reads {CHECKPOINT_FORMAT_VERSION}; take the code that wrote it"
        )
    for name, expected in files.items():
        if name.startswith("training_state/") and not training_state:
            continue
        file = path / name
        if not file.is_file() or file.stat().st_size != expected["size"] or sha256_of(file) != expected["sha256"]:
            raise ValueError(f"{file}: missing or changed; delete {path} and use an older checkpoint")


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, that which a file `best` names, or the newest of a run.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    if path.name == BEST and path.is_file():
        return best_in(path.parent)
    if (path / MARK).is_file() or (path / WEIGHTS).is_file() or (path / INDEX).is_file():
        return path
    found = checkpoints_in(path / "checkpoints") or checkpoints_in(path)
    if not found:
        raise FileNotFoundError(
            f"{path}: no checkpoint there; give a run directory, one of its checkpoints, or a model in Hugging Face's "
            "layout"
        )
    return found[-1]


# ---------------------------------------------------------------- written


def write_model(
    folder: Path, weights: dict[str, Tensor], config: ModelConfig, dtype: torch.dtype | None = None
) -> None:
    """Write weights, configuration and tokenizer into a folder, as Hugging Face's programs read them.

    Args:
        weights: by our names; with tied embeddings the output layer may be missing.
        dtype: of the weights on the disk. None keeps that of the tensors.
    """
    if config.tie_embeddings:
        weights = {name: weight for name, weight in weights.items() if name != "output.weight"}
    files: list[dict[str, Tensor]] = [{}]
    for name, weight in weights.items():
        weight = to_hf(name, weight.detach(), config.head_dim).to("cpu", dtype or weight.dtype).contiguous()
        if sum(other.nbytes for other in files[-1].values()) + weight.nbytes > MAX_FILE_BYTES:
            files.append({})
        files[-1][hf_name(name)] = weight
    names = [WEIGHTS]
    if len(files) > 1:
        names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
        total = sum(weight.nbytes for tensors in files for weight in tensors.values())
        places = {name: file for file, tensors in zip(names, files, strict=True) for name in tensors}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    for name, tensors in zip(names, files, strict=True):
        save_file(tensors, folder / name, metadata={"format": "pt"})
    settings = hf_config(config)
    settings["torch_dtype"] = str(dtype or torch.float32).removeprefix("torch.")
    write_json(folder / "config.json", settings)
    ids = {key: settings[key] for key in ("bos_token_id", "eos_token_id")}
    write_json(folder / "generation_config.json", ids)
    for name, content in tokenizer_files(config.vocab_size, config.max_seq_len).items():
        (folder / name).write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


# ---------------------------------------------------------------- read


def read_model_config(path: Path) -> tuple[ModelConfig, dict]:
    """The model that the `config.json` of a folder describes; and that file.

    Raises:
        ValueError, OSError: it cannot be read, is not a Llama 3, or the folder has another tokenizer.
    """
    file = path / "config.json"
    try:
        settings = {**json.loads(file.read_text(encoding="utf-8"))}
        config = model_config(settings)
        if not (path / MARK).is_file() and (path / "tokenizer.json").is_file():
            check_tokenizer((path / "tokenizer.json").read_bytes(), config.vocab_size)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}; give a Llama 3 in Hugging Face's layout") from error
    return config, settings


def read_model(path: Path) -> tuple[Transformer, dict]:
    """The model in a folder, on the CPU; and the folder's `config.json`. Raises what the functions around it raise."""
    config, settings = read_model_config(path)
    with torch.device("meta"):  # drawing weights only to overwrite them would take a minute for 8B
        model = Transformer(config)
    model.to_empty(device="cpu")
    if config.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    model.rope_cos, model.rope_sin = rope_tables(config)
    load_weights(path, model)
    return model, settings


def load_weights(path: Path, model: Transformer) -> None:
    """Copy the weights in a folder of Hugging Face's layout into `model`, one at a time.

    Raises:
        ValueError: a weight is missing, unknown, or has another shape; or a file is damaged.
    """
    if (path / INDEX).is_file():
        places = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
    else:
        with opened(path / WEIGHTS) as file:
            places = dict.fromkeys(file.keys(), WEIGHTS)
    parameters = {hf_name(name): (name, parameter) for name, parameter in model.named_parameters()}
    needless = {"lm_head.weight"} if model.config.tie_embeddings else set()
    unknown = {name for name in places if name not in parameters | dict.fromkeys(needless) and "rotary_emb" not in name}
    if wrong := sorted(unknown | (parameters.keys() - places.keys())):
        raise ValueError(f"{path}: its weights do not fit its configuration: {wrong[0]} is missing or unknown")
    for file_name in sorted(set(places.values())):
        with opened(path / file_name) as file, torch.no_grad():
            for hf, (name, parameter) in parameters.items():
                if places[hf] != file_name:
                    continue
                weight = from_hf(name, file.get_tensor(hf), model.config.head_dim)
                if weight.shape != parameter.shape:
                    raise ValueError(
                        f"{path / file_name}: {hf} has the shape {tuple(weight.shape)}, not {tuple(parameter.shape)}"
                    )
                parameter.copy_(weight)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, memory-mapped. Raises ValueError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error}); use another checkpoint") from error


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one; there is nothing to run here.")
