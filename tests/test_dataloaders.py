import json
import threading

import numpy as np
import pytest
import torch

import shards
from dataloaders import READ_AHEAD, BatchLayout, TrainWindows, folder_quotas, open_streams, shuffled, validation_batches
from shards import TokenStream

VOCAB = 4096  # uint16
FINGERPRINT = "a tokenizer's"


def write_folder(root, *, train=(100, 100, 57), val=(61,), vocab_size=VOCAB, dtype="uint16", first=0):
    """Write a prepared folder. Its ids are first + 0, 1, 2, ..., so the id of a training token tells its position."""
    root.mkdir(parents=True, exist_ok=True)
    shards, position = [], {"val": first, "train": first}
    for index, (split, tokens) in enumerate([("val", n) for n in val] + [("train", n) for n in train]):
        name = f"edufineweb_{split}_{index:06d}.npy"
        np.save(root / name, np.arange(position[split], position[split] + tokens).astype(dtype))
        position[split] += tokens
        counts = {"tokens": tokens, "documents": 0, "text_bytes": 0}
        shards.append({"file": name, "split": split, "sha256": "", **counts})
    manifest = {"format_version": 1, "vocab_size": vocab_size, "dtype": dtype, "tokenizer_fingerprint": FINGERPRINT}
    manifest |= {"documents": 0, "tokens": sum(shard["tokens"] for shard in shards)}
    (root / "manifest.json").write_text(json.dumps({**manifest, "shards": shards}))
    return root


def open_stream(root, split="train", vocab_size=VOCAB, fingerprint=FINGERPRINT):
    return TokenStream(root, split, vocab_size=vocab_size, fingerprint=fingerprint)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data")


@pytest.fixture
def stream(folder):
    return open_stream(folder)


# ---------------------------------------------------------------- the order


@pytest.mark.parametrize("seed", [0, 1337])
def test_shuffled_is_a_permutation_of_any_small_range(seed):
    for n in range(1, 301):
        assert sorted(shuffled(np.arange(n), n, seed=seed, epoch=n % 3).tolist()) == list(range(n))


# Around powers of two and four, where the number of bits of the network's halves changes.
@pytest.mark.parametrize("n", [4095, 4096, 4097, 2**15 - 1, 2**15, 2**15 + 1, 2**16, 2**16 + 1, 100_003])
def test_shuffled_is_a_permutation_of_larger_ranges(n):
    assert (np.sort(shuffled(np.arange(n), n, seed=3, epoch=1)) == np.arange(n)).all()


@pytest.mark.parametrize("n", [10_000_000, 2**32, 2**40 + 1, 10**12])
def test_shuffled_needs_no_table_for_huge_ranges(n):
    index = np.concatenate([np.arange(2000), np.arange(n - 2000, n)])
    values = shuffled(index, n, seed=0, epoch=0)
    assert len(np.unique(values)) == len(index)
    assert values.min() >= 0 and values.max() < n


def test_shuffled_differs_by_seed_and_by_epoch():
    orders = [tuple(shuffled(np.arange(1000), 1000, seed=seed, epoch=epoch)) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == 25
    assert tuple(range(1000)) not in orders
    for i, one in enumerate(orders):  # two random permutations agree in one place on average, and never in 20
        assert all(sum(a == b for a, b in zip(one, other, strict=True)) < 20 for other in orders[:i])


def test_a_shuffled_value_does_not_depend_on_the_other_indices_in_the_call():
    whole = shuffled(np.arange(100), 100, seed=5, epoch=2)
    assert shuffled(np.arange(100).reshape(4, 5, 5), 100, seed=5, epoch=2).tolist() == whole.reshape(4, 5, 5).tolist()
    assert [int(shuffled(np.array(i), 100, seed=5, epoch=2)) for i in range(100)] == whole.tolist()
    assert shuffled(np.array([], dtype=np.int64), 100, seed=5, epoch=2).tolist() == []


# Pinned: another order would silently give a resumed run windows that it has seen already.
@pytest.mark.parametrize(
    ("n", "seed", "epoch", "first"),
    [
        (10, 0, 0, [4, 8, 2, 7, 1, 5, 0, 9, 6, 3]),
        (10, 0, 1, [2, 9, 1, 7, 0, 8, 6, 4, 3, 5]),
        (10, 1, 0, [7, 6, 0, 5, 8, 1, 9, 2, 3, 4]),
        (1_000, 1_337, 0, [92, 558, 342, 920, 814, 807, 238, 608]),
        (19_531_249, 1_337, 3, [13328723, 6105198, 16503646, 16823120, 18591824]),
        (1_000_000_000_000, 1_099_511_627_776, 7, [830629657205, 104910322070, 28331831455]),
    ],
)
def test_the_order_is_the_one_of_earlier_runs(n, seed, epoch, first):
    assert shuffled(np.arange(len(first)), n, seed=seed, epoch=epoch).tolist() == first


# ---------------------------------------------------------------- training batches

T = 8  # 257 training tokens are 32 windows of 8 and the last target. 32 windows are not a whole number of steps of 12.
WINDOWS, PER_STEP = 32, 12


def make_windows(stream, *, world_size=1, rank=0, batch_size=3, accumulation=None, seed=7, seq_len=T):
    accumulation = accumulation or PER_STEP // (batch_size * world_size)
    layout = BatchLayout(seq_len, batch_size, accumulation, rank, world_size)
    return TrainWindows(stream if isinstance(stream, list) else [stream], layout, seed=seed)


def consumed(stream, world_size, batch_size, start, end):
    """Per step, the windows that all processes train on, in the order of the micro-steps and ranks."""
    steps = []
    ranks = [make_windows(stream, world_size=world_size, rank=r, batch_size=batch_size) for r in range(world_size)]
    for step in range(start, end):
        batches = [list(w.batches(step, step + 1, torch.device("cpu"))) for w in ranks]
        assert len({len(b) for b in batches}) == 1  # else a rank would wait for another's missing batch
        steps.append([int(row[0]) // T for micro in zip(*batches, strict=True) for x, _ in micro for row in x])
    return steps


SHARED = [(1, 1), (1, 3), (1, 12), (2, 3), (2, 6), (3, 1), (3, 2), (4, 1), (4, 3)]  # (world_size, batch_size)


@pytest.mark.parametrize(("world_size", "batch_size"), SHARED)
def test_a_step_takes_the_same_windows_with_any_number_of_processes(stream, world_size, batch_size):
    alone = consumed(stream, 1, 12, 0, 9)
    assert all(len(step) == PER_STEP for step in alone)
    assert consumed(stream, world_size, batch_size, 0, 9) == alone


@pytest.mark.parametrize(("world_size", "batch_size"), SHARED)
def test_a_run_resumes_at_any_step_with_any_number_of_processes(stream, world_size, batch_size):
    whole = consumed(stream, 1, 4, 0, 9)
    for start in range(9):
        assert consumed(stream, world_size, batch_size, start, 9) == whole[start:]


@pytest.mark.parametrize("mixed", [False, True])
def test_a_run_that_goes_on_with_1_2_4_and_3_processes_reads_the_same_tokens(stream, tmp_path, mixed):
    """60 steps of 12 windows, over shard borders, ends of epochs and a short last shard. `mixed` takes two folders."""
    streams = mixture(tmp_path) if mixed else [stream]
    expected = [make_windows(streams, batch_size=1).batch(i) for i in range(60 * PER_STEP)]
    start, seen, saved = 0, [], None
    for world_size, batch_size in [(1, 3), (2, 3), (4, 1), (3, 2)]:
        ranks = [make_windows(streams, world_size=world_size, rank=r, batch_size=batch_size) for r in range(world_size)]
        if saved:
            ranks[0].check_state(saved)
        saved = json.loads(json.dumps(ranks[0].state()))
        shares = [list(r.batches(start, start + 15, torch.device("cpu"))) for r in ranks]
        seen += [batch for micro in zip(*shares, strict=True) for batch in micro]
        start += 15
    for side in (0, 1):
        assert torch.equal(torch.cat([b[side] for b in seen]), torch.cat([b[side] for b in expected]))
    if not mixed:  # 22 epochs, each with every window once. Mixed epochs end inside blocks: see below.
        ids = stream.read(0, len(stream))
        whole = sorted(tuple(ids[i * T : (i + 1) * T].tolist()) for i in range(WINDOWS))
        rows = [tuple(x.tolist()) for xs, _ in seen for x in xs]
        for i in range(0, len(rows) - WINDOWS + 1, WINDOWS):
            assert sorted(rows[i : i + WINDOWS]) == whole


def test_batches_of_several_steps_are_the_batches_of_each_step(stream):
    windows = make_windows(stream)
    together = list(windows.batches(2, 6, torch.device("cpu")))
    assert len(together) == 4 * windows.layout.accumulation
    apart = [b for step in range(2, 6) for b in windows.batches(step, step + 1, torch.device("cpu"))]
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(together, apart, strict=True))
    assert list(windows.batches(3, 3, torch.device("cpu"))) == []


def test_reading_batches_leaves_torchs_random_state_alone(stream):
    """A resumed run has the random state of the unbroken one, however often it was resumed."""
    before = torch.get_rng_state()
    assert len(list(make_windows(stream).batches(0, 2, torch.device("cpu")))) > 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 12])
def test_an_epoch_has_every_window_once_even_if_a_batch_spans_two_epochs(stream, batch_size):
    order = [w for step in consumed(stream, 1, batch_size, 0, 16) for w in step]  # 6 epochs of 32
    epochs = [order[i : i + WINDOWS] for i in range(0, len(order), WINDOWS)]
    assert all(sorted(epoch) == list(range(WINDOWS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_a_batch_larger_than_the_corpus_spans_several_epochs(tmp_path):
    stream = open_stream(write_folder(tmp_path, train=(5 * T + 1,)))
    windows = make_windows(stream, batch_size=23, accumulation=1)
    order = np.concatenate([windows.windows(i)[1] for i in range(5)])  # 115 windows: 23 epochs of 5
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in order.reshape(23, 5).tolist())


def test_another_seed_gives_another_order(stream):
    orders = {tuple(np.concatenate([make_windows(stream, seed=s).windows(i)[1] for i in range(10)])) for s in range(10)}
    assert len(orders) == 10


def test_targets_are_the_inputs_shifted_by_one_and_both_come_from_the_stream(stream):
    ids = stream.read(0, len(stream))
    windows = make_windows(stream)
    numbers = np.concatenate([windows.windows(i)[1] for i in range(11)])
    batches = [windows.batch(i) for i in range(11)]
    for x, y in batches:
        assert x.shape == y.shape == (3, T)
        assert x.dtype == y.dtype == torch.int64
        assert x.is_contiguous() and y.is_contiguous()
    for number, x, y in zip(numbers, *(torch.cat(side) for side in zip(*batches, strict=True)), strict=True):
        assert x.tolist() == ids[number * T : (number + 1) * T].tolist()
        assert y.tolist() == ids[number * T + 1 : (number + 1) * T + 1].tolist()


# ---------------------------------------------------------------- the thread that reads ahead


class Watched:
    """Stands in for `batch` of `windows`: notes what is read, and fails at one micro-step."""

    def __init__(self, windows, broken=-1):
        self.real, self.broken, self.reads, self.threads = windows.batch, broken, [], set()
        self.is_ahead = threading.Event()
        windows.batch = self

    def __call__(self, micro_step, pinned):
        self.threads.add(threading.current_thread())
        if micro_step == self.broken:
            raise OSError("the disk is gone")
        batch = self.real(micro_step, pinned)
        self.reads.append(micro_step)
        if len(self.reads) == 1 + READ_AHEAD:
            self.is_ahead.set()
        return batch


def test_batches_come_in_the_order_of_the_micro_steps_from_a_single_thread(stream):
    windows = make_windows(stream)
    expected = [windows.batch(i) for i in range(windows.layout.accumulation, 4 * windows.layout.accumulation)]
    watched = Watched(windows)
    seen = list(windows.batches(1, 4, torch.device("cpu")))
    assert len(seen) == len(expected) == len(watched.reads)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(seen, expected, strict=True))
    assert len(watched.threads) == 1 and threading.main_thread() not in watched.threads


def test_a_few_batches_are_read_ahead_and_the_thread_ends_with_the_iterator(stream):
    windows = make_windows(stream)
    watched = Watched(windows)
    batches = windows.batches(0, 10_000, torch.device("cpu"))
    next(batches)
    assert watched.is_ahead.wait(60)
    del batches  # the loop is left by an error, or by a stop signal
    (thread,) = watched.threads
    thread.join(60)
    assert not thread.is_alive()
    assert watched.reads == list(range(1 + READ_AHEAD))


def test_what_the_thread_raises_comes_in_place_of_the_batch_with_its_traceback(stream):
    windows, seen = make_windows(stream), []
    watched = Watched(windows, broken=6)
    with pytest.raises(OSError, match="the disk is gone") as error:
        for batch in windows.batches(0, 10, torch.device("cpu")):
            seen.append(batch)
    assert len(seen) == 6
    assert "__call__" in [entry.name for entry in error.traceback]
    (thread,) = watched.threads
    thread.join(60)
    assert not thread.is_alive()


def test_the_thread_pins_memory_for_cuda_alone_on_the_gpu_of_its_process(stream, monkeypatch):
    asked, chosen, empty = [], [], torch.empty
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append((threading.current_thread(), device)))
    monkeypatch.setattr(torch, "empty", lambda *n, pin_memory, **kw: asked.append(pin_memory) or empty(*n, **kw))
    windows, gpu = make_windows(stream), torch.device("cuda", 3)
    watched = Watched(windows)
    there = list(windows.batches(1, 4, gpu))
    assert chosen == [(*watched.threads, gpu)] and asked and all(asked)
    asked.clear()
    here = list(windows.batches(1, 4, torch.device("mps")))
    assert len(chosen) == 1 and asked and not any(asked)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(there, here, strict=True))


# ---------------------------------------------------------------- several folders


def mixture(tmp_path, weights=(0.7, 0.3)):
    """Two folders, with 32 and with 11 windows of 8 tokens. The second's ids begin at 1024, above the first's."""
    write_folder(tmp_path / "a")
    write_folder(tmp_path / "b", train=(50, 43), val=(200,), first=1024)
    words = [f"{tmp_path / name}:{weight}" for name, weight in zip("ab", weights, strict=True)]
    return open_streams(words, "train", vocab_size=VOCAB, fingerprint=FINGERPRINT)


@pytest.mark.parametrize(
    ("words", "quotas"),
    [
        ("a", {"a": 1000}),
        ("a:0.2", {"a": 1000}),
        (["a:0.7", "b:0.3"], {"a": 700, "b": 300}),
        (["a:2", "b"], {"a": 667, "b": 333}),
        (["a", "b", "c"], {"a": 334, "b": 333, "c": 333}),
        (["a:1e-3", "b"], {"a": 1, "b": 999}),
        (["C:\\x", "C:\\y:3"], {"C:\\x": 250, "C:\\y": 750}),
        (["a:b:3", "a:b:c"], {"a:b": 750, "a:b:c": 250}),
        (["2024", "1:3"], {"2024": 250, "1": 750}),
    ],
)
def test_weights_become_whole_numbers_of_windows_in_every_thousand(words, quotas):
    assert folder_quotas(words) == quotas
    assert folder_quotas(json.loads(json.dumps(words))) == quotas  # as a checkpoint's configuration has them


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "names no folder"),
        (["a", "b", "a:2"], "names a twice"),
        (["a", "./a/"], "twice"),
        (["a:1e-9", "b"], "weight of a comes to less"),
        *[(["a", f"b:{weight}"], f"b:{weight} is no path:weight") for weight in ("0", "-1", "nan", "inf", "-0.0")],
        ([":1"], ":1 is no path:weight"),
    ],
)
def test_impossible_mixtures_are_refused(words, message):
    with pytest.raises(ValueError, match=f"data_root: .*{message}"):
        folder_quotas(words)


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 999), (1, 1)])
def test_every_thousand_windows_hold_the_quotas_and_every_epoch_holds_each_window_once(tmp_path, weights):
    windows = make_windows(mixture(tmp_path, weights), batch_size=1000, accumulation=1)
    quota = round(1000 * weights[0] / sum(weights))
    blocks = [windows.windows(i) for i in range(5)]
    assert [int((folder == 0).sum()) for folder, _ in blocks] == [quota] * 5
    assert len({tuple(folder) for folder, _ in blocks}) == 5  # each block has its own shuffle
    for k, length, of_block in ((0, 32, quota), (1, 11, 1000 - quota)):
        # A block only permutes a folder's windows within the block. So whole blocks hold the same windows as the folder
        # alone: whole epochs and the same rest.
        seen = np.concatenate([window[folder == k] for folder, window in blocks])
        alone = make_windows(windows.streams[k], batch_size=5 * of_block, accumulation=1).windows(0)[1]
        assert sorted(seen.tolist()) == sorted(alone.tolist())
        counts = np.bincount(seen, minlength=length)
        assert counts.sum() == 5 * of_block and counts.max() - counts.min() <= 1


def test_shares_count_each_folders_windows_so_far(tmp_path):
    windows = make_windows(mixture(tmp_path), batch_size=12)
    assert windows.shares(0) == {}
    assert make_windows(windows.streams[0]).shares(5) == {}
    folders = np.concatenate([windows.windows(i)[0] for i in range(100)])
    for step in (1, 2, 83, 84, 100):  # a block ends in step 84
        share = float((folders[: step * PER_STEP] == 0).mean())
        expected = {str(tmp_path / "a"): share, str(tmp_path / "b"): 1 - share}
        assert windows.shares(step) == pytest.approx(expected)
    assert windows.shares(250) == pytest.approx({str(tmp_path / "a"): 0.7, str(tmp_path / "b"): 0.3})


def test_another_mixture_is_refused_and_its_differences_are_named(tmp_path, stream):
    saved = json.loads(json.dumps(make_windows(mixture(tmp_path)).state()))
    make_windows(mixture(tmp_path), batch_size=1).check_state(saved)
    with pytest.raises(ValueError, match=r"quotas was \[700, 300\], is \[600, 400\]; restore"):
        make_windows(mixture(tmp_path, (0.6, 0.4))).check_state(saved)
    with pytest.raises(
        ValueError, match=r"training tokens was \[257, 93\], is 257; .*quotas was \[700, 300\], is None"
    ):
        make_windows(stream).check_state(saved)
    with pytest.raises(ValueError, match=r"quotas was None, is \[700, 300\]"):
        make_windows(mixture(tmp_path)).check_state(make_windows(stream).state())


@pytest.mark.parametrize(
    ("fields", "words"), [({"vocab_size": 512}, "vocabulary of 512"), ({"tokenizer_fingerprint": "x"}, "tokenizer")]
)
def test_a_folder_of_another_vocabulary_or_tokenizer_is_named(tmp_path, fields, words):
    mixture(tmp_path)
    change_manifest(tmp_path / "b", **fields)
    with pytest.raises(ValueError, match=words) as error:
        open_streams([str(tmp_path / "a"), str(tmp_path / "b")], "train", vocab_size=VOCAB, fingerprint=FINGERPRINT)
    assert str(error.value).startswith(str(tmp_path / "b"))


@pytest.mark.parametrize(("max_tokens", "counts"), [(10 * T, (5, 5)), (4 * T, (2, 2)), (1, (1, 1)), (10**6, (7, 24))])
def test_folders_share_the_validation_windows_by_weight(tmp_path, max_tokens, counts):
    mixture(tmp_path)
    words = [str(tmp_path / "a"), str(tmp_path / "b")]
    streams = open_streams(words, "val", vocab_size=VOCAB, fingerprint=FINGERPRINT)
    for world_size in (1, 3):
        shares = [
            validation_batches(
                streams, BatchLayout(T, batch_size=4, rank=rank, world_size=world_size), max_tokens=max_tokens
            )
            for rank in range(world_size)
        ]
        firsts = sorted(int(row[0]) for share in shares for x, _ in share for row in x)
        assert firsts == [i * T for i in range(counts[0])] + [1024 + i * T for i in range(counts[1])]


# ---------------------------------------------------------------- validation batches


def validation_windows(stream, *, max_tokens, **layout):
    batches = list(validation_batches([stream], BatchLayout(**layout), max_tokens=max_tokens))
    assert all(torch.equal(x[:, 1:], y[:, :-1]) and x.dtype == y.dtype == torch.int64 for x, y in batches)
    assert all(len(x) <= layout["batch_size"] for x, _ in batches)
    return [(tuple(x.tolist()), int(y[-1])) for xs, ys in batches for x, y in zip(xs, ys, strict=True)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 11])  # 7 windows: some of 11 processes get none
def test_the_shares_of_all_ranks_together_are_the_windows_of_one_process(folder, world_size):
    stream = open_stream(folder, "val")
    alone = validation_windows(stream, seq_len=T, batch_size=2, max_tokens=10**9)
    assert alone == [(tuple(range(i, i + T)), i + T) for i in range(0, 7 * T, T)]
    shares = [
        validation_windows(stream, seq_len=T, batch_size=3, max_tokens=10**9, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert sorted(window for share in shares for window in share) == alone
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("max_tokens", "windows"), [(1, 1), (T, 1), (2 * T - 1, 1), (2 * T, 2), (5 * T, 5), (99 * T, 7)]
)
def test_validation_stops_at_max_tokens(folder, max_tokens, windows):
    stream = open_stream(folder, "val")
    assert len(validation_windows(stream, seq_len=T, batch_size=2, max_tokens=max_tokens)) == windows


# ---------------------------------------------------------------- refusals


def change_manifest(root, **fields):
    manifest = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps({**manifest, **fields}))


def overwrite(path, position, value):
    ids = np.load(path)
    ids[position] = value
    np.save(path, ids)


def test_an_id_beyond_the_vocabulary_that_the_start_did_not_check_is_refused_when_read(folder, monkeypatch):
    monkeypatch.setattr(shards, "CHECKED_TOKENS", 3 * 10)  # the first 10 of each of three shards
    path = folder / "edufineweb_train_000002.npy"
    overwrite(path, 10, 5000)  # stream position 110
    stream = open_stream(folder)
    assert len(stream.read(0, 110)) == 110
    assert len(stream.read(111, 257)) == 146
    with pytest.raises(ValueError, match=r"holds id 5000.*prepare the folder anew") as error:
        stream.read(90, 120)
    assert str(error.value).startswith(str(path))
    with pytest.raises(ValueError, match="holds id 5000"):
        list(make_windows(stream).batches(0, 3, torch.device("cpu")))  # 36 windows: an epoch and more
    overwrite(path, 9, 5000)
    with pytest.raises(ValueError, match="holds id 5000"):
        open_stream(folder)


def test_too_few_training_tokens_are_refused(tmp_path):
    windows = make_windows(open_stream(write_folder(tmp_path / "enough", train=(T + 1,))))
    assert windows.num_windows == [1]
    assert windows.batch(0)[1].tolist() == [list(range(1, T + 1))] * 3
    with pytest.raises(ValueError, match=f"{T} training tokens .*prepare more data") as error:
        make_windows(open_stream(write_folder(tmp_path / "few", train=(T,))))
    assert str(tmp_path / "few") in str(error.value)


def test_too_few_validation_tokens_are_refused(tmp_path):
    layout = BatchLayout(T, batch_size=2)
    enough = open_stream(write_folder(tmp_path / "enough", val=(T + 1,)), "val")
    assert len(list(validation_batches([enough], layout, max_tokens=1000))) == 1
    few = open_stream(write_folder(tmp_path / "few", val=(T,)), "val")
    with pytest.raises(ValueError, match=f"{T} validation tokens .*--val_fraction") as error:
        list(validation_batches([few], layout, max_tokens=1000))
    assert str(tmp_path / "few") in str(error.value)


# ---------------------------------------------------------------- resuming


def test_a_run_may_resume_with_another_split_of_the_same_total_batch(stream):
    saved = json.loads(json.dumps(make_windows(stream, batch_size=3).state()))
    make_windows(stream, batch_size=1, world_size=4, rank=2).check_state(saved)


def test_settings_that_change_the_order_are_refused_by_name(stream, tmp_path):
    saved = make_windows(stream).state()
    shorter_stream = open_stream(write_folder(tmp_path / "shorter", train=(200,)))
    for other, message in [
        (make_windows(stream, seed=8), "seed was 7, is 8"),
        (make_windows(stream, accumulation=5), "total_batch_size was 96, is 120"),
        (make_windows(stream, world_size=2, accumulation=4), "total_batch_size was 96, is 192"),
        (make_windows(stream, seq_len=4, accumulation=8), "max_seq_len was 8, is 4"),
        (make_windows(shorter_stream), "training tokens was 257, is 200"),
    ]:
        with pytest.raises(ValueError) as error:
            other.check_state(saved)
        assert message in str(error.value)
        assert str(error.value).count(" was ") == 1  # only the difference is named
    with pytest.raises(ValueError, match="seed was None, is 7"):
        make_windows(stream).check_state({key: value for key, value in saved.items() if key != "seed"})
