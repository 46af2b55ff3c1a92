"""A data set of the Hugging Face hub as a part of a source: read from copies on the disk, or over the network."""

import math
import sys
import time
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path

from hub import DatasetName, HubFile, download, error_reason, failure, is_final, open_stream, reach_hub, resolve
from readers import Batch, Reader, file_format, named_damage, read_ahead
from rows import ReadOptions, SourceError

# 9,672,101 documents in 14 parquet files of 28.5 GB, about 10 billion tokens with Llama 3's whole vocabulary
FINEWEB = DatasetName("HuggingFaceFW/fineweb-edu", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9", folder="sample/10BT")
BYTES_A_TOKEN = {".parquet": 2.85, "": 4.4}  # FineWeb-Edu's parquet files; other files hold text as it is
RETRY_SECONDS = (1, 2, 4, 8, 16, 32)  # pauses after attempts that bring no new document; after the last, give up


class HubDataset:
    """A data set of the Hugging Face hub.

    If its client gives up, this class pauses and goes on after the last document. The pauses grow.
    """

    def __init__(self, dataset: DatasetName, stream: bool, pin: dict | None = None):
        self.dataset, self.stream, self.pin = dataset, stream, pin
        self.name = self.place = str(dataset)
        words = [dataset.repository.split("/")[1], *dataset.folder.split("/"), dataset.config, dataset.split]
        self.label = "-".join(word for word in words if word and word != "train")
        if dataset == FINEWEB:
            self.label = "fineweb-edu-10BT"

    @cached_property
    def _resolved(self) -> tuple[str, list[HubFile]]:
        if self.pin:
            return self.pin["commit"], [HubFile(*file) for file in self.pin["files"]]
        try:
            return resolve(self.dataset)
        except Exception as error:  # huggingface_hub, datasets, httpx and requests have no common error class
            raise failure(self.dataset, error) from error

    @property
    def revision(self) -> str:
        return self._resolved[0]

    @property
    def files(self) -> list[HubFile]:
        return self._resolved[1]

    def check(self, options: ReadOptions) -> None:
        """Raises SourceError if the hub cannot be reached, or --stream is set offline."""
        from huggingface_hub import constants

        if self.stream and constants.HF_HUB_OFFLINE:
            raise SourceError(
                f"{self.name}: --stream needs the network, but HF_HUB_OFFLINE is set; leave one of them out"
            )
        try:
            reach_hub()
        except Exception as error:  # as in _resolved
            raise failure(self.dataset, error) from error

    def batches(self, reader: Reader) -> Iterator[Batch]:
        reader.digest.update(f"{self.name} {self.revision}".encode())
        skip, bad_rows, pauses = reader.skip, reader.bad_rows, iter(RETRY_SECONDS)
        while True:
            try:
                for batch in self._batches(reader):
                    yield batch
                    skip, bad_rows = skip + len(batch.documents), reader.bad_rows
                    pauses = iter(RETRY_SECONDS)
                return
            except SourceError:
                raise
            except Exception as error:  # as in _resolved; fsspec and pyarrow have others
                pause = None if is_final(error) else next(pauses, None)
                if pause is None:
                    raise failure(self.dataset, error) from error
                print(f"{self.dataset.repository}: {error_reason(error)}; trying again in {pause} s", file=sys.stderr)
                time.sleep(pause)
                reader.skip, reader.bad_rows = skip, bad_rows

    def _batches(self, reader: Reader) -> Iterator[Batch]:
        files = list(self.files)
        while files and reader.skip and (rows := self._num_rows(files[0])) is not None and reader.skip >= rows:
            reader.skip -= rows
            del files[0]
        open_remote = partial(open_stream, self.dataset, self.revision)
        if self.stream:
            for file in files:
                yield from reader.read(self._title(file), partial(open_remote, file), None)
            return
        # The thread of read_ahead downloads the next file while this one is read.
        paths = filter(None, read_ahead(map(partial(download, self.dataset, self.revision), files), 1))
        for file, path in zip(files, paths, strict=True):
            with named_damage(self._title(file)):  # the file came whole, so another attempt would not help
                yield from reader.read(self._title(file), partial(open, path, "rb"), None)

    def _title(self, file: HubFile) -> str:
        return f"{self.dataset.repository}/{file.path}"

    def _num_rows(self, file: HubFile) -> int | None:
        """The number of rows in the footer of a parquet file, so that the file need not be downloaded. Else None."""
        import pyarrow.parquet
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE or file_format(file.path) != (".parquet", ""):
            return None
        with open_stream(self.dataset, self.revision, file) as remote:
            return pyarrow.parquet.read_metadata(remote).num_rows

    def disk_needed(self, max_tokens: int | None) -> tuple[list[tuple[Path, int]], int]:
        """What a run until `max_tokens` (None: all) needs: pairs of a folder and bytes to be downloaded; and tokens."""
        from huggingface_hub import constants, try_to_load_from_cache

        expected = sum(
            file.size / BYTES_A_TOKEN.get(file_format(file.path)[0], BYTES_A_TOKEN[""]) for file in self.files
        )
        tokens = int(min(max_tokens or math.inf, expected))
        if self.stream:
            return [], tokens
        files = self.files[: math.ceil(tokens / max(1, expected) * len(self.files)) + 2]  # +2: one waits, one is coming
        cached = {"repo_id": self.dataset.repository, "revision": self.revision, "repo_type": "dataset"}
        missing = [file for file in files if not try_to_load_from_cache(filename=file.path, **cached)]
        return [(Path(constants.HF_HUB_CACHE), sum(file.size for file in missing))], tokens


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one; there is nothing to run here.")
