"""Folders that hold a model in Hugging Face's layout: written, found, verified, read. A checkpoint is such a folder.

No file is a pickle, so no code in a file is run. Links in the folder are followed: the cache of the Hugging Face hub
consists of them. But a name that stands in a file means a file of the folder, so paths that lead out are refused.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from files import sha256_of
from json_files import is_plain_name, read_object, shown
from layouts import check_shapes, check_tokenizer, from_hf, hf_config, hf_name, model_config, to_hf, tokenizer_files
from model import ModelConfig, Transformer, rope_tables

CHECKPOINT_FORMAT_VERSION = 2  # version 1 was a .pt file
MARK, BEST = "checkpoint.json", "best"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_FILE_BYTES = 5 * 10**9  # of weights in one file, as on the hub
DTYPES = ("F32", "BF16", "F16")  # of weights, by safetensors' names; others are integers, or need scales


# ---------------------------------------------------------------- found and verified


def checkpoints_in(folder: str | Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(path for path in Path(folder).glob("step_*") if (path / MARK).is_file())


def best_in(folder: str | Path) -> Path | None:
    """The checkpoint that the file `best` names. None if there is no such file.

    Raises:
        ValueError: it does not name a checkpoint beside it.
    """
    path = Path(folder) / BEST
    if not path.is_file():
        return None
    name = path.read_bytes()[:1000].decode(errors="replace").strip()
    if not (name.startswith("step_") and is_plain_name(name)):
        raise ValueError(f"{path}: does not name a checkpoint beside it; delete this file")
    return Path(folder) / name


def verify_checkpoint(path: Path, *, training_state: bool) -> None:
    """Compare the files of a checkpoint with checkpoint.json. Another program's folder has none.

    Raises:
        ValueError: a file is missing or has changed; the format is another; or a name leads out of the folder.
    """
    if not (path / MARK).is_file():
        return
    try:
        mark = read_object(path / MARK)
        version = mark["format_version"]
        files = described_files(mark["files"]) if version == CHECKPOINT_FORMAT_VERSION else {}
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path / MARK}: damaged ({error}); delete {path} and use an older checkpoint") from error
    if version != CHECKPOINT_FORMAT_VERSION:
        raise ValueError(
            f"{path}: of format {shown(version)}, this code reads {CHECKPOINT_FORMAT_VERSION}; "
            "take the code that wrote it"
        )
    for name, (size, digest) in files.items():
        if name.startswith("training_state/") and not training_state:
            continue
        file = path / name
        if not file.is_file() or file.stat().st_size != size or sha256_of(file) != digest:
            raise ValueError(f"{file}: missing or changed; delete {path} and use an older checkpoint")


def described_files(files: Any) -> dict[str, tuple[Any, Any]]:
    """Size and sha256 of each file, as checkpoint.json describes them.

    Raises:
        ValueError: they are no such descriptions, a name leads out of the folder, or the model is not among them.
    """
    if not isinstance(files, dict) or not all(isinstance(about, dict) for about in files.values()):
        raise ValueError("it does not describe files")
    for name in files:
        if not all(map(is_plain_name, name.split("/"))):
            raise ValueError(f"the name {shown(name)} may lead out of the folder")
    if "config.json" not in files or not {WEIGHTS, INDEX} & files.keys():
        raise ValueError("it does not describe the model")
    return {name: (about.get("size"), about.get("sha256")) for name, about in files.items()}


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, that which a file `best` names, or the newest of a run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file `best` does not name one.
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
        ValueError, OSError: it cannot be read, is not a Llama 3, or the folder has another tokenizer or other weights.
    """
    file = path / "config.json"
    try:
        settings = read_object(file)
        config = model_config(settings)
        if not (path / MARK).is_file() and (path / "tokenizer.json").is_file():
            check_tokenizer((path / "tokenizer.json").read_bytes(), config.vocab_size)
    except ValueError as error:
        raise ValueError(f"{file}: {error}; give a Llama 3 in Hugging Face's layout") from error
    weight_places(path, config)  # before anyone builds a model of this size
    return config, settings


def read_model(path: Path) -> tuple[Transformer, dict]:
    """The model in a folder, on the CPU; and the folder's `config.json`.

    Raises:
        ValueError, OSError: what the functions around this one raise.
        MemoryError: the model does not fit into memory.
    """
    config, settings = read_model_config(path)
    with torch.device("meta"):  # drawing weights only to overwrite them would take a minute for 8B
        model = Transformer(config)
    try:
        model.to_empty(device="cpu")
        if config.tie_embeddings:
            model.output.weight = model.tok_embeddings.weight
        model.rope_cos, model.rope_sin = rope_tables(config)
    except RuntimeError as error:  # torch has no error of its own for the memory of a CPU
        raise MemoryError(f"{path}: the model does not fit into memory; take a larger machine") from error
    load_weights(path, model)
    return model, settings


def load_weights(path: Path, model: Transformer) -> None:
    """Copy the weights in a folder of Hugging Face's layout into `model`, one at a time.

    Raises:
        ValueError, OSError: what `weight_places` raises.
    """
    places = weight_places(path, model.config)
    parameters = {hf_name(name): (name, parameter) for name, parameter in model.named_parameters()}
    for file_name in sorted(set(places.values())):
        with opened(path / file_name) as file, torch.no_grad():
            for hf, (name, parameter) in parameters.items():
                if places[hf] == file_name:
                    parameter.copy_(from_hf(name, file.get_tensor(hf), model.config.head_dim))


def weight_places(path: Path, config: ModelConfig) -> dict[str, str]:
    """The file of each weight in a folder of Hugging Face's layout, by Hugging Face's names. Reads no weight.

    Raises:
        OSError: a file is missing.
        ValueError: a file is damaged, the index names a path that may lead out of the folder, or a weight is missing,
            unknown, of another shape, or of a type that is not a floating-point number.
    """
    if (path / INDEX).is_file():
        places = read_index(path / INDEX)
    else:
        with opened(path / WEIGHTS) as file:
            places = dict.fromkeys(file.keys(), WEIGHTS)
    places = {name: file for name, file in places.items() if "rotary_emb" not in name}
    if config.tie_embeddings:
        places.pop("lm_head.weight", None)
    shapes = {}
    for file_name in sorted(set(places.values())):
        with opened(path / file_name) as file:
            for name in (name for name in places if places[name] == file_name):
                weight = file.get_slice(name)
                if (dtype := weight.get_dtype()) not in DTYPES:
                    raise ValueError(f"{path / file_name}: {shown(name)} is {dtype}, not {', '.join(DTYPES)}")
                shapes[name] = tuple(weight.get_shape())
    try:
        check_shapes(shapes, config, hf_name)
    except ValueError as error:
        raise ValueError(f"{path}: its weights do not fit its configuration: {error}") from error
    return places


def read_index(path: Path) -> dict[str, str]:
    """The file of each weight, as an index says. Raises ValueError if it says anything else."""
    try:
        places = read_object(path)["weight_map"]
        if not isinstance(places, dict):
            raise TypeError("weight_map is not an object")
        if wrong := [name for name in places.values() if not is_plain_name(name)]:
            raise ValueError(f"{shown(wrong[0])} is not the name of a file in this folder")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not an index of weights ({error}); use another checkpoint") from error
    return places


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, memory-mapped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
    if not path.is_file():  # or it is a folder, or a pipe that would keep us waiting
        raise FileNotFoundError(f"{path}: no such file; use another checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error}); use another checkpoint") from error


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite. The extremes take a tenth of the time of `isfinite().all()`, and keep NaN."""
    return all(math.isfinite(extreme) for extreme in torch.aminmax(tensor)) if tensor.numel() else True


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one; there is nothing to run here.")
