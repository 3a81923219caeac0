"""The changes that :mod:`tests.mutants` tries, each with the tests that have to notice it.

They are faults as somebody might write them: a boundary that is off by one, a condition left out,
a counter not set back. A change whose text is no longer in its file is an error of
``tests/mutants/test_changes.py``, so that the list keeps up with the code.
"""

from __future__ import annotations

from dataclasses import dataclass

ENGINE = (
    "tests/conformance/test_conformance.py::test_named_case",
    "tests/engine",
    "tests/conformance/test_conformance.py::test_random_workloads",
)
TRANSITION = ("tests/rules/test_transition.py",)
SIMULATOR = ("tests/simulator", "tests/rules/test_preparing.py")
FAILURES = ("tests/run/test_failures.py", "tests/run/test_transitions.py")
EQUAL = (
    "tests/run/test_coordinator_equals_simulator.py::test_random_problems",
    "tests/run/test_coordinator_equals_simulator.py::test_request_policies",
)
REUSE = ("tests/run/test_reuse.py::test_keys", "tests/run/test_store.py")
READY = ("tests/run/test_policies.py::test_what_becomes_ready_at_one_moment",)
SHARING = ("tests/run/test_shared_engines.py",)
REPEATS = ("tests/rules/test_repeats.py",)
SLEEPING = ("tests/rules/test_sleeping.py",)
PREPARING = ("tests/rules/test_preparing.py",)
REPLANNING = ("tests/run/test_residual.py", "tests/run/test_replanning.py")


@dataclass(frozen=True, slots=True)
class Change:
    """A change in one place.

    Attributes:
        file: below the root of the repository.
        what: what is wrong then.
        old: text that is in the file once.
        new: what takes its place.
        tests: what has to fail, as pytest's arguments.
    """

    file: str
    what: str
    old: str
    new: str
    tests: tuple[str, ...]

    def apply(self, text: str) -> str:
        """Return a file's text with the change.

        Raises:
            ValueError: if the place is not in the text, or not only once.
        """
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file}: {self.what}: found {text.count(self.old)} times")
        return text.replace(self.old, self.new)


_SCHEDULE = "samullm_plugin/engine/schedule.py"
_KV = "samullm_plugin/engine/kv_cache.py"
_RUNNING = "samullm_plugin/engine/running.py"
_LOOP = "samullm_plugin/engine/loop.py"
_OUTCOME = "samullm_plugin/engine/outcome.py"
_QUEUES = "samullm_plugin/engine/queues.py"
_RULE = "samullm_plugin/rules/transition.py"
_TRANSITIONS = "samullm_plugin/run/transitions.py"
_SERVING = "samullm_plugin/run/serving.py"
_ENGINE_FAILURES = "samullm_plugin/run/engine_failures.py"
_REQUESTS = "samullm_plugin/run/request_queue.py"
_RECOVERY = "samullm_plugin/run/recovery.py"
_RESIDUAL = "samullm_plugin/run/residual.py"
_RESIDUAL_PLANS = "samullm_plugin/run/residual_plans.py"
_PROPOSING = "samullm_plugin/run/proposing.py"
_REPLANNING = "samullm_plugin/run/replanning.py"

CHANGES = (
    # --- the simulated engine ---
    Change(
        "samullm_plugin/engine/prefixes.py",
        "the hash of a request's own blocks goes on from a number that also stands for a token",
        "own = mix(h, mix(1, r))",
        "own = mix(h, 2 * r + 1)",
        ENGINE,
    ),
    Change(
        _SCHEDULE,
        "a running sequence's chunk exceeds the token budget by one",
        "n = min(n, budget)\n        have = ",
        "n = min(n, budget + 1)\n        have = ",
        ENGINE,
    ),
    Change(
        _SCHEDULE,
        "a new sequence's chunk exceeds the token budget by one",
        "n = min(n, budget)\n        pop_waiting",
        "n = min(n, budget + 1)\n        pop_waiting",
        ENGINE,
    ),
    Change(
        _SCHEDULE,
        "every decode step takes a block",
        "return 1 if slots[i].phase == s.block_phase else 0",
        "return 1",
        ENGINE,
    ),
    Change(
        _SCHEDULE,
        "asynchronously, blocks get their hash a step early",
        "ahead = 0 if s.async_scheduling else 1",
        "ahead = 1",
        ENGINE,
    ),
    Change(
        _SCHEDULE,
        "with priorities, the last of the list is preempted",
        "victim = last_in_priority(s, requests, slots) if s.priority else s.running_tail",
        "victim = s.running_tail",
        ENGINE,
    ),
    Change(
        _SCHEDULE,
        "tokens of a preempted sequence are not given back to the budget",
        "budget += extra",
        "budget += 0",
        ENGINE,
    ),
    Change(
        _SCHEDULE,
        "the last sequence's own turn is taken for another's",
        "if others <= s.free_blocks:",
        "if others < s.free_blocks:",
        ENGINE,
    ),
    Change(
        _SCHEDULE,
        "cached blocks that nobody uses are counted as free twice",
        "- hits + unused > s.free_blocks",
        "- hits > s.free_blocks",
        ENGINE,
    ),
    Change(
        _KV,
        "the last token of a prompt may come from the cache",
        "limit = (tokens - 1) // s.block_size",
        "limit = tokens // s.block_size",
        ENGINE,
    ),
    Change(
        _KV,
        "unhashed blocks go to the back of the free list",
        "before = blocks[end].free_before if hashed else front",
        "before = blocks[end].free_before",
        ENGINE,
    ),
    Change(
        _KV,
        "asynchronously, a token counts as known when it is scheduled",
        "known -= 1  # when the last token",
        "known -= 0  # when the last token",
        ENGINE,
    ),
    Change(
        _RUNNING,
        "a preemption forgets what was computed before an earlier one",
        "= max(requests[request].computed_before, computed)",
        "= computed",
        ENGINE,
    ),
    Change(
        _RUNNING,
        "a finishing sequence that is preempted is released a second time",
        "slots[j].leaving = -1",
        "slots[j].leaving = i",
        ENGINE,
    ),
    Change(
        _RUNNING,
        "the most urgent sequence is preempted",
        "if requests[slots[i].request].rank > requests[slots[worst].request].rank:",
        "if requests[slots[i].request].rank < requests[slots[worst].request].rank:",
        ENGINE,
    ),
    Change(
        _QUEUES,
        "the waiting queue is not ordered by priority",
        "if requests[parent].heap_rank <= key:",
        "if requests[parent].heap_rank >= key:",
        ENGINE,
    ),
    Change(
        _OUTCOME,
        "of requests that become ready at one moment, the last of the table comes first",
        "push_arrival(s, requests, key, successor, successor)",
        "push_arrival(s, requests, key, -successor, successor)",
        READY,
    ),
    Change(
        _OUTCOME,
        "a request does not wait for its last predecessor",
        "if requests[successor].num_predecessors > 0:",
        "if requests[successor].num_predecessors > 1:",
        ENGINE,
    ),
    Change(
        _LOOP,
        "decoding is fast-forwarded past the last free block",
        "and phases[phase].count <= free\n",
        "and phases[phase].count <= free + 1\n",
        ENGINE,
    ),
    Change(
        _LOOP,
        "an iteration that ends too late is run",
        "if end > s.stop:",
        "if start > s.stop:",
        ENGINE,
    ),
    Change(
        _LOOP,
        "a lone prompt is chunked by the threshold of long prefills",
        "s.num_running + s.num_waiting > 1 else 0",
        "s.num_running + s.num_waiting > 0 else 0",
        ENGINE,
    ),
    # --- what a plan means ---
    Change(
        _RULE,
        "a third of three requests is not one",
        "FRACTION_SLACK = 1e-9",
        "FRACTION_SLACK = -1e-9",
        TRANSITION,
    ),
    Change(
        _RULE,
        "who finished before a stage ends it",
        "any(n in state.finished and n not in state.finished_before for n in nodes)",
        "any(n in state.finished for n in nodes)",
        TRANSITION,
    ),
    Change(
        _RULE,
        "an engine that started early is stopped",
        "return running.stage > state.stage  # started early",
        "return False",
        TRANSITION,
    ),
    Change(
        _RULE,
        "engines start on lost devices",
        "self._devices = set(range(cluster.num_gpus)) - state.barred",
        "self._devices = set(range(cluster.num_gpus))",
        (*TRANSITION, "tests/run/test_lost_devices.py"),
    ),
    Change(
        _RULE,
        "engines are taken over where others' devices are planned",
        "if found is None and others.isdisjoint(running.devices):",
        "if found is None:",
        SHARING,
    ),
    Change(
        _RULE,
        "engines of another size are taken over",
        "alike = self._same[name] == number and running.planned.parallel == assignment.parallel",
        "alike = self._same[name] == number",
        SHARING,
    ),
    Change(
        "samullm_plugin/rules/repeats.py",
        "who waits does not wait for repeated requests",
        "    also = times > 1",
        "    also = times > len(table) ** 9",
        REPEATS,
    ),
    Change(
        _RULE,
        "who waits holds the devices of what it waits for",
        "able = [a for a in waiting if names.isdisjoint(upstreams.get(a.node, ()))]",
        "able = list(waiting)",
        TRANSITION,
    ),
    Change(
        _RULE,
        "engines start early past a change that is planned",
        "complete &= begun[node] == assignment",
        "complete &= True",
        TRANSITION,
    ),
    Change(
        "samullm_plugin/rules/verify.py",
        "two nodes on one device are a valid plan",
        'if len(nodes) > 1:\n            message = f"device',
        'if len(nodes) > 2:\n            message = f"device',
        ("tests/rules/test_verify.py",),
    ),
    Change(
        "samullm_plugin/rules/verify.py",
        "a node may start before its input",
        "elif first[upstream] > first[node.name]:",
        "elif first[upstream] > first[node.name] + 1:",
        ("tests/rules/test_verify.py",),
    ),
    Change(
        "samullm_plugin/rules/iteration_prices.py",
        "the first output token counts as a decode step",
        "decode = outputs[taken] - 1",
        "decode = outputs[taken]",
        ("tests/rules/test_bounds.py",),
    ),
    Change(
        "samullm_plugin/rules/iteration_prices.py",
        "the bound leaves prefix caching out",
        "fresh = prompts - ((prompts - 1) // block) * block",
        "fresh = prompts",
        ("tests/rules/test_bounds.py",),
    ),
    Change(
        "samullm_plugin/rules/preparing.py",
        "more is prepared than the host's memory holds",
        "if any(need > have for",
        "if any(need > 2 * have for",
        PREPARING,
    ),
    Change(
        "samullm_plugin/rules/sleeping.py",
        "more sleeps than hosts and devices have room for",
        "if mine.load(problem).worth_sleeping and room.take(mine):",
        "if mine.load(problem).worth_sleeping:",
        SLEEPING,
    ),
    Change(
        "samullm_plugin/simulator/state.py",
        "devices of an engine that falls asleep are free at once",
        "began_s = max((self.clock_s, *held))",
        "began_s = self.clock_s",
        SLEEPING,
    ),
    Change(
        "samullm_plugin/simulator/state.py",
        "a stopped engine loses its progress",
        "self.progress[node], run = self._cut(engine)",
        "_, run = self._cut(engine)",
        SIMULATOR,
    ),
    Change(
        "samullm_plugin/simulator/state.py",
        "an engine counts as prepared whatever it was prepared for",
        "if known is not None and known[0].parallel == running.planned.parallel:",
        "if known is not None:",
        SIMULATOR,
    ),
    Change(
        "strategies/samullm_auto/selection.py",
        "a gain within the standard error is trusted",
        "return bool(gains_s.mean() > gains_s.std(ddof=1) / np.sqrt(len(gains_s)))",
        "return True",
        ("tests/strategies/test_auto_selection.py",),
    ),
    Change(
        "samullm_plugin/rules/sleeping.py",
        "engines that sleep on lost devices wake",
        "left = [a for a in asleep if state.barred.isdisjoint(a.devices)]",
        "left = list(asleep)",
        SLEEPING,
    ),
    Change(
        "samullm_plugin/rules/sleeping.py",
        "engines that woke take room among those that sleep",
        "            left.remove(mine)\n",
        "",
        SLEEPING,
    ),
    Change(
        "samullm_plugin/rules/sleeping.py",
        "engines that another node takes over fall asleep",
        "if name in taken_over or mine not in wanted",
        "if mine not in wanted",
        SLEEPING,
    ),
    Change(
        "samullm_plugin/rules/preparing.py",
        "only the stage at hand is prepared",
        "if wanted and number > state.stage:",
        "if wanted:",
        PREPARING,
    ),
    Change(
        "samullm_plugin/rules/preparing.py",
        "engines that wake are prepared",
        "if there and asleep_as",
        "if False and asleep_as",
        SLEEPING,
    ),
    Change(
        "samullm_plugin/rules/page_cache.py",
        "a disk reads all checkpoints at once",
        "there_s = max(began_s, self._free_s.get(machine, 0.0)) + reading_s",
        "there_s = began_s + reading_s",
        ("tests/rules/test_page_cache.py",),
    ),
    Change(
        "samullm_plugin/rules/page_cache.py",
        "a new machine's disk is busy with what the lost one read",
        "        self._free_s.pop(machine, None)\n",
        "",
        ("tests/rules/test_page_cache.py",),
    ),
    Change(
        "samullm_plugin/rules/fusion.py",
        "a node is fused past one it waits for",
        "            continue\n        if app.through",
        "            pass\n        if app.through",
        ("tests/rules/test_fusion.py",),
    ),
    Change(
        "samullm_plugin/rules/fusion.py",
        "a node is fused with what waits for it through a function",
        "            continue  # it would wait",
        "            pass  # it would wait",
        ("tests/rules/test_fusion.py",),
    ),
    Change(
        "samullm_plugin/rules/fusion.py",
        "replicas share unevenly",
        "2 * num_devices * self",
        "num_devices * self",
        ("tests/rules/test_fusion.py",),
    ),
    Change(
        "samullm_plugin/rules/sharing.py",
        "nodes share engines across a model that stands between them",
        "            if _has_cycle(app, moved):\n                continue\n",
        "",
        ("tests/rules/test_sharing.py",),
    ),
    Change(
        "samullm_plugin/rules/placement.py",
        "the largest models make room",
        "kept.sort(key=lambda a: -len(a.devices))",
        "kept.sort(key=lambda a: len(a.devices))",
        ("tests/rules/test_placement.py",),
    ),
    # --- runs ---
    Change(
        _RECOVERY,
        "a new plan goes on at the old one's stage",
        'found.begin_plan(plan, record.get("request_policy"))',
        "found.plan = plan",
        ("tests/run/test_recovery.py",),
    ),
    Change(
        _RECOVERY,
        "a call whose rows are missing is not called again",
        "if ledger.rows_settled(request):",
        "if True:",
        ("tests/run/test_recovery.py",),
    ),
    Change(
        _RECOVERY,
        "a retry in the journal is not replayed",
        "                found.reopen_failed()\n                resume.rejected.clear()",
        "                resume.rejected.clear()",
        ("tests/run/test_recovery.py",),
    ),
    Change(
        "samullm_plugin/run/journal.py",
        "a torn last line stays when the journal is opened",
        "if os.fstat(self._fd).st_size > self._size:",
        "if os.fstat(self._fd).st_size < self._size:",
        ("tests/run/test_journal.py",),
    ),
    Change(
        "samullm_plugin/run/rundir.py",
        "two processes may resume one run",
        "            )\n        directory.lock()\n        return directory",
        "            )\n        return directory",
        ("tests/run/test_resuming.py::test_one_process_at_a_time",),
    ),
    Change(
        _SERVING,
        "failures of engines add up over the whole run",
        "            self.failures[node] = self.unstarted[node] = 0\n",
        "",
        FAILURES,
    ),
    Change(
        _TRANSITIONS,
        "a new plan uses lost devices",
        "self.rule = RunState(barred=set(self._engines.lost))",
        "self.rule = RunState()",
        ("tests/run/test_lost_devices.py",),
    ),
    Change(
        _ENGINE_FAILURES,
        "a request survives one engine more than it may",
        "if deaths >= self._options.max_request_failures:",
        "if deaths > self._options.max_request_failures:",
        FAILURES,
    ),
    Change(
        _SERVING,
        "requests that finish while their engine stops are forgotten",
        "if replica.outstanding:  # the executor will report",
        "if False:  # the executor will report",
        FAILURES,
    ),
    Change(
        "samullm_plugin/run/dispatch.py",
        "requests that wait for one another change replicas",
        "if self.inputs.has_chain:\n                self._chain_at[chain] = replica",
        "if False:\n                self._chain_at[chain] = replica",
        EQUAL,
    ),
    Change(
        "samullm_plugin/run/dispatch.py",
        "all requests go to the first replica",
        "            self._turn += 1\n",
        "",
        EQUAL,
    ),
    Change(
        _REQUESTS,
        "requests are dealt in the order in which they became ready",
        "taken = sorted(self._queue[node])",
        "taken = list(self._queue[node])",
        ("tests/run/test_rejected.py",),
    ),
    Change(
        "samullm_plugin/run/asked.py",
        "tokens generated before a move are not counted",
        "Whole(before + output.num_tokens,",
        "Whole(output.num_tokens,",
        ("tests/run/test_rejected.py",),
    ),
    Change(
        _REQUESTS,
        "a rejected output counts as generated",
        "        self.ledger.generated[request[0]][request[1]] = 0\n",
        "",
        ("tests/run/test_rejected.py",),
    ),
    Change(
        _REQUESTS,
        "one input left out leaves the request out",
        "if states.count(SKIPPED) == len(states) or",
        "if SKIPPED in states or",
        EQUAL,
    ),
    Change(
        "samullm_plugin/run/reuse.py",
        "sampled outputs are reused in other places",
        "place = (node, self._unique_id(node, index)) if drawn else ()",
        "place = ()",
        REUSE,
    ),
    Change(
        "samullm_plugin/run/reuse.py",
        "a node that is to be asked again is not",
        "if node in self._fresh or node",
        "if node == self._fresh or node",
        ("tests/run/test_reuse.py::test_only_what_changed_is_asked",),
    ),
    Change(
        _RESIDUAL,
        "requests that have started may still be left out",
        "np.where(waiting, chance, 1.0)",
        "chance",
        REPLANNING,
    ),
    Change(
        _RESIDUAL,
        "what filters let through so far is not learned from",
        "np.minimum(taken_rate(app, i, snapshot) * table.probability, 1.0)",
        "np.minimum(table.probability, 1.0)",
        REPLANNING,
    ),
    Change(
        _RESIDUAL,
        "the share of rejected outputs so far is not learned from",
        "return rejected / judged if judged >= ENOUGH_DECIDED else None",
        "return None",
        REPLANNING,
    ),
    Change(
        _RESIDUAL_PLANS,
        "a stage that ends at a share waits for that share of the rest",
        "wanted = end.fraction * total - (total - len(rows))",
        "wanted = end.fraction * len(rows)",
        REPLANNING,
    ),
    Change(
        _PROPOSING,
        "a plan is changed for any gain",
        "better = gain_s > max(self._options.min_gain * remaining_s, error_s)",
        "better = gain_s > 0",
        REPLANNING,
    ),
    Change(
        _REPLANNING,
        "a proposal for engines that have changed is adopted",
        "if stale and proposal.plan is not None:",
        "if False:",
        REPLANNING,
    ),
    Change(
        "samullm_plugin/run/drift.py",
        "requests that run count as finished at what they have",
        "(begun | snapshot.cut[i])[seen],",
        "snapshot.cut[i][seen],",
        REPLANNING,
    ),
    Change(
        "samullm_plugin/run/dispatch.py",
        "an equally urgent request is given past the window",
        "if self.backlog.first() >= last:",
        "if self.backlog.first() > last:",
        ("tests/run/test_windows.py::test_the_window_changes_no_time",),
    ),
    Change(
        "samullm_plugin/run/dispatch.py",
        "chains stay with an engine that has failed",
        "self._chain_at = {c: r for c, r in self._chain_at.items() if r is not replica}",
        "pass",
        FAILURES,
    ),
    Change(
        "samullm_plugin/run/engines.py",
        "engines that were prepared in other sizes are started",
        "if known is not None and known.assignment.parallel != running.planned.parallel:",
        "if False:",
        PREPARING,
    ),
    Change(
        _TRANSITIONS,
        "a new plan stops engines that are elsewhere than planned",
        "planned = Assignment(old.planned.node, old.planned.parallel, old.devices)",
        "planned = old.planned",
        ("tests/run/test_replanning.py",),
    ),
    Change(
        _RESIDUAL_PLANS,
        "shares of what is left are taken for shares of all",
        "end = replace(end, fraction=(total - rest + end.fraction * rest) / total)",
        "pass",
        ("tests/run/test_residual.py",),
    ),
    Change(
        "plugins/samullm_vllm/channel_selector.py",
        "a launcher that was started again is not listened to",
        "self._watch_launcher()  # started again",
        "pass  # started again",
        ("tests/vllm/test_connections.py",),
    ),
)
