"""memory.py: what fits, which batch size is found, and that the search leaves no trace. A GPU is simulated."""

import gc
import json
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from tiny_run import tiny_corpus, tiny_flags

import memory
import train
from config import config_as_dict, config_errors
from model import Transformer
from processes import Process
from run_config import read_config

ALONE = Process(0, 1, torch.device("cpu"))
TINY = ["--config", "sample", "--device", "cpu", "--dtype", "float32", "--compile", "False", "--model.dim", "48"]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """One process, whatever the shell of the developer has set."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def tiny_config(**changes) -> train.Config:
    return replace(read_config(TINY, train.CONFIGS, say=lambda line: None), **changes)


def pretend_gpu(monkeypatch):
    """A device that says it is CUDA, where torch has none."""

    class Gpu:
        type = "cuda"

    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    return Gpu()


# ---------------------------------------------------------------- one size, tried


def test_the_activations_are_those_that_autograd_keeps():
    """A model of one product: its backward pass needs the input alone, of B x T x D numbers, and the weight."""
    layer, x = torch.nn.Linear(8, 8, bias=False), torch.zeros(2, 16, 8)
    saved = memory.SavedTensors(layer)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        layer(x.requires_grad_())
    assert sum(saved.sizes.values()) == 2 * 16 * 8 * 4


def test_only_the_first_update_is_said_to_compile():
    process = Process(0, 1, torch.device("cpu"))
    process.progress.compiles = True
    memory.measured(lambda process: None, process=process)
    assert not process.progress.compiles


def test_a_batch_that_leaves_no_margin_does_not_fit(monkeypatch):
    """A GPU's peak is simulated: 100 bytes for each sequence, of 850."""
    peak = [0]

    def step(model, *, batches, cfg, accumulation, process):
        peak[0] = 100 * len(next(batches)[0])

    monkeypatch.setattr(memory, "memory_peak", lambda device: peak[0])
    process, model = Process(0, 1, pretend_gpu(monkeypatch)), torch.nn.Linear(1, 1)
    cfg = tiny_config(batch_size=8)
    assert memory.try_update(step, model, cfg, process, free=840) is None
    assert memory.try_update(step, model, cfg, process, free=850) is not None
    assert memory.try_update(step, model, replace(cfg, batch_size=4), process, free=840) is not None


# ---------------------------------------------------------------- the largest size


class SimulatedGpu:
    """Updates of n sequences take 1,000 bytes, of which autograd keeps 200, and 100 to 120 for each sequence, of which
    autograd keeps 100. It raises where that is more than `total`."""

    def __init__(self, monkeypatch, total: int):
        self.total, self.peak, self.tried = total, 0, []
        device = pretend_gpu(monkeypatch)
        self.process = Process(0, 1, device)
        monkeypatch.setattr(memory, "memory_taken", lambda device: 0)
        monkeypatch.setattr(memory, "memory_free", lambda device: total)
        monkeypatch.setattr(memory, "memory_peak", lambda device: self.peak)
        monkeypatch.setattr(memory, "build_trial", lambda *_: (None, [], torch.nn.Linear(1, 1), self.update))

    def update(self, model, *, batches, cfg, accumulation, process):
        self.tried.append(cfg.batch_size)
        self.peak = 1000 + 120 * cfg.batch_size
        if self.peak > self.total:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        kept = (torch.ones(count // 4, requires_grad=True) for count in (200, 100 * cfg.batch_size))
        for tensor in kept:
            tensor.exp()  # keeps its result


@pytest.mark.parametrize(
    ("total", "found"),
    [
        (1000 + 120, None),  # without the margin
        (1200, 1),
        (1400, 2),
        ((1000 + 120 * 16) / memory.MARGIN + 1, 16),
        ((1000 + 120 * 16) / memory.MARGIN - 10, 8),
        (1000 + 120 * 16 - 10, 8),
        (10**6, 64),  # no more than the update has: 64 x 3 sequences of 128
    ],
)
def test_the_largest_power_of_two_that_fits_a_gpu_is_found(total, found, monkeypatch):
    gpu, cfg = SimulatedGpu(monkeypatch, total), tiny_config(batch_size="auto", total_batch_size=64 * 3 * 128)
    if found is None:
        with pytest.raises(ValueError, match=r"batch_size=auto: not even 1 .* pass --activation_checkpointing all"):
            memory.find_batch_size(cfg, gpu.process, None)
        return
    assert memory.find_batch_size(cfg, gpu.process, None) == found
    assert len(set(gpu.tried)) <= 4  # each size is compiled


def test_a_batch_divides_the_update_of_each_process(monkeypatch):
    gpu, cfg = SimulatedGpu(monkeypatch, 10**9), tiny_config(batch_size="auto")
    for sequences, found in ((1, 1), (7, 1), (12, 4), (64, 64)):
        whole = replace(cfg, total_batch_size=sequences * 128)
        assert memory.find_batch_size(whole, gpu.process, None) == found


def test_ranks_agree_on_what_fits_the_smallest_of_them(monkeypatch):
    """The other rank says that only 9 sequences can fit, and fails at 8."""
    gpu, cfg = SimulatedGpu(monkeypatch, 10**9), tiny_config(batch_size="auto", total_batch_size=2 * 64 * 128)
    monkeypatch.setattr(memory, "gather", lambda value, process: [value, 9.0])
    monkeypatch.setattr(memory, "sum_over_processes", lambda values, process: [float(gpu.tried[-1] == 8)])
    monkeypatch.setattr(memory, "run_on_rank_zero", lambda work, process: work())
    monkeypatch.setattr(memory, "agree_on_stop", lambda process: 0)
    monkeypatch.setattr(memory, "build_trial", lambda *_: (None, [], torch.nn.Sequential(), gpu.update))
    monkeypatch.setattr(torch.nn.Sequential, "module", torch.nn.Linear(1, 1), raising=False)
    assert memory.find_batch_size(cfg, replace(gpu.process, world_size=2), None) == 4
    assert gpu.tried == [1] * 3 + [2] * 3 + [8] * 3 + [4] * 3


@pytest.mark.parametrize(("free", "found"), [(2**40, 16), (20_500_000, None)])
def test_a_cpu_takes_what_is_sure_to_fit_and_tries_one_sequence(free, found, monkeypatch):
    sizes = []

    def update(model, optimizers, batches, step, cfg, **kwargs):
        sizes.append(cfg.batch_size)
        return train.update(model, optimizers, batches, step, cfg, **kwargs)

    monkeypatch.setattr(memory, "memory_free", lambda device: free)
    monkeypatch.setattr(memory, "memory_taken", lambda device: 0)
    monkeypatch.setattr(memory, "memory_peak", lambda device: 20_000_000)
    cfg = tiny_config(batch_size="auto")
    if found:
        assert memory.find_batch_size(cfg, ALONE, update) == found
    else:
        with pytest.raises(ValueError, match="give a number"):
            memory.find_batch_size(cfg, ALONE, update)
    assert set(sizes) == {1}


def test_what_a_cpu_takes_leaves_room_for_a_checkpoint(monkeypatch):
    """The weights, gradients and moments are 4 parts, a sequence is 10 MB, and a checkpoint copies 3 of the parts."""
    cfg = tiny_config(batch_size="auto", optimizer="adamw", max_lr=0.001, total_batch_size=128 * 64)
    part = sum(p.nbytes for p in Transformer(cfg.model).parameters())
    monkeypatch.setattr(memory, "memory_taken", lambda device: 0)
    monkeypatch.setattr(memory, "memory_peak", lambda device: 4 * part + 10_000_000)
    for free, found in ((7 * part + 80_000_001, 8), (7 * part + 79_000_000, 4), (7 * part + 9e6, None)):
        monkeypatch.setattr(memory, "memory_free", lambda device, free=free: free / memory.MARGIN)
        if found:
            assert memory.find_batch_size(cfg, ALONE, train.update) == found
        else:
            with pytest.raises(ValueError, match="batch_size=auto"):
                memory.find_batch_size(cfg, ALONE, train.update)


def test_processes_of_a_machine_share_its_free_memory(monkeypatch):
    monkeypatch.setattr(memory, "proc_bytes", lambda *_: 1200)
    assert memory.memory_free(torch.device("cpu")) == 1200
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert memory.memory_free(torch.device("cpu")) == 400


def test_the_limit_of_a_container_counts(monkeypatch, tmp_path):
    """Its cached files can be given up. Without a limit the file says "max"."""
    monkeypatch.setattr(memory, "proc_bytes", lambda *_: 10**12)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.memory_free(torch.device("cpu")) == 10**12
    for name, text in (("max", "1000\n"), ("current", "700\n"), ("stat", "anon 500\ninactive_file 200\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory.memory_free(torch.device("cpu")) == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.memory_free(torch.device("cpu")) == 10**12


def test_a_run_that_goes_on_keeps_its_size(monkeypatch, tmp_path):
    """Another size would round otherwise. A size that does not divide the update over the processes is no use."""
    monkeypatch.setattr(memory, "largest_batch_size", lambda *_: 16)
    cfg = tiny_config(batch_size="auto", resume=True, out_dir=str(tmp_path))
    assert memory.find_batch_size(cfg, ALONE, train.update) == 16
    for recorded, found in (("4", 4), ("3", 16), ('"auto"', 16), ("true", 16), ("}", 16)):
        (tmp_path / "config.json").write_text(f'{{"batch_size": {recorded}}}')
        assert memory.find_batch_size(cfg, ALONE, train.update) == found
    (tmp_path / "config.json").write_text('{"batch_size": 4}')
    assert memory.find_batch_size(replace(cfg, resume=False), ALONE, train.update) == 16


def test_where_nothing_tells_the_memory_a_number_is_asked_for(monkeypatch):
    monkeypatch.setattr(memory, "proc_bytes", lambda *_: None)
    with pytest.raises(ValueError, match=r"batch_size=auto: nothing says .* give a number"):
        memory.find_batch_size(tiny_config(batch_size="auto"), ALONE, train.update)


# ---------------------------------------------------------------- no trace


def test_nothing_of_the_search_stays_in_memory(monkeypatch):
    models, build = [], memory.Transformer
    monkeypatch.setattr(memory, "Transformer", lambda config: models.append(weakref.ref(m := build(config))) or m)
    found = memory.find_batch_size(tiny_config(batch_size="auto", activation_checkpointing="all"), ALONE, train.update)
    assert found == 16 and len(models) == 1
    assert models[0]() is None
    assert not [t for t in gc.get_objects() if type(t) is torch.nn.Parameter and t.shape == (4096, 48)]


def test_a_run_is_that_of_the_number_found_and_its_records_have_it(tmp_path, monkeypatch):
    (tmp_path / "corpus").mkdir()
    corpus, weights = tiny_corpus(tmp_path / "corpus"), {}
    for batch_size in (8, "auto"):
        out_dir = tmp_path / str(batch_size)
        flags = tiny_flags(corpus, tmp_path / "none", out_dir, batch_size=batch_size, max_steps=2, val_every=0)
        monkeypatch.setattr(sys, "argv", ["train.py", *flags])
        assert train.main() == 0
        assert json.loads((out_dir / "config.json").read_text())["batch_size"] == 8
        weights[batch_size] = (out_dir / "checkpoints" / "step_00000002" / "model.safetensors").read_bytes()
    assert weights[8] == weights["auto"]


# ---------------------------------------------------------------- memory that runs out


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"batch_size": 16}, "pass --batch_size 8 (or auto) or --activation_checkpointing blocks; the update"),
        ({"batch_size": 16, "total_batch_size": 240 * 128}, "pass --batch_size 8 (or auto)"),  # 15 divides it too
        ({"batch_size": 12, "total_batch_size": 12 * 128}, "pass --batch_size 6 (or auto)"),
        ({"batch_size": 15, "total_batch_size": 15 * 128}, "pass --batch_size 5 (or auto)"),
        (
            {"batch_size": 16, "activation_checkpointing": "blocks"},
            "pass --batch_size 8 (or auto) or --activation_checkpointing all; the update stays the same",
        ),
        ({"batch_size": 16, "activation_checkpointing": "all"}, "pass --batch_size 8 (or auto); the update"),
        (
            {"batch_size": 1},
            "pass --activation_checkpointing all; the update stays the same; if that is not",
        ),
        ({"batch_size": "auto"}, "pass --activation_checkpointing all; the update stays the same"),
        (
            {"batch_size": 1, "activation_checkpointing": "all"},
            "take a shorter --model.max_seq_len than 128, or a smaller model",
        ),
    ],
)
def test_what_takes_less_memory_is_named(changes, advice):
    assert memory.after_out_of_memory(tiny_config(**changes), 1).startswith(advice)


def test_a_run_that_is_out_of_memory_says_what_takes_less(tmp_path, monkeypatch, capsys):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")

    monkeypatch.setattr(train, "train", out_of_memory)
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY])
    assert train.main() == 1
    said = capsys.readouterr().err
    assert "Tried to allocate 2.00 GiB. To make it fit, pass --batch_size 8 (or auto)" in said


def test_auto_is_a_batch_size_and_other_words_are_not():
    cfg = read_config([*TINY, "--batch_size", "auto"], train.CONFIGS, say=lambda line: None)
    assert cfg.batch_size == "auto" == config_as_dict(cfg)["batch_size"]
    assert config_errors(cfg) == []
    [error] = config_errors(replace(cfg, total_batch_size=2049))
    assert error.startswith("total_batch_size=2049: must be a multiple of batch_size=1 x 1 processes")
    with pytest.raises(ValueError, match="batch_size=large: must be a whole number or auto"):
        read_config([*TINY, "--batch_size", "large"], train.CONFIGS)
