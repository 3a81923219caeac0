"""An application that is planned and run from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samullm_plugin.api.description import Description
from samullm_plugin.api.nodes import Node, Part, node_name
from samullm_plugin.errors import InputError, SamullmError

if TYPE_CHECKING:
    from samullm_plugin.api.plans import AppPlan, Comparison
    from samullm_plugin.api.runs import AppRun
    from samullm_plugin.api.tasks import Task
    from samullm_plugin.run.preview import PreviewedRequest


class App(Description):
    """An application: models, and nodes that use them.

    Example:
        >>> import samullm_plugin as sl
        >>> app = sl.App("answers", models={"a": "Qwen/Qwen3-4B", "j": "Qwen/Qwen3-8B"})
        >>> answer = app.llm("answer", model="a", data=[{"prompt": "Why?"}], max_tokens=64)
        >>> rate = app.llm("rate", model="j", for_each=answer, prompt="{{ output }}", max_tokens=8)

    Attributes:
        name: of the application.
        folder: what relative paths start from.
    """

    def plan(
        self,
        *,
        gpus: int | None = None,
        scheduler: Part | None = None,
        scheduler_options: Mapping[str, Any] | None = None,
        length_estimator: Part | None = None,
        latency_model: Part | None = None,
        scenarios: int | None = None,
        seed: int | None = None,
        budget_s: float | None = None,
        fusion: bool | None = None,
        limit: int | None = None,
        executor: Part | None = None,
        reuse: str | Path | AppRun = "cache",
        fresh: Sequence[Node | str] = (),
    ) -> AppPlan:
        """Plan: which models run when, on which devices, spread how.

        Args:
            gpus: number of GPUs, instead of the application's cluster.
            scheduler: its name, class or an instance; None: the application's.
            scheduler_options: its options.
            length_estimator: where output lengths come from; None: the application's.
            latency_model: where iteration times come from; None: the application's.
            scenarios: length scenarios to plan for.
            seed: of lengths and scheduler.
            budget_s: seconds the scheduler may search.
            fusion: serve nodes of one model that follow one another with the same engines.
            limit: take no more rows than this of each table.
            executor: what the plan is for; None: the application's.
            reuse: where outputs of equal requests are taken from, which are not asked again:
                ``cache`` (the user's store), ``off``, or an earlier run or its directory.
            fresh: nodes that are asked again in any case.

        Raises:
            InputError: if the input is wrong.
            PlanError: if no valid plan was found.
        """
        from samullm_plugin.api.plans import make_app_plan

        changes = self.plugins.planner(
            {
                "scheduler": scheduler,
                "length_estimator": length_estimator,
                "latency_model": latency_model,
                "scenarios": scenarios,
                "seed": seed,
                "budget_s": budget_s,
                "fusion": fusion,
            }
        )
        from samullm_plugin.run.reuse import ReuseOptions

        part = None if executor is None else self.plugins.component("executor", executor)
        nodes = tuple(node_name(n, "app.plan: fresh") for n in fresh)
        options = ReuseOptions(str(getattr(reuse, "directory", reuse)), nodes)
        return make_app_plan(self, changes, scheduler_options, gpus, limit, options, part)

    def start_plan(self, **options: Any) -> Task[AppPlan]:
        """Plan in the background; options as of :meth:`plan`."""
        from samullm_plugin.api.tasks import Task

        return Task(lambda: self.plan(**options), f"plan of {self.name}")

    def run(
        self,
        plan: AppPlan | None = None,
        output_dir: str | Path | None = None,
        **options: Any,
    ) -> AppRun:
        """Run to the end; Ctrl-C (in a notebook: interrupt) stops it so that it can be resumed.

        Args:
            plan: what :meth:`plan` made; None: it is planned first.
            output_dir: new directory of the run; None: the next free number in ``runs/NAME``.
            options: as of :meth:`start`.

        Raises:
            InputError: if the input is wrong; nothing was started then.
            RunError: if the run failed after it had started.
            KeyboardInterrupt: after it was interrupted and everything had been written.
        """
        running = self.start(plan, output_dir, **options)
        running.watch()
        return running

    def start(
        self,
        plan: AppPlan | None = None,
        output_dir: str | Path | None = None,
        *,
        executor: Part | None = None,
        executor_options: Mapping[str, Any] | None = None,
        replan: bool = True,
        gpus: int | None = None,
        limit: int | None = None,
        reuse: str | Path | AppRun | None = None,
        fresh: Sequence[Node | str] | None = None,
    ) -> AppRun:
        """Run in the background: ``run.wait()``, ``await run``, ``run.add_done_callback``.

        Args:
            plan: what :meth:`plan` made; None: it is planned first.
            output_dir: new directory of the run; None: the next free number in ``runs/NAME``.
            executor: ``vllm``, ``simulated``, ``emulated``, a class or an instance; None: the
                application's.
            executor_options: its options.
            replan: plan again when lengths or latencies are not as expected.
            gpus: number of GPUs, where there is no plan yet.
            limit: take no more rows than this of each table, where there is no plan yet.
            reuse: as of :meth:`plan`, where there is no plan yet.
            fresh: as of :meth:`plan`, where there is no plan yet.

        Raises:
            InputError: if the input is wrong.
        """
        from samullm_plugin.api.plans import AppPlan
        from samullm_plugin.api.runs import AppRun

        given: dict[str, Any] = {"gpus": gpus, "limit": limit, "reuse": reuse, "fresh": fresh}
        given = {n: v for n, v in given.items() if v is not None}
        if plan is not None and given:
            names = ", ".join(given)
            raise InputError(f"app.run: {names}: this belongs to the plan; give it to app.plan")
        if plan is not None and not isinstance(plan, AppPlan):
            raise InputError(
                f"app.run: the plan is a {type(plan).__name__}; give what app.plan gave"
            )
        made = self.plan(executor=executor, **given) if plan is None else plan
        part = (
            made.loaded.executor
            if executor is None
            else self.plugins.component("executor", executor)
        )
        return AppRun.begin(made, output_dir, part, executor_options, replan=replan)

    def preview(self, node: Node | str | None = None, rows: int = 3) -> list[PreviewedRequest]:
        """Return the requests of the first rows as engines would be asked them.

        Outputs of other nodes are their ``sample``, or stand-ins in angle brackets.

        Args:
            node: only this node; None: all.
            rows: rows of each table.

        Raises:
            InputError: if the input is wrong.
        """
        from samullm_plugin.run.preview import previewed, with_stand_ins

        loaded = self.load(rows)
        samples = {n: s.sample for n, s in self._nodes.items() if isinstance(s.sample, str)}
        only = None if node is None else node_name(node, "app.preview: node")
        return list(previewed(*with_stand_ins(loaded, samples), only, loaded))

    def answered(
        self,
        rows: int = 3,
        *,
        executor: Part = "vllm",
        output_dir: str | Path | None = None,
        gpus: int | None = None,
    ) -> list[PreviewedRequest]:
        """Return the requests of the first rows with what the models answer, all nodes included.

        Args:
            rows: rows of each table.
            executor: what generates.
            output_dir: directory of the run; None: none is kept.
            gpus: instead of the application's cluster.

        Raises:
            InputError: if the input is wrong.
            RunError: if the run failed.
        """
        from tempfile import TemporaryDirectory

        from samullm_plugin.run.journal import JournalReader, read_journal_places
        from samullm_plugin.run.preview import previewed
        from samullm_plugin.run.recovery import recover

        plan = self.plan(
            gpus=gpus, limit=rows, executor=executor, scheduler="max-heuristic", scenarios=1,
            fusion=False,
        )  # fmt: skip
        with TemporaryDirectory(prefix="samullm-preview-") as temporary:
            target = Path(temporary) / "run" if output_dir is None else Path(output_dir)
            self.run(plan, target, executor=executor)
            path = target / "events.jsonl"
            journal = JournalReader(path)
            try:
                found = recover(plan.loaded.app, read_journal_places(path), str(path), journal.read)
                return list(previewed(plan.loaded, found.resume.ledger))
            finally:
                journal.close()

    def resume(self, output_dir: str | Path, *, plan: AppPlan | None = None) -> AppRun:
        """Go on with an interrupted run, to its end.

        Args:
            output_dir: directory of the run.
            plan: anything that :meth:`plan` made; only its figures are used. None: it is made.

        Raises:
            InputError: if the folder holds no run of this application.
        """
        from samullm_plugin.api.runs import AppRun

        running = AppRun.resume(self, Path(output_dir), plan)
        running.watch()
        return running

    def __repr__(self) -> str:
        """Return name, models and nodes."""
        return f"App({self.name!r}, nodes={list(self._nodes)})"


def compare(
    app: App,
    schedulers: Sequence[Any] = ("auto", "greedy", "exact", "max-heuristic", "min-heuristic"),
    **options: Any,
) -> Comparison:
    """Plan one application with several schedulers.

    Args:
        app: the application.
        schedulers: names, classes or instances.
        options: as of :meth:`App.plan`.

    Returns:
        A table, the shortest makespan first; ``comparison.best`` can be run.

    Raises:
        InputError: for an unknown scheduler or wrong input.
        SamullmError: if none of them made a plan.
    """
    names = [app.plugins.scheduler_name(s) for s in schedulers]
    if not names:
        raise InputError("compare: it names no schedulers")
    from samullm_plugin.api.plans import Comparison

    plans: dict[str, AppPlan] = {}
    failed: dict[str, str] = {}
    for name in dict.fromkeys(names):
        try:
            plans[name] = app.plan(scheduler=name, **options)
        except SamullmError as error:
            if error.exit_code == 2 and not plans and not failed:
                raise  # wrong input is no fault of a scheduler
            failed[name] = str(error)
    if not plans:
        reasons = "; ".join(f"{n}: {why}" for n, why in failed.items())
        raise SamullmError(f"no scheduler made a plan: {reasons}")
    ordered = sorted(plans.items(), key=lambda pair: pair[1].makespan_s)
    return Comparison(dict(ordered), failed)
