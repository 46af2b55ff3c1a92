"""What the tests read from and write into checkpoint folders, without the code that they test."""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

META_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.layers": "layers",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.norm": "norm",
    "lm_head": "output",
}


def read_checkpoint(path: Path) -> dict:
    """The state of the run, "model" (weights by Meta's names and in Meta's order), and "moments"."""
    state = json.loads((path / "training_state/state.json").read_text())
    head_dim, weights = json.loads((path / "config.json").read_text())["head_dim"], {}
    for name, weight in load_file(path / "model.safetensors").items():
        if "q_proj" in name or "k_proj" in name:
            halves = weight.view(-1, 2, head_dim // 2, weight.shape[1])
            weight = torch.stack((halves[:, 0], halves[:, 1]), dim=2).reshape(weight.shape)
        for theirs, metas in META_NAMES.items():
            name = name.replace(theirs, metas)
        weights[name] = weight
    return {**state, "model": weights, "moments": load_file(path / "training_state/optimizer.safetensors")}


def rewrite_state(path: Path, **changes) -> None:
    """Change the state of the run in a checkpoint, and the mark that describes its files."""
    file = path / "training_state/state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    rewrite_digests(path)


def rewrite_digests(path: Path) -> None:
    """Let the mark of a checkpoint describe its files as they are now."""
    mark = path / "checkpoint.json"
    content = json.loads(mark.read_text())
    for name in content["files"]:
        file = path / name
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        content["files"][name] = {"size": file.stat().st_size, "sha256": digest}
    mark.write_text(json.dumps(content))


def copy_checkpoint(source: Path, step: int, out_dir: Path) -> Path:
    """Make a run directory that holds only the checkpoint of one step."""
    name = f"checkpoints/step_{step:08d}"
    shutil.copytree(source / name, out_dir / name)
    return out_dir


def size_of(path: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
