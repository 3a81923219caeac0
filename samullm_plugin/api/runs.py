"""A run as Python sees it: followed while it goes on, and its results as tables."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from samullm_plugin.api.description import Description
from samullm_plugin.api.plans import AppPlan, html_table, planned_again
from samullm_plugin.api.run_table import RunTable
from samullm_plugin.api.tasks import Task
from samullm_plugin.app.spec import Component
from samullm_plugin.errors import InputError
from samullm_plugin.host.interfaces.observer import RunEvent
from samullm_plugin.planning.artifacts import read_plan
from samullm_plugin.run.display import RunDisplay
from samullm_plugin.run.journal import read_journal
from samullm_plugin.run.progress import RunProgress
from samullm_plugin.run.replanning import Replanner
from samullm_plugin.run.rows import RunRows
from samullm_plugin.run.run import RunOutcome, require_resumable, resume_run, start_run
from samullm_plugin.run.setup import RunSetup
from samullm_plugin.run.table_files import TableFormat

if TYPE_CHECKING:
    from samullm_plugin.run.coordinator import Coordinator

REDRAW_EVERY_S = 0.5


class AppRun:
    """A run of an application, going on or over, or read from its directory with :meth:`open`.

    Attributes:
        directory: its files.
    """

    def __init__(self, directory: str | Path) -> None:
        """Read a run from its directory; :meth:`begin` and :meth:`resume` start one."""
        self.directory = Path(directory)
        self._task: Task[RunOutcome] | None = None
        self._progress: RunProgress | None = None
        self._display: RunDisplay | None = None
        self._coordinator: Coordinator | None = None
        self._cancelled = False

    # Beginning

    @classmethod
    def open(cls, directory: str | Path) -> AppRun:
        """Return a run, of this process or another, to read its results.

        Raises:
            InputError: if the folder holds no run.
        """
        if not (Path(directory) / "run.json").is_file():
            raise InputError(f"{directory}: holds no run (there is no run.json)")
        return cls(directory)

    @classmethod
    def begin(
        cls,
        plan: AppPlan,
        output_dir: str | Path | None,
        executor: Component,
        executor_options: Mapping[str, Any] | None,
        *,
        replan: bool,
    ) -> AppRun:
        """Start a run in the background; arguments as of :meth:`App.start`."""
        run = cls(output_dir if output_dir is not None else _next_directory(plan.loaded.app.name))
        if (run.directory / "run.json").exists():
            raise InputError(
                f"{run.directory}: holds a run already; continue it with app.resume"
                f"({str(run.directory)!r}), or give another output_dir"
            )
        setup = run._setup(plan, executor, executor_options, replan=replan)
        run._task = Task(
            lambda: start_run(setup, plan.plan, plan.scheduler), f"run in {run.directory}"
        )
        return run

    @classmethod
    def resume(cls, app: Description, directory: Path, plan: AppPlan | None) -> AppRun:
        """Go on with an interrupted run in the background; arguments as of :meth:`App.resume`."""
        executor = require_resumable(directory)
        path = directory / "plan.json"
        stored = read_plan(path)
        if plan is None or plan.instance.problem.app.fused != stored.fused:
            plan = planned_again(app, directory)
        made, chosen = plan, stored.request_policy
        made = replace(made, instance=made.instance.with_stored_policy(app.host, chosen, path))
        run = cls(directory)
        options = None
        if executor == made.loaded.executor.type:
            options = made.loaded.executor.options
        setup = run._setup(made, Component(type=executor), options, replan=True)
        run._task = Task(lambda: resume_run(setup), f"run in {directory}")
        return run

    def _setup(
        self,
        plan: AppPlan,
        part: Component,
        executor_options: Mapping[str, Any] | None,
        *,
        replan: bool,
    ) -> RunSetup:
        default = plan.loaded.executor
        options = dict(part.options)
        if executor_options is not None:
            options = dict(executor_options)
        elif part.type == default.type and not options:
            options = dict(default.options)
        plan.app.host.resolve("executor", part.type)
        problem = plan.instance.problem
        self._progress = RunProgress(problem.app, plan.result.traces)
        self._display = RunDisplay(self._progress, quiet=True)  # until somebody watches
        return RunSetup(
            plan.app.host,
            plan.loaded,
            plan.instance,
            part.type,
            self.directory,
            options,
            replanner=Replanner(plan.app.host, plan.instance) if replan else None,
            listener=self._display.take,
            on_start=self._started,
            reuse=plan.reuse,
            remaining=None if plan.known is None else plan.known.problem,
        )

    def _started(self, coordinator: Coordinator) -> None:
        assert self._progress is not None
        self._coordinator = coordinator
        self._progress.take_up(coordinator.ledger, coordinator.now_s)
        if self._cancelled:
            coordinator.request_drain()

    # Following

    def done(self) -> bool:
        """Return whether it goes on no more."""
        return self._task is None or self._task.done()

    def wait(self, timeout_s: float | None = None) -> Self:
        """Wait for the end.

        Raises:
            TimeoutError: if it has not ended by then; it goes on.
            InputError: if the input was wrong; nothing was started then.
            RunError: if the run failed after it had started.
        """
        if self._task is not None:
            self._task.wait(timeout_s)
        return self

    def __await__(self) -> Generator[Any, None, Self]:
        """Wait in a coroutine."""
        if self._task is not None:
            yield from self._task.__await__()
        return self

    def add_done_callback(self, callback: Callable[[Self], object]) -> None:
        """Call ``callback`` with this run at its end, in its thread; at once if it is over."""
        if self._task is None:
            callback(self)
        else:
            self._task.add_done_callback(lambda task: callback(self))

    def cancel(self) -> None:
        """Stop at the next opportunity; what was generated is kept, and it can be resumed."""
        self._cancelled = True
        if self._coordinator is not None:
            self._coordinator.request_drain()

    @property
    def interrupted(self) -> bool:
        """Return whether it was stopped before its end, so that it can be resumed."""
        return self._outcome().drained if self._task is not None else not self._finished()

    def events(self) -> Iterator[RunEvent]:
        """Yield every event of the run from its beginning, and go on until it is over."""
        path = self.directory / "events.jsonl"
        while not path.exists():
            if self.done():
                return
            time.sleep(0.05)
        with path.open("rb") as file:
            rest = b""
            while True:
                over = self.done()
                while line := file.readline():
                    rest += line
                    if rest.endswith(b"\n"):
                        record = json.loads(rest)
                        rest = b""
                        time_s, kind = float(record.pop("time_s")), str(record.pop("kind"))
                        yield RunEvent(time_s, kind, record)
                if over:
                    return
                time.sleep(0.05)

    def watch(self) -> None:
        """Show the progress until the end; an interruption stops the run so that it can go on.

        Raises:
            KeyboardInterrupt: after it was interrupted and everything had been written.
            SamullmError: as :meth:`wait`.
        """
        try:
            with self._shown():
                self.wait()
        except KeyboardInterrupt:
            self.cancel()
            sys.stderr.write("samullm: stopping; once more to stop at once\n")
            self.wait()
            sys.stderr.write(f"samullm: interrupted; app.resume({str(self.directory)!r}) goes on\n")
            raise

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """Show the progress on a terminal, in a notebook, or in lines."""
        if self._task is None or self._display is None:
            yield
            return
        display = self._display
        if _in_notebook():
            from IPython import display as jupyter

            draw: Any = jupyter
            handle = draw.display(draw.HTML(self._html()), display_id=True)
            while not self._task.done():
                time.sleep(REDRAW_EVERY_S)
                handle.update(draw.HTML(self._html()))
            yield
            return
        display.quiet = False
        with display:
            yield

    # Results

    def _outcome(self) -> RunOutcome:
        assert self._task is not None
        if not self._task.done():
            raise InputError(f"{self.directory}: the run goes on; wait() for it first")
        return self._task.wait()

    def _finished(self) -> bool:
        return (self.directory / "metrics.json").is_file() and not any(
            r["kind"] == "drained" for r in self._tail()
        )

    def _tail(self) -> list[dict[str, Any]]:
        last: dict[str, Any] = {}
        for record in read_journal(self.directory / "events.jsonl"):
            last = record
        return [last] if last else []

    @property
    def metrics(self) -> Mapping[str, Any]:
        """Return its figures, planned and measured: ``metrics.json``.

        Raises:
            InputError: while it goes on.
        """
        if self._task is not None:
            return self._outcome().metrics
        path = self.directory / "metrics.json"
        if not path.is_file():
            raise InputError(f"{self.directory}: the run has no metrics.json: it has not ended")
        found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    @property
    def makespan_s(self) -> float:
        """Return when the last request finished."""
        return float(self.metrics["makespan_s"]["measured"])

    @property
    def failed(self) -> list[tuple[str, str, str]]:
        """Return the requests that failed, as (node, id, reason)."""
        if self._task is not None:
            return list(self._outcome().failed)
        rows = RunRows(self.directory)
        try:
            rows.advance()
            return list(rows.failed())
        finally:
            rows.close()

    def table(self, columns: Sequence[str] = (), rows: str | None = None) -> RunTable:
        """Return the joined table, of a run that goes on as far as it has got.

        Args:
            columns: ``id``, input fields, nodes, ``node.field``, ``node.error``; empty: everything.
            rows: a node: one row per request of it; None: one row per item.

        Raises:
            InputError: for a column or node that is not there.
        """
        return RunTable(self.directory, tuple(columns), rows)

    def to_arrow(self) -> Any:
        """Return the joined table as a ``pyarrow.Table``."""
        return self.table().to_arrow()

    def to_pandas(self) -> Any:
        """Return the joined table as a data frame."""
        return self.table().to_pandas()

    def save(self, path: str | Path, format: TableFormat | None = None) -> Path:
        """Write the joined table as Parquet, CSV or JSON lines, in bounded memory."""
        return self.table().save(path, format)

    def report(self, path: str | Path | None = None) -> Path:
        """Write the report, one HTML page; by default ``report.html`` in the run's directory."""
        from samullm_plugin.run.report import read_run, write_report

        target = Path(path) if path is not None else self.directory / "report.html"
        write_report(read_run(self.directory), target)
        return target

    def _state(self) -> str:
        if self._task is None:
            return "read from its directory"
        if not self._task.done():
            progress = "" if self._display is None else f", {self._display.summary()}"
            return f"goes on{progress}"
        try:
            outcome = self._task.wait()
        except Exception as error:
            return f"failed: {error}"
        if outcome.drained:
            return "interrupted, can be resumed"
        failed = f", {len(outcome.failed)} requests failed" if outcome.failed else ""
        return f"finished after {outcome.metrics['makespan_s']['measured']:.1f} s{failed}"

    def __repr__(self) -> str:
        """Return directory and state."""
        return f"AppRun({str(self.directory)!r}: {self._state()})"

    def _html(self) -> str:
        head = f"<p><b>{escape(str(self.directory))}</b>: {escape(self._state())}</p>"
        if self._progress is None:
            return head
        rows = [
            (
                n.name,
                f"{n.settled:,} of {n.total:,}",
                f"{n.failed:,}" if n.failed else "",
                "" if (rate := n.tokens_per_s(self._progress.now_s)) is None else f"{rate:,.0f}",
            )
            for n in self._progress.nodes
        ]
        return head + html_table(("node", "requests", "failed", "tokens/s"), rows)

    def _repr_html_(self) -> str:
        return self._html()


def _next_directory(name: str) -> Path:
    """Return the first folder ``runs/NAME/N`` that is not there."""
    base, number = Path("runs") / name, 1
    while (base / str(number)).exists():
        number += 1
    return base / str(number)


def _in_notebook() -> bool:
    """Return whether output goes to a Jupyter notebook."""
    if "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return type(shell).__name__ == "ZMQInteractiveShell"
