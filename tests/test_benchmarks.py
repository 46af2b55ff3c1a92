"""benchmarks/: the tables that all.py writes, the choice of the peer's fastest way, gpu.py in small, what recipes.py
asks of train.py, and that loader.py runs. No figure counts here."""

import importlib
import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))  # last, because it has a generate.py too

import common
import loader

from model import ModelConfig
from run_config import read_config
from train import CONFIGS

benchmarks, gpu, recipes = (importlib.import_module(name) for name in ("all", "gpu", "recipes"))
ROW, OTHER_ROW = "generation, greedy", "generation, sampled"


@pytest.fixture
def readme(tmp_path, monkeypatch):
    """A copy of benchmarks/README.md, which all.py writes."""
    path = tmp_path / "README.md"
    path.write_text(benchmarks.README.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(benchmarks, "README", path)
    return path


@pytest.fixture
def run(monkeypatch):
    """Runs all.py on the machine of a name, where our greedy generation is `ratio` times the peer's."""

    def run(machine: str, ratio: float, *flags: str) -> int:
        ways = {
            "ours, greedy": {"tokens_per_sec": 100 * ratio, "peak_gib": 1.0},
            "Hugging Face, greedy, sdpa": {"tokens_per_sec": 100.0},
            "Hugging Face, greedy, eager": {"tokens_per_sec": 50.0},
        }
        monkeypatch.setattr(benchmarks, "machine", lambda: machine)
        monkeypatch.setattr(benchmarks, "measure", lambda command: ways)
        monkeypatch.setattr(sys, "argv", ["all.py", "--only", ROW, *flags])
        return benchmarks.main()

    monkeypatch.setattr(benchmarks, "ROWS", {name: benchmarks.ROWS[name] for name in (ROW, OTHER_ROW)})
    return run


def ratios(machine: str) -> dict[str, float]:
    """The ratios in the table of a machine, by the name of the row."""
    lines = benchmarks.rows_of(benchmarks.read_tables()[1][f"{machine}:"])
    return {name: float(line.split(" | ")[4]) for name, line in lines.items()}


def test_a_new_machine_has_a_table_of_its_own_and_the_others_stay(readme, run):
    before = readme.read_text()
    assert run("A, AVX512, bfloat16", 2.0) == run("B, AVX2, float32", 3.0) == 0
    assert ratios("A, AVX512, bfloat16") == {ROW: 2.0}
    assert run("A, AVX512, bfloat16", 2.5) == 0
    assert (ratios("A, AVX512, bfloat16"), ratios("B, AVX2, float32")) == ({ROW: 2.5}, {ROW: 3.0})
    assert list(benchmarks.read_tables()[1])[-2:] == ["A, AVX512, bfloat16:", "B, AVX2, float32:"]
    (above, below), after = before.split(benchmarks.END), readme.read_text()
    assert after.startswith(above)  # with all the tables that were there
    assert after.endswith(benchmarks.END + below)


def test_a_row_replaces_the_row_of_its_name_only(readme, run):
    run("A", 2.0)
    line = benchmarks.rows_of(benchmarks.read_tables()[1]["A:"])[ROW]
    benchmarks.write_row(OTHER_ROW, line.replace(ROW, OTHER_ROW))
    run("A", 3.0)
    assert ratios("A") == {ROW: 3.0, OTHER_ROW: 2.0}


def test_a_row_that_became_slower_stays_out_unless_accepted(readme, run, capsys):
    run("A", 2.0)
    before = readme.read_text()
    run("B", 1.0)  # slower, but another machine
    readme.write_text(before)
    assert run("A", 1.7) == 1
    assert f"slower: {ROW}: 2.0 times the peer before, 1.7 now" in capsys.readouterr().err
    assert readme.read_text() == before
    assert run("A", 1.81) == 0
    assert ratios("A") == {ROW: 1.81}
    assert run("A", 1.0, "--accept") == 0
    assert ratios("A") == {ROW: 1.0}


@pytest.mark.parametrize("mark", ["BEGIN", "END"])
def test_without_its_marks_nothing_is_measured(readme, run, mark, capsys):
    readme.write_text(readme.read_text().replace(getattr(benchmarks, mark), ""))
    with pytest.raises(SystemExit, match=r"benchmarks/README\.md needs the lines"):
        run("A", 2.0)
    assert capsys.readouterr().out == ""  # a row that was measured is printed


class Worker:
    """As common.Worker, without a process. `ways` has the seconds of each turn by name; None: memory runs out."""

    def __init__(self, ways: dict[str, list]):
        self.names, self.ways, self.first, self.ended = list(ways), {n: list(s) for n, s in ways.items()}, {}, False

    def turn(self, name: str) -> dict:
        assert not self.ended
        seconds = self.ways[name].pop(0)
        if seconds is None:
            raise common.WorkerEnded(-9)
        self.first.setdefault(name, {"seconds": seconds})
        return {"seconds": seconds}

    def end(self) -> None:
        self.ended = True


def make(ways: dict[str, list]) -> dict:
    """Stands where a benchmark has the function that makes its ways."""
    return ways


@pytest.fixture
def made(monkeypatch):
    """The Workers that were made."""
    made = []

    def worker(make, *args):
        made.append(Worker(*args))
        return made[-1]

    monkeypatch.setattr(common, "Worker", worker)
    return made


def test_the_fastest_way_stays(made):
    workers, tried = common.try_ways(
        [(make, {"a": [1, 20], "b": [50, 12]}), (make, {"c": [60, 11]}), (make, {"d": [2, 30]})]
    )
    assert tried == {"a": 20, "b": 12, "c": 11, "d": 30}  # the first turn does not count
    assert (workers, workers[0].names) == ([made[1]], ["c"])
    assert [worker.ended for worker in made] == [True, False, True]


def test_short_turns_are_repeated_and_the_fastest_one_counts(made):
    _, tried = common.try_ways([(make, {"a": [2, 3, 1], "b": [11]})], first_counts=True)
    assert tried == {"a": 1, "b": 11}


def test_each_group_keeps_its_fastest_way(made):
    x, y = {"float32, x": [1, 20], "bfloat16, x": [1, 30]}, {"float32, y": [1, 25], "bfloat16, y": [1, 24]}
    workers, _ = common.try_ways([(make, x), (make, y)], groups=["float32", "bfloat16"])
    assert [worker.names for worker in workers] == [["float32, x"], ["bfloat16, y"]]


def test_a_way_that_runs_out_of_memory_is_named_and_does_not_win(made):
    workers, tried = common.try_ways([(make, {"a": [1, 12], "b": [None]}), (make, {"c": [1, 20]})])
    assert tried == {"a": None, "b": None, "c": 20}  # the process of b was that of a
    assert [worker.names for worker in workers] == [["c"]]
    with pytest.raises(SystemExit, match="memory ran out in each of these ways: a; take a smaller shape"):
        common.try_ways([(make, {"a": [None]})])


def test_a_way_that_was_tried_has_had_its_first_turn(made, monkeypatch):
    monkeypatch.setattr(common, "peak_flops", lambda *args: (1.0, "measured"))
    workers, _ = common.try_ways([(make, {"a": [7, 11, 12]})])
    rows = common.take_turns([*workers, Worker({"ours": [5, 6]})], 2)
    assert {name: [row["seconds"] for row in r] for name, r in rows.items()} == {"a": [7, 12], "ours": [5, 6]}


def test_scripts_that_train_on_random_tokens_build_their_ways(monkeypatch, tmp_path):
    """Their models and optimizers fit together. document_mask.py compiles at its first turn, so it takes none here."""
    checkpoint, document_mask = importlib.import_module("checkpoint"), importlib.import_module("document_mask")
    monkeypatch.setattr(document_mask, "keep_freed_memory", lambda: None)
    assert len(document_mask.ways((1, 64), 32)) == 2
    monkeypatch.setattr(checkpoint, "keep_freed_memory", lambda: None)
    tiny = ModelConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=512, multiple_of=32, max_seq_len=32)
    assert checkpoint.make_ways(tiny, (1, 32), str(tmp_path))


# ---------------------------------------------------------------- GPUs


class WorkerHere:
    """As common.Worker, but it works in this process. Memory runs out at a batch of 4, and uncompiled at one of 2."""

    def __init__(self, make, config, shape, *args):
        self.ways, self.batch_size, self.first = make(config, shape, *args), shape[0], {}
        self.names = list(self.ways)

    def turn(self, name: str) -> dict:
        if self.batch_size == 4 or (self.batch_size == 2 and name == "ours, float32"):
            raise common.WorkerEnded(common.OUT_OF_MEMORY)
        result = self.ways[name]() | {"peak_gib": 1.0}
        self.first.setdefault(name, result)
        return result

    def end(self) -> None:
        pass


@pytest.fixture
def on_this_cpu(monkeypatch):
    """Runs gpu.py with the words given. The "compiled" ways do not compile, and turns are short."""
    train_step = importlib.import_module("train_step")
    monkeypatch.setattr(train_step, "keep_freed_memory", lambda: None)
    monkeypatch.setitem(train_step.STANCES, ", compiled", "force_eager")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # for train.py
    for module in (common, gpu):
        monkeypatch.setattr(module, "Worker", WorkerHere)
    for name, value in {"DEVICE": torch.device("cpu"), "TURN": 3, "UPDATE": 2, "UPDATES": 2}.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu, "peak_flops", lambda *args: (1e12, "measured"))

    def run(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
        gpu.main()

    return run


def test_gpu_prints_a_row_for_each_way_and_one_where_memory_runs_out(on_this_cpu, capsys):
    sizes = ("--batch_sizes", "1", "2", "4", "8")
    on_this_cpu("--shape", "tiny", "--seq_len", "32", *sizes, "--dtypes", "float32", "float16", "--json")
    output, tables = capsys.readouterr()
    ways = json.loads(output)["ways"]
    ours, theirs = "ours, float32, compiled", next(way for way in ways if "Hugging" in way and way.endswith(", 2"))[:-3]
    failed = {way for way, figures in ways.items() if figures == {"failed": "memory ran out"}}
    assert failed == {
        "ours, float32, 2",
        f"{ours}, 4",
        f"{theirs}, 4",
        "ours, float16, 4",
        "ours, float16, compiled, 4",
    }
    peers = {f"Hugging Face, float32, {''.join(peer)}" for peer in gpu.PEERS}
    assert {f"{theirs}, 1", *(f"{way}, trial, 1" for way in peers - {theirs})} <= ways.keys()
    assert {f"{theirs.replace('float32', 'float16')}, 1"} == {w for w in ways if "Hugging Face, float16" in w}
    assert all(figures["share_of_peak"] > 0 for way, figures in ways.items() if way not in failed)
    assert ways[f"{ours}, 2"].keys() >= {"peak_gib", "first_step_seconds"}
    fastest = max((1, 2), key=lambda size: ways[f"{ours}, {size}"]["tokens_per_sec"])
    assert ways[f"train.py, float32, 1 process, {fastest}"]["tokens_per_sec"] > 0
    rows = [tuple(line.split(" | ")[:2]) for line in tables.splitlines() if line.startswith("| ") and "way" not in line]
    assert [f"{way[2:]}, {size}" for way, size in rows if size.isdigit()] == list(ways)  # printed in the same order
    assert "| ours, float32 | 2 | memory ran out | - | - | - |" in tables


def test_gpu_takes_all_gpus_and_goes_on_after_a_run_that_failed(monkeypatch, capsys):
    runs = []

    def train(processes, fields):
        runs.append((processes, fields["total_batch_size"] // fields["batch_size"] // fields["model.max_seq_len"]))
        if processes == 2:
            raise subprocess.CalledProcessError(1, "train.py")
        return [{"tokens_per_sec": 100.0 * processes, "mfu": 0.5}] * 5

    monkeypatch.setattr(gpu, "train", train)
    monkeypatch.setattr(gpu, "prepare", lambda *args, **flags: None)
    monkeypatch.setattr(gpu.torch.cuda, "device_count", lambda: 6)
    page = gpu.Page(sys.stdout, 32, 1.0, math.inf)
    gpu.all_gpus(page, "float32", "tiny", [8])
    assert runs == [(n, 8 * n) for n in (1, 2, 4, 6)]  # 64 sequences a GPU, 8 micro-steps
    figures = [row.get("failed", row.get("tokens_per_sec")) for row in page.rows.values()]
    assert figures == [100.0, gpu.FAILED, 400.0, 600.0]


def test_gpu_begins_nothing_when_the_time_is_over(on_this_cpu, capsys):
    on_this_cpu("--shape", "tiny", "--minutes", "0", "--json")
    output, tables = capsys.readouterr()
    assert json.loads(output)["ways"] == {} and "--minutes gives more" in tables


def test_gpu_names_the_cards_and_the_versions(monkeypatch):
    """On a made-up machine of two GPUs, without nvidia-smi. It is the first that gpu.py does on a real one."""
    card = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(gpu, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(gpu, "machine", lambda: "H100, bfloat16")
    monkeypatch.setattr(gpu.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(gpu.torch.cuda, "get_device_properties", lambda i: card)
    monkeypatch.setattr(gpu.torch.cuda.nccl, "version", lambda: (2, 28, 9))
    monkeypatch.setattr(gpu.torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setenv("PATH", "")
    found = gpu.facts()
    assert found["GPUs"] == "; ".join(["NVIDIA H100 80GB HBM3, 80.0 GiB, sm_90"] * 2)
    assert (found["NCCL"], found["driver, power limit"], found["commit"]) == ("2.28.9", "unknown", "unknown")


def test_gpu_refuses_the_original_shape_without_a_gpu(on_this_cpu):
    with pytest.raises(SystemExit, match="torch finds no GPU on this machine; --shape tiny tries"):
        on_this_cpu()


# ---------------------------------------------------------------- recipes


@pytest.fixture
def asked(monkeypatch):
    """The flags of each run of train.py that recipes.py starts. A step takes half a second there, the first one 5."""
    runs = []

    def train(command, **_):
        assert command[1] == str(recipes.TRAIN)
        flags = {flag: value for flag, value in pairwise(command) if flag.startswith("--")}
        runs.append(flags)
        steps = int(flags["--max_steps"])
        rows = [
            {"train_loss": 3.0, "tokens": 1000 * s, "tokens_per_sec": 2000 if s > 1 else 200}
            for s in range(1, steps + 1)
        ]
        rows.append({"val_loss": 2.0, "val_bpb": float(flags["--seed"]) if "--seed" in flags else 9.0})
        Path(flags["--out_dir"], "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return SimpleNamespace(returncode=int(flags.get("--muon_lr") == "inf"))

    monkeypatch.setattr(recipes.subprocess, "run", train)
    return runs


def table(monkeypatch, capsys, *words: str) -> dict[str, dict]:
    monkeypatch.setattr(sys, "argv", ["recipes.py", "--data_root", "prose", "--json", *words])
    recipes.main()
    return json.loads(capsys.readouterr().out)["ways"]


def test_recipes_take_turns_and_their_flags_stand_in_the_place_of_the_shapes(asked, monkeypatch, capsys):
    words = ("--recipes", "nanoGPT", "--try", "--muon_lr 0.03", "--flags", "--max_lr=1 --max_steps 7 --model.dim=128")
    rows = table(monkeypatch, capsys, *words, "--seeds", "1", "3")
    assert [run["--seed"] for run in asked] == ["1", "1", "3", "3"]
    assert [run.get("--muon_lr") for run in asked] == [None, "0.03"] * 2
    assert {(run["--model.dim"], run["--max_steps"], run["--data_root"]) for run in asked} == {("128", "7", "prose")}
    assert asked[0]["--optimizer"] == "adamw" and [run["--max_lr"] for run in asked] == ["1e-3", "1"] * 2
    for row in rows.values():
        assert (row["bpb"], row["spread"], row["steps"], row["tokens"]) == (2.0, 2.0, 7, 7000)
        assert (row["seconds"], row["step_seconds"]) == (8.0, 0.5)


@pytest.mark.parametrize(("seconds", "steps"), [(50, 91), (1, 1)])
def test_seconds_become_steps(asked, monkeypatch, capsys, seconds, steps):
    """5 seconds for the first step, then 90 steps of half a second."""
    table(monkeypatch, capsys, "--recipes", "ours", "--seconds", str(seconds), "--flags", "--max_steps 7")
    assert [run["--max_steps"] for run in asked] == [str(recipes.TRIAL_STEPS), str(steps)]


def test_a_recipe_that_fails_does_not_end_the_others(asked, monkeypatch, capsys):
    rows = table(monkeypatch, capsys, "--recipes", "ours", "--try", "--muon_lr inf", "--seeds", "1", "2")
    assert rows["ours"]["bpb"] == 1.5 and math.isnan(rows["`--muon_lr inf`"]["bpb"])


def test_without_a_trial_there_is_no_number_of_steps_and_one_sentence_says_so(asked, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="has failed, and said why above"):
        table(monkeypatch, capsys, "--try", "--muon_lr inf", "--seconds", "50")


def test_the_recipes_of_the_file_are_flags_that_train_takes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for text in recipes.RECIPES.values():
        words = [word for name, values in recipes.flags_of(text).items() for word in (f"--{name}", *values)]
        assert read_config(["--config", "sample", "--device", "cpu", *words], CONFIGS, say=lambda line: None)


# ---------------------------------------------------------------- loader.py


def test_the_loader_is_measured_against_reading_whole_shards(monkeypatch, capsys):
    words = "--shards 2 --shard_tokens 3000 --batch_size 2 --seq_len 16 --batches 3 --turns 1 --steps 0 --json"
    monkeypatch.setattr(sys, "argv", ["loader.py", *words.split()])
    loader.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["loaders"].keys() == {"ours", "whole shards"}
    assert all(row["tokens_per_sec"] > 0 for row in result["loaders"].values())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux counts what comes from the disk")
def test_a_cold_cache_is_measured_in_both_orders_and_all_ways_read_the_same(tmp_path):
    loader.write_shards(tmp_path, 2, 3000)
    streams = [stream(tmp_path, "train", vocab_size=loader.FOLDER_VOCAB) for stream in loader.STREAMS.values()]
    assert len({stream.read(2900, 3100).tobytes() for stream in streams}) == 1
    for way, order in [*((way, "training") for way in loader.STREAMS), ("ours", "validation"), ("nanoGPT", "")]:
        row = loader.measure_cold(way, order, tmp_path, B=2, T=16, batches=3)
        assert row["tokens_per_sec"] > 0 and row["read_per_byte"] >= 0
    x, y = next(loader.nanogpt(tmp_path, 2, 16))
    assert x.shape == y.shape == (2, 16) and (x[:, 1:] == y[:, :-1]).all()
