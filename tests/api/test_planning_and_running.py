"""Planning and running from Python: figures, background, coroutines, events, results."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import samullm_plugin as sl


def application(count: int = 30, **options: Any) -> sl.App:
    app = sl.App(
        "answers",
        {"a": "THUDM/chatglm3-6b", "j": "lmsys/vicuna-13b-v1.5"},
        cluster={"gpus": 2},
        **options,
    )
    rows = [{"id": f"q{k}", "prompt": f"question {k}"} for k in range(count)]
    answer = app.llm("answer", model="a", data=rows, max_tokens=60)
    app.llm("rate", model="j", for_each=answer, prompt="{{ prompt }} {{ output }}", max_tokens=60)
    return app


@pytest.fixture(scope="module")
def plan() -> sl.AppPlan:
    return application().plan(scheduler="max-heuristic")


def test_a_plan(plan: sl.AppPlan, tmp_path: Path) -> None:
    assert plan.scheduler == "max-heuristic"
    assert 0 < plan.lower_bound_s <= plan.makespan_s
    assert plan.num_requests == 60
    assert "GPU 1" in plan.gantt()
    assert "answers on 2 GPUs by max-heuristic" in repr(plan)
    assert "<table>" in plan._repr_html_()
    assert any("chatglm3-6b" in line for line in plan.rests_on)
    assert plan.save(tmp_path / "plan.json").is_file()


def test_a_run_and_its_tables(plan: sl.AppPlan, tmp_path: Path) -> None:
    run = plan.app.run(plan, tmp_path / "run")
    assert run.done()
    assert not run.interrupted
    assert run.failed == []
    assert run.makespan_s > 0
    kinds = [e.kind for e in run.events()]
    assert kinds[0] == "plan"
    assert kinds.count("finished") == 60
    frame = run.to_pandas()
    assert list(frame.columns) == [
        "id", "prompt", "answer", "answer.error", "rate", "rate.error",
    ]  # fmt: skip
    assert frame["id"].tolist() == [f"q{k}" for k in range(30)]
    table = run.table(["id", "answer.completion_tokens"], rows="rate")
    assert len(table) == 30
    assert all(row["answer.completion_tokens"] > 0 for row in table)
    assert run.save(tmp_path / "out.csv").read_text().startswith('"id","prompt"')
    assert "finished after" in repr(run)
    assert "<td>rate</td>" in run._repr_html_()
    again = sl.AppRun.open(tmp_path / "run")
    assert again.to_arrow().equals(run.to_arrow())
    assert again.metrics["requests"] == run.metrics["requests"]
    assert not again.interrupted
    with pytest.raises(sl.InputError, match=r"holds a run already; continue it with app\.resume"):
        plan.app.run(plan, tmp_path / "run")
    with pytest.raises(sl.InputError, match="holds no run"):
        sl.AppRun.open(tmp_path)
    with pytest.raises(sl.InputError, match="there is no 'rates'"):
        run.table(["rates"])


def test_in_the_background(plan: sl.AppPlan, tmp_path: Path) -> None:
    told = threading.Event()
    run = plan.app.start(plan, tmp_path / "run")
    run.add_done_callback(lambda r: told.set())
    live = [e.kind for e in run.events()]
    assert run.wait(60) is run
    assert told.wait(10)
    assert live.count("node_finished") == 2
    task = plan.app.start_plan(scheduler="max-heuristic")
    assert task.wait(60).makespan_s == plan.makespan_s
    failing = plan.app.start_plan(scheduler="none")
    with pytest.raises(sl.InputError, match="unknown scheduler 'none'"):
        failing.wait(60)
    assert failing.done()


def test_coroutines(plan: sl.AppPlan, tmp_path: Path) -> None:
    async def main() -> list[Any]:
        made = await plan.app.start_plan(scheduler="max-heuristic")
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        beside = asyncio.create_task(tick())
        run = await plan.app.start(made, tmp_path / "run")
        beside.cancel()
        return [run, ticks]

    run, ticks = asyncio.run(main())
    assert run.done()
    assert ticks > 1


def test_cancel_and_resume(tmp_path: Path) -> None:
    app = application(200)
    plan = app.plan(scheduler="max-heuristic")
    run = app.start(plan, tmp_path / "run", executor="simulated")
    run.cancel()
    run.wait(60)
    assert run.interrupted
    assert "interrupted, can be resumed" in repr(run)
    before = len(list(run.events()))
    done = app.resume(tmp_path / "run")
    assert not done.interrupted
    assert len(list(done.events())) > before
    assert len(done.table()) == 200
    assert done.metrics["requests"]["finished"] == 400


def test_a_run_goes_on_with_as_many_gpus_as_it_was_planned_for(tmp_path: Path) -> None:
    """The application names no cluster: a number was given to its plan."""

    def made() -> sl.App:
        app = sl.App("t", models={"m": "THUDM/chatglm3-6b"}, folder=tmp_path)
        app.llm("n", model="m", data=[{"prompt": f"p{i}"} for i in range(50)], max_tokens=8)
        return app

    app = made()
    run = app.start(app.plan(gpus=3, scheduler="max-heuristic"), tmp_path / "run")
    run.cancel()
    run.wait(60)
    assert run.interrupted
    assert len(made().resume(tmp_path / "run").table()) == 50
    with pytest.raises(sl.InputError, match="the plan is a str; give what"):
        app.run("plan.json", tmp_path / "other")  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(sl.InputError, match="names no schedulers"):
        sl.compare(app, schedulers=[], gpus=1)


def test_plugins_as_objects(tmp_path: Path) -> None:
    from samullm_plugin.host.manager import PluginHost

    host = PluginHost.from_settings()
    greedy = host.resolve("scheduler", "greedy").value

    class Mine(greedy):  # type: ignore[misc, valid-type]
        """Greedy by another name."""

        name = "mine"
        asked = 0

        def schedule(self, problem: Any, context: Any) -> Any:
            Mine.asked += 1
            return super().schedule(problem, context)

    app = application(planner={"scheduler": Mine()})
    assert app.plan().scheduler == "this-process:mine"
    assert app.plan(scheduler=Mine, scenarios=1).scheduler == "this-process:mine"
    assert Mine.asked == 2
    found = sl.compare(app, schedulers=[Mine, "max-heuristic", "min-heuristic"], scenarios=1)
    assert found.rows()[0]["scheduler"] == found.best.scheduler
    assert found.to_arrow().num_rows == 3
    assert found.rows()[0]["over_best"] == 0
    assert "this-process:mine" in repr(found)
    with pytest.raises(sl.InputError, match="did you mean 'greedy'"):
        sl.compare(app, schedulers=["greedi"])


def test_wrong_input_of_a_run(plan: sl.AppPlan, tmp_path: Path) -> None:
    with pytest.raises(sl.InputError, match="did you mean 'vllm'"):
        plan.app.run(plan, tmp_path / "a", executor="vlm")
    with pytest.raises(sl.InputError, match="limit: this belongs to the plan"):
        plan.app.run(plan, tmp_path / "a", limit=3)
    with pytest.raises(sl.InputError, match="unknown option 'x'"):
        plan.app.run(plan, tmp_path / "a", executor_options={"x": 1})
    assert not (tmp_path / "a").exists()


def test_limit(tmp_path: Path) -> None:
    assert application().plan(limit=4, scheduler="max-heuristic").num_requests == 8


def test_a_module_without_a_main_guard(tmp_path: Path) -> None:
    """A program need not guard its top level: nothing imports it again."""
    (tmp_path / "program.py").write_text(
        "import samullm_plugin as sl\n"
        "print('top')\n"
        "app = sl.App('p', {'a': 'THUDM/chatglm3-6b'}, cluster={'gpus': 1})\n"
        "app.llm('n', model='a', data=[{'prompt': 'x'}] * 3, max_tokens=9)\n"
        "run = app.run(app.plan(scheduler='max-heuristic'), 'out')\n"
        "print(run.metrics['requests']['finished'])\n"
    )
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["top", "3"], done.stderr


def test_importing_is_cheap() -> None:
    code = (
        "import sys, samullm_plugin\n"
        "sys.exit(any(m in sys.modules for m in ('pyarrow', 'rich', 'pydantic', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
