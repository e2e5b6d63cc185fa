"""Executes a plan: reads every input once, in pieces, and writes a folder that is complete or not there.

Memory is a few pieces for each thread, whatever the size and the number of models: elements come from mapped files,
rules are applied into one buffer that stays in the cache, and the buffer goes to its known place in a file that already
has its full size.
"""

import json
import os
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from toolkit.durable import sync
from toolkit.errors import Interrupted, MergeError, RunDirectoryError
from toolkit.merging.plan import MergePlan, tensor_readers
from toolkit.merging.streaming.compute import Computer, Findings, check_tensor
from toolkit.merging.streaming.digest_memory import DigestMemory
from toolkit.merging.streaming.input_digests import Digest, InputDigests
from toolkit.merging.streaming.inputs import allow_open_files, side_files, weights_files
from toolkit.merging.streaming.interruption import stop_request
from toolkit.merging.streaming.layout import Layout, lay_out
from toolkit.merging.streaming.output_folder import OutputFolder, refuse_inputs
from toolkit.merging.streaming.progress_file import PROGRESS_NAME, ProgressFile, digest_of, parameter_groups
from toolkit.merging.streaming.report import REPORT_NAME, Report, Seconds, group_facts, input_facts
from toolkit.merging.streaming.safetensors_file import CARRIER, FileIdentity
from toolkit.merging.streaming.verify import verify
from toolkit.merging.streaming.weights_writer import WeightsWriter
from toolkit.merging.streaming.work import Work
from toolkit_kernels import dispatch
from toolkit_kernels.pool import Pool


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How a plan is executed; what the result is, the plan says alone.

    Attributes:
        num_threads: None for one a core.
        backend: of kernels: auto, numba, torch or reference. They give the same bits.
        device: where methods compute that need whole tensors. Rules are applied on the CPU: they are faster than a bus.
        resume: go on with a merge that was killed; it must be the same in all that determines the result.
        verify: read the result again and compute a part of it with another backend, before it gets its name.
        overwrite: replace an existing folder when the new one is complete.
        non_finite: what NaN and infinity in an input are: an error, or kept and counted.
        max_shard_bytes: of tensors in one file.
        weights_name: of the file, without its ending: ``model`` or ``adapter_model``.
        hash_inputs: SHA-256 of every input file, for the report.
        digest_memory: file in which these are remembered, so that a file that has not changed is not hashed again; None
            to compute and keep none. With ``verify`` all are computed.
        record_seconds: at least this long between two records of what is finished; 0 records all the time.
        on_progress: called, from any thread, with the bytes of the result that are written so far.
    """

    num_threads: int | None = None
    backend: str = "auto"
    device: str = "cpu"
    resume: bool = False
    verify: bool = False
    overwrite: bool = False
    non_finite: Literal["error", "keep"] = "error"
    max_shard_bytes: int = 5_000_000_000
    weights_name: str = "model"
    hash_inputs: bool = True
    digest_memory: Path | None = None
    record_seconds: float = 10.0
    on_progress: Callable[[int], None] | None = None


def execute(plan: MergePlan, out: Path, options: EngineOptions | None = None) -> Report:
    """Merge into the folder ``out``.

    Raises:
        ModelError: an input is damaged, or holds NaN or infinity.
        MergeError: the result is not finite, a file changed meanwhile, the disk is full, --verify found a difference.
        RunDirectoryError: ``out`` is an input, exists, or has no room.
        Interrupted: SIGINT or SIGTERM; the merge can be resumed.
    """
    options = options or EngineOptions()
    started = time.perf_counter()
    for tensor in plan.tensors:
        check_tensor(tensor)
    inputs, beside = weights_files(plan), side_files(plan)
    refuse_inputs(out, [*(identity.path for identity in (*inputs, *beside)), *plan.depends_on])
    memory = None if options.digest_memory is None else DigestMemory(options.digest_memory)
    hashed = inputs if options.hash_inputs else []
    with (
        Pool(options.num_threads) as pool,
        InputDigests(hashed, pool.num_threads, memory, recall=not options.verify) as input_digests,
        stop_request() as stop,
    ):
        layout = lay_out(plan.tensors, options.max_shard_bytes, options.weights_name)
        allow_open_files(inputs, len(layout.shards))
        digest = digest_of(plan, layout, inputs, beside, device=options.device, non_finite=options.non_finite)
        with OutputFolder(out, digest, overwrite=options.overwrite) as folder:
            run = _Run(plan, layout, folder, inputs, beside, input_digests, pool, stop, options, digest)
            return run.do(started)


def _failure(error: BaseException, staged: Path) -> BaseException:
    """What the user is told: an error of the operating system names its file."""
    if not isinstance(error, OSError):
        return error
    failed = MergeError(f"{error.filename or staged}: {error.strerror or error}")
    failed.__cause__ = error
    return failed


class _Run:
    """One execution, from the staging folder to the commit."""

    def __init__(
        self,
        plan: MergePlan,
        layout: Layout,
        folder: OutputFolder,
        inputs: Sequence[FileIdentity],
        beside: Sequence[FileIdentity],
        input_digests: InputDigests,
        pool: Pool,
        stop: Callable[[], None],
        options: EngineOptions,
        digest: str,
    ) -> None:
        self.plan, self.layout, self.folder = plan, layout, folder
        self.inputs, self.beside, self.input_digests = inputs, beside, input_digests
        self.pool, self.stop, self.options = pool, stop, options
        self.seconds = Seconds()
        self.findings = Findings()
        self.computer = Computer(
            dispatch.backend(options.backend, "cpu"),
            seed=plan.seed,
            device=options.device,
            non_finite=options.non_finite,
        )
        group_of, self.groups = parameter_groups(layout.places)
        self.writer = WeightsWriter(folder.staged, layout, keeps_checksums=options.verify)
        self.progress = ProgressFile(folder.staged, digest, self.writer.sync, seconds=options.record_seconds)
        self.todo = layout.places
        self.resumed = False
        self.notes: list[str] = []
        self.work = Work(self.computer, self.writer, self.progress, group_of, stop, options.on_progress)

    def do(self, started: float) -> Report:
        """All of it; ``started`` is when planning did."""
        try:
            self.prepare()
            self.seconds.planning = time.perf_counter() - started
            self.merge()
            return self.finish(started)
        except (Interrupted, KeyboardInterrupt):
            raise
        except BaseException as error:
            failed = _failure(error, self.folder.staged)
            self.leave(failed)
            raise failed from failed.__cause__
        finally:
            self.close()

    def prepare(self) -> None:
        """The staging folder with files of full size, headers and companions."""
        staged, leftovers = self.folder.staged, self.folder.leftovers()
        known = self.progress.read() if self.options.resume and staged in leftovers else None
        if known is not None and self.writer.reopen():
            ranges, self.findings = known
            finished = {index for first, last in ranges for index in range(first, last)}
            self.todo = [place for place in self.layout.places if place.index not in finished]
            self.resumed = True
            leftovers.remove(staged)
            self.folder.keep_only([*self.writer.paths, staged / PROGRESS_NAME])
        elif self.options.resume and leftovers:
            self.notes.append(
                "the unfinished merge was of other inputs or settings, or had not begun: begun anew"
            )
        elif self.options.resume:
            self.notes.append("there was no unfinished merge to resume: begun anew")
        self.folder.discard(leftovers)
        if not self.resumed:
            self.folder.check_space(self.layout.num_bytes)
            staged.mkdir(mode=0o755)
            self.writer.create()
        self.progress.open()
        self.plan.write_companions(staged)

    def merge(self) -> None:
        """Compute and write every tensor that is not there yet."""
        started = time.perf_counter()
        try:
            self.work.do(self.layout.places, self.todo, self.pool)
        except (Interrupted, KeyboardInterrupt):
            self.progress.flush()
            raise
        self.findings.add(self.work.findings)
        self.seconds.merging = time.perf_counter() - started

    def finish(self, started: float) -> Report:
        """Sync, wait for digests, verify, report, commit."""
        staged = self.folder.staged
        if self.layout.index is not None:
            (staged / self.layout.index_name).write_text(
                json.dumps(self.layout.index, indent=2), encoding="utf-8"
            )
        self._sync_weights()
        digests = self.input_digests.results(self.stop)
        self.seconds.hashing = self.input_digests.seconds
        for identity in (*self.inputs, *self.beside):
            identity.check()
        verified = None
        if self.options.verify:
            before = time.perf_counter()
            verified = verify(
                staged, self.layout, self.plan, self.writer.written, self.computer, self.pool, self.stop
            )
            if self.resumed:
                self.notes.append(
                    "what was written before the merge was resumed was computed again in a sample only"
                )
            self.seconds.verifying = time.perf_counter() - before
        self.stop()
        self.seconds.total = time.perf_counter() - started
        report = self._report(digests, verified)
        (staged / REPORT_NAME).write_text(report.as_json(), encoding="utf-8")
        self.folder.refuse_existing()  # here and not only there, as the record is still kept
        self._sync_companions()
        self.folder.commit()
        return report

    def _sync_weights(self) -> None:
        started = time.perf_counter()
        self.writer.sync()
        self.progress.flush()
        self.seconds.syncing = time.perf_counter() - started

    def _sync_companions(self) -> None:
        """Everything beside the weights durable, and readable by whom the umask lets read."""
        self.progress.remove()
        staged = self.folder.staged
        mode = stat.S_IMODE(os.stat(self.writer.paths[0]).st_mode)  # what the umask leaves of 0644
        found = sorted(staged.rglob("*"))
        folders = [staged, *(path for path in found if path.is_dir())]
        files = [path for path in found if path not in {*folders, *self.writer.paths}]
        for path in files:
            os.chmod(path, mode)
        for together in (files, folders):  # several at a time share one entry in a journal of the file system
            self.pool.map(sync, together)

    def _report(self, digests: dict[Path, Digest], verified: Any) -> Report:
        plan, seconds = self.plan, self.seconds
        moved = sum(
            place.num_bytes
            + place.tensor.size * sum(CARRIER[r.dtype].itemsize for r in tensor_readers(place.tensor))
            for place in self.todo
        )
        return Report(
            out=self.folder.path,
            method=plan.method,
            seed=plan.seed,
            settings=plan.settings,
            inputs=input_facts(plan, digests),
            outputs=[
                {
                    "name": shard.name,
                    "num_bytes": shard.num_bytes,
                    "sha256": verified.sha256[shard.name] if verified else None,
                }
                for shard in self.layout.shards
            ],
            groups=group_facts(self.groups, self.findings),
            non_finite=self.findings.non_finite,
            bytes_read=plan.bytes_read,
            bytes_written=plan.bytes_written,
            gigabytes_per_second=round(moved / max(seconds.merging, 1e-9) / 1e9, 3),
            seconds=seconds,
            backend=self.computer.backend.name,
            device=self.options.device,
            num_threads=self.pool.num_threads,
            resumed=self.resumed,
            verified=verified,
            notes=[*plan.notes, *self.notes],
        )

    def leave(self, error: BaseException) -> None:
        """After a failure of the disk or the output's name keep what is finished; one of the inputs leaves nothing."""
        is_curable = isinstance(error, RunDirectoryError) or (
            isinstance(error, MergeError) and isinstance(error.__cause__, OSError)
        )
        if is_curable and self.progress.save():
            assert isinstance(error, MergeError | RunDirectoryError)
            hint = f"{error.hint}; " if error.hint else ""
            error.hint = f"{hint}--resume goes on with what is finished"
        elif self.folder.staged.exists():
            self.folder.discard([self.folder.staged])

    def close(self) -> None:
        self.progress.close()
        self.writer.close()
