"""Documents -> ids on all cores: batches are read ahead, tokenized side by side, and returned in order.

We start the processes ourselves. The processes of a concurrent.futures pool share one pipe for their results: if one
is killed while it writes, the pool waits for ever for the rest of its result. Here each worker has a pipe of its own,
which closes when the worker ends. Workers are spawned, not forked: this process has threads, and a fork may inherit a
lock that a thread holds.
"""

import multiprocessing
import pickle
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import numpy as np

from shards import token_dtype
from sources import Source, SourceError, read_ahead
from tokenizer import Tokenizer

BATCHES_AHEAD = 64  # about a megabyte each: workers stay busy while a shard is synced to the disk
LEFT_OUT = ("empty", "null", "not a string")  # kinds of documents that are left out; the manifest counts them


def tokenize(tokenizer: Tokenizer, documents: Sequence) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """All ids of the documents, one document after the other; the length of each; a note, by number, for each odd one.

    Args:
        documents: a list, or an arrow array.

    Raises:
        UnicodeDecodeError: the bytes of the array are not UTF-8.
    """
    documents = documents if isinstance(documents, list) else documents.to_pylist()
    ids, lengths, odd = [np.empty(0, dtype=np.uint32)], [], {}
    for i, document in enumerate(documents):
        pieces: list[np.ndarray] = []
        if document is None:
            odd[i] = "null"
        elif not isinstance(document, str):
            odd[i] = "not a string"
        elif not document:
            odd[i] = "empty"
        else:
            try:
                pieces = tokenizer.encode_document(document)
                if len(pieces) > 3:
                    odd[i] = "too long for one piece"
            except UnicodeEncodeError:
                pieces = [np.array(tokenizer.encode(document, bos=True, eos=True), dtype=np.uint32)]
                odd[i] = "lone surrogates replaced"
        ids += pieces
        lengths.append(sum(map(len, pieces)))
    return np.concatenate(ids, dtype=token_dtype(tokenizer.vocab_size), casting="unsafe"), np.array(lengths), odd


class Worker:
    """A process that tokenizes, and this end of its pipe."""

    def __init__(self, vocab_size: int):
        context = multiprocessing.get_context("spawn")
        self.connection, child_end = context.Pipe()
        self.process = context.Process(target=_work, args=(child_end, vocab_size), daemon=True)
        self.process.start()
        child_end.close()

    def tokenize(self, documents: Sequence) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        """`tokenize` in the worker. Raises what `tokenize` raises, and SourceError if the process died."""
        try:
            _send(self.connection, documents)
            answer = _receive(self.connection)
            if isinstance(answer, UnicodeDecodeError):
                raise answer
            return answer
        except (EOFError, OSError) as error:
            self.process.join(5)  # the pipe closes a moment before the process ends
            raise self.death() from error

    def death(self) -> SourceError:
        """The error that tells how the process died."""
        code = self.process.exitcode
        cause = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
        return SourceError(
            f"a worker process died ({cause}); if memory ran out, take a smaller --num_proc; "
            "the same command goes on after the last whole shard"
        )


def _work(connection: Connection, vocab_size: int) -> None:
    """What a worker does until its pipe closes: tokenize each batch that comes, and send the answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Windows does not inherit this from _interrupts_ignored
    tokenizer = Tokenizer(vocab_size=vocab_size)
    with suppress(EOFError, OSError):  # the parent process has ended
        while True:
            try:
                answer = tokenize(tokenizer, _receive(connection))
            except UnicodeDecodeError as error:
                answer = error
            _send(connection, answer)


def _send(connection: Connection, message: object) -> None:
    """`connection.send`, but texts and ids are sent from where they lie. A pickle would copy them once more."""
    buffers: list[pickle.PickleBuffer] = []
    connection.send((pickle.dumps(message, protocol=5, buffer_callback=buffers.append), len(buffers)))
    for buffer in buffers:
        connection.send_bytes(buffer.raw())


def _receive(connection: Connection) -> Any:
    message, num_buffers = connection.recv()
    return pickle.loads(message, buffers=[connection.recv_bytes() for _ in range(num_buffers)])


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ignore Ctrl-C while workers start, so that they inherit this and ignore it from their first moment.

    Ctrl-C reaches the whole process group, but this process alone shall answer it. A worker that is interrupted while
    it imports would show a traceback. This process ignores Ctrl-C for milliseconds.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set a handler
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def tokenized(
    source: Source, first: int, tokenizer: Tokenizer, num_proc: int
) -> Iterator[tuple[np.ndarray, np.ndarray, dict[int, str]]]:
    """`tokenize` of the source's batches from document number `first` on, by `num_proc` processes, in order.

    Args:
        num_proc: number of workers. With 1 this process does the work.

    Raises:
        SourceError: the source cannot be read, or a process died.
        UnicodeDecodeError: a document of the source is not UTF-8.
    """
    if num_proc == 1:
        yield from (tokenize(tokenizer, batch) for batch in source.read(first))
        return
    with _interrupts_ignored():
        workers = [Worker(tokenizer.vocab_size) for _ in range(num_proc)]
    idle: SimpleQueue = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def tokenize_in_worker(batch: Sequence) -> tuple:
        worker = idle.get()  # never waits: there are as many threads as workers
        try:
            return worker.tokenize(batch)
        finally:
            idle.put(worker)

    def check_workers() -> None:
        for worker in workers:
            if not worker.process.is_alive():
                raise worker.death()

    def result(future: Future) -> tuple:
        while not wait([future], timeout=1).done:
            check_workers()  # the worker of a later batch may have died
        return future.result()

    threads = ThreadPoolExecutor(num_proc)
    ahead: deque[Future] = deque()
    try:
        with closing(read_ahead(source.read(first), 4)) as batches:
            for batch in batches:
                if batch is None:  # the source brought nothing for a second
                    check_workers()
                else:
                    ahead.append(threads.submit(tokenize_in_worker, batch))
                while ahead and (ahead[0].done() or len(ahead) > BATCHES_AHEAD + num_proc):
                    yield result(ahead.popleft())
        while ahead:
            yield result(ahead.popleft())
    finally:
        for worker in workers:
            worker.process.terminate()
        threads.shutdown(cancel_futures=True)


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one; there is nothing to run here.")
