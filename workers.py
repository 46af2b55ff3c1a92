"""Documents -> ids on all cores: a source is read ahead, its batches are tokenized side by side and come in order.

The processes are ours, not those of a pool. concurrent.futures' share one pipe for their results: of one that is killed
while it writes, half a result stays there, and the pool waits for the other half for ever. Here each has a pipe of its
own, which ends with it. They are spawned, not forked: this process has threads, and a fork may inherit their locks.
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

BATCHES_AHEAD = 64  # of about a megabyte: workers stay busy while a shard is brought to the disk
LEFT_OUT = ("empty", "null", "not a string")  # kinds of documents that leave no trace but in the manifest's count


def tokenize(tokenizer: Tokenizer, documents: Sequence) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Ids of the documents, one after the other; how many of them are whose; and what is odd about which.

    Args:
        documents: a list, or an arrow array.

    Raises:
        UnicodeDecodeError: the array's bytes are not UTF-8.
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
    """A process that tokenizes, at the other end of a pipe of its own."""

    def __init__(self, vocab_size: int):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, vocab_size), daemon=True)
        self.process.start()
        theirs.close()

    def tokenize(self, documents: Sequence) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        """`tokenize` over there. Raises what it raises, and SourceError when the process died."""
        try:
            _send(self.connection, documents)
            answer = _receive(self.connection)
            if isinstance(answer, UnicodeDecodeError):
                raise answer
            return answer
        except (EOFError, OSError) as error:
            self.process.join(5)  # its pipe ends a moment before it
            raise self.death() from error

    def death(self) -> SourceError:
        """What there is to say of a process that died."""
        code = self.process.exitcode
        cause = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
        return SourceError(
            f"a worker process died ({cause}); if memory ran out, take a smaller --num_proc; "
            "the same command goes on after the last whole shard"
        )


def _work(connection: Connection, vocab_size: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Windows none inherits it: see _interrupts_ignored
    tokenizer = Tokenizer(vocab_size=vocab_size)
    with suppress(EOFError, OSError):  # the parent has ended
        while True:
            try:
                answer = tokenize(tokenizer, _receive(connection))
            except UnicodeDecodeError as error:
                answer = error
            _send(connection, answer)


def _send(connection: Connection, message: object) -> None:
    """As `connection.send`, but texts and ids go as they lie there: in a pickle they would be copied once more."""
    buffers: list[pickle.PickleBuffer] = []
    connection.send((pickle.dumps(message, protocol=5, buffer_callback=buffers.append), len(buffers)))
    for buffer in buffers:
        connection.send_bytes(buffer.raw())


def _receive(connection: Connection) -> Any:
    message, num_buffers = connection.recv()
    return pickle.loads(message, buffers=[connection.recv_bytes() for _ in range(num_buffers)])


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ctrl-C reaches the whole process group, and this process alone answers it. Those that it starts meanwhile ignore
    it from their first moment; else they would show tracebacks of what they import. It is deaf for milliseconds."""
    if threading.current_thread() is not threading.main_thread():  # which alone may set this
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
    """`tokenize` over the source's batches from document number `first` on, in `num_proc` processes, in order.

    Args:
        num_proc: 1 works in this process.

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

    def in_a_worker(batch: Sequence) -> tuple:
        worker = idle.get()  # there is a thread for each
        try:
            return worker.tokenize(batch)
        finally:
            idle.put(worker)

    def look_after_workers() -> None:
        for worker in workers:
            if not worker.process.is_alive():
                raise worker.death()

    def result(future: Future) -> tuple:
        while not wait([future], timeout=1).done:
            look_after_workers()  # who works on a later batch may have died
        return future.result()

    threads = ThreadPoolExecutor(num_proc)
    ahead: deque[Future] = deque()
    try:
        with closing(read_ahead(source.read(first), 4)) as batches:
            for batch in batches:
                if batch is None:  # the source stalls
                    look_after_workers()
                else:
                    ahead.append(threads.submit(in_a_worker, batch))
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
