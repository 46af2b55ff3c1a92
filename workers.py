"""Documents -> ids on all cores. Batches are read ahead, tokenized in parallel, and returned in order.

This file does not use a pool of concurrent.futures. The processes of such a pool share one pipe for their results. If
one of them is killed while it writes a result, the pool waits forever for the rest. Here each worker has its own
pipe, which closes when the worker ends. Workers are spawned, not forked. This process has threads, and a forked process
may inherit a lock that a thread holds.
"""

import multiprocessing
import pickle
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from hashlib import sha256
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np

from readers import BadRow, Batch, read_ahead
from rows import SourceError
from shards import token_dtype
from tokenizer import Tokenizer

BATCHES_AHEAD = 64  # each about a megabyte; they keep the workers busy while this process syncs a shard to the disk


class Tokenized(NamedTuple):
    """The ids of a batch of D documents. A document that is empty, null, not a string, or a broken row has 0 ids."""

    ids: np.ndarray  # (N,) of all documents
    lengths: np.ndarray  # (D,) int64, the number of ids of each document
    hashes: np.ndarray  # (D,) uint64, the first bytes of the sha256 of each text; 0 for a document without ids
    notes: dict[int, str]  # of each odd document, by its index


def tokenize(tokenizer: Tokenizer, documents: Sequence) -> Tokenized:
    """The ids of a batch of documents.

    Args:
        documents: a list or an arrow array of D documents.

    Raises:
        UnicodeDecodeError: the bytes of the array are not UTF-8.
    """
    documents = documents if isinstance(documents, list) else documents.to_pylist()
    ids, notes = [np.empty(0, dtype=np.uint32)], {}
    lengths, hashes = np.zeros(len(documents), dtype=np.int64), np.zeros(len(documents), dtype=np.uint64)
    for i, document in enumerate(documents):
        if document is None:
            notes[i] = "null"
        elif isinstance(document, BadRow):
            notes[i] = "broken"
        elif not isinstance(document, str):
            notes[i] = "not a string"
        elif not document:
            notes[i] = "empty"
        else:
            try:
                pieces = tokenizer.encode_document(document)
                if len(pieces) > 3:
                    notes[i] = "too long for one piece"
            except UnicodeEncodeError:  # lone surrogates, which only `encode` replaces
                document = document.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                pieces = tokenizer.encode_document(document)
                notes[i] = "lone surrogates replaced"
            ids += pieces
            lengths[i] = sum(map(len, pieces))
            digest = sha256(document.encode()).digest()
            hashes[i] = int.from_bytes(digest[:8], "big")
    all_ids = np.concatenate(ids, dtype=token_dtype(tokenizer.vocab_size), casting="unsafe")
    return Tokenized(all_ids, lengths, hashes, notes)


class Worker:
    """A process that tokenizes batches, and this process's end of its pipe."""

    def __init__(self, vocab_size: int):
        context = multiprocessing.get_context("spawn")
        self.connection, child_connection = context.Pipe()
        self.process = context.Process(target=_answer_batches, args=(child_connection, vocab_size), daemon=True)
        self.process.start()
        self.has_answered = False
        child_connection.close()

    def tokenize(self, documents: Sequence) -> Tokenized:
        """`tokenize` in the worker process. Raises what `tokenize` raises, and SourceError if the process died."""
        try:
            _send(self.connection, documents)
            answer = _receive(self.connection)
            self.has_answered = True
            if isinstance(answer, UnicodeDecodeError):
                raise answer
            return answer
        except (EOFError, OSError) as error:
            self.process.join(5)  # the pipe closes a moment before the process ends
            raise self.death() from error

    def death(self) -> SourceError:
        """The error to raise for a process that died. Its message names the signal or the exit status."""
        code = self.process.exitcode
        cause = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
        if not self.has_answered and code != -signal.SIGKILL:
            return SourceError(
                f"a worker process could not start ({cause}; its error is above); mend it, or pass --num_proc 1"
            )
        return SourceError(
            f"a worker process died ({cause}); if memory ran out, take a smaller --num_proc; "
            "the same command goes on after the last whole shard"
        )


def _answer_batches(connection: Connection, vocab_size: int) -> None:
    """Runs in the worker process until its pipe closes: tokenizes each batch it receives, and sends back the result."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Windows does not inherit this from _interrupts_ignored
    tokenizer = Tokenizer(vocab_size=vocab_size)
    with suppress(EOFError, OSError):  # these say that the parent process has ended
        while True:
            try:
                answer = tokenize(tokenizer, _receive(connection))
            except UnicodeDecodeError as error:
                answer = error
            _send(connection, answer)


def _send(connection: Connection, message: object) -> None:
    """Like `connection.send`, but the data of arrow and NumPy arrays is not copied into a pickle first."""
    buffers: list[pickle.PickleBuffer] = []
    connection.send((pickle.dumps(message, protocol=5, buffer_callback=buffers.append), len(buffers)))
    for buffer in buffers:
        connection.send_bytes(buffer.raw())


def _receive(connection: Connection) -> Any:
    """The next message that `_send` sent at the other end."""
    message, num_buffers = connection.recv()
    return pickle.loads(message, buffers=[connection.recv_bytes() for _ in range(num_buffers)])


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ignore Ctrl-C while workers start. They inherit this, so they ignore Ctrl-C from their first moment.

    A terminal sends Ctrl-C to all processes of the group, but only this process must react to it. Otherwise a worker
    that is importing modules would print a traceback. This process ignores Ctrl-C for a few milliseconds.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set a handler
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def tokenized(source_batches: Iterator[Batch], tokenizer: Tokenizer, num_proc: int) -> Iterator[tuple[Tokenized, str]]:
    """Yields the ids and the digest of each batch, in order.

    Args:
        source_batches: from `Source.read`.
        num_proc: number of worker processes. With 1 this process does the work.

    Raises:
        SourceError: the source cannot be read, or a worker died.
        UnicodeDecodeError: a document of the source is not UTF-8.
    """
    if num_proc == 1:
        yield from ((tokenize(tokenizer, batch.documents), batch[1:]) for batch in source_batches)
        return
    with _interrupts_ignored():
        workers = [Worker(tokenizer.vocab_size) for _ in range(num_proc)]
    idle: SimpleQueue = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def tokenize_in_worker(batch: Batch) -> tuple[Tokenized, tuple[str, str]]:
        worker = idle.get()  # never waits: there is a worker for each thread
        try:
            return worker.tokenize(batch.documents), batch[1:]
        finally:
            idle.put(worker)

    def check_workers() -> None:
        for worker in workers:
            if not worker.process.is_alive():
                raise worker.death()

    def wait_for(future: Future) -> tuple:
        while not wait([future], timeout=1).done:
            check_workers()  # a worker that has a later batch may have died
        return future.result()

    threads = ThreadPoolExecutor(num_proc)
    pending: deque[Future] = deque()  # the results to come, in the order of the batches
    try:
        with closing(read_ahead(source_batches, 4)) as batches:
            for batch in batches:
                if batch is None:  # the source gave no batch for a second
                    check_workers()
                else:
                    pending.append(threads.submit(tokenize_in_worker, batch))
                while pending and (pending[0].done() or len(pending) > BATCHES_AHEAD + num_proc):
                    yield wait_for(pending.popleft())
        while pending:
            yield wait_for(pending.popleft())
    finally:
        for worker in workers:
            worker.process.terminate()  # its pipe closes, so no thread waits for it any longer
        threads.shutdown(cancel_futures=True)


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one; there is nothing to run here.")
