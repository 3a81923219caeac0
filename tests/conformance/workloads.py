"""Workloads: a generator for properties, and named cases."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from samullm_plugin.engine import EngineConfig, Workload
from samullm_plugin.model.kv_cache import KvCacheGroup
from tests.conformance.compare import Case

BLOCK_SIZES = (16, 32, 128)


def _groups(draw: st.DrawFn) -> tuple[KvCacheGroup, ...]:
    """Draw the KV cache groups of a model whose layers do not all cache alike."""
    window = draw(st.sampled_from((1, 5, 16, 17, 40, 100)))
    full = KvCacheGroup("full")
    sliding = KvCacheGroup("sliding_window", window_tokens=window)
    return draw(
        st.sampled_from(
            (
                (full, sliding),
                (sliding,),
                (sliding, sliding, full),
                (full, sliding, replace(sliding, window_tokens=window + 20)),
                (replace(full, block_size=32), sliding),
                (full, KvCacheGroup("chunked_local", window_tokens=window)),
                (full, KvCacheGroup("mamba")),
            )
        )
    )


@st.composite
def queue_cases(draw: st.DrawFn) -> Case:
    """Draw settings with KV cache groups or pipeline parallelism or both, and requests."""
    case = draw(cases())
    groups: tuple[KvCacheGroup, ...] = ()
    stages = draw(st.sampled_from((1, 2, 3, 4)))
    if stages == 1 or draw(st.booleans()):
        groups = _groups(draw)
    config = replace(
        case.config,
        block_size=16,
        num_blocks=1 + (case.config.num_blocks - 1) * max(len(groups), 1),
        enable_prefix_caching=case.config.enable_prefix_caching
        and all(g.kind != "mamba" for g in groups),
        pipeline_parallel_size=stages,
        kv_cache_groups=groups,
    )
    return Case(config, case.workload)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw settings and requests, small enough for the real scheduler, often short of blocks."""
    block = draw(st.sampled_from(BLOCK_SIZES))
    max_model_len = draw(st.sampled_from((48, 256, 700)))
    n = draw(st.sampled_from((1, 2, 4, 12, 20, 60, 60)))
    longest_prompt = draw(st.sampled_from((4, 40, 40, max_model_len - 1)))
    longest_prompt = min(longest_prompt, max_model_len - 1)
    longest_output = draw(st.sampled_from((1, 12, 60, 150)))
    prompts = draw(_column(n, 1, longest_prompt))
    outputs = draw(_column(n, 1, longest_output))
    caching = draw(st.booleans())
    policy = draw(st.sampled_from(("fcfs", "priority")))
    max_num_seqs = draw(st.sampled_from((1, 5, 16, 64)))
    budget = draw(st.sampled_from((16, 64, 300, 4096)))
    config = EngineConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=max_model_len,
        block_size=block,
        num_blocks=_num_blocks(draw, prompts, outputs, block, max_model_len),
        enable_prefix_caching=caching,
        async_scheduling=draw(st.booleans()),
        long_prefill_token_threshold=draw(st.sampled_from((0, 0, 7, 40))),
        scheduling_policy=policy,
    )
    workload = Workload(prompts, outputs)
    if policy == "priority":
        workload = replace(workload, priority=draw(_column(n, -1, 3)))
    if draw(st.booleans()):
        workload = replace(workload, arrival_step=draw(_column(n, 0, 60)))
    if n > 1 and draw(st.integers(0, 3)) == 0:
        index, indptr = _chain(draw(_column(n, 0, 2)))
        workload = replace(workload, release_index=index, release_indptr=indptr)
    if caching:
        workload = _with_prefixes(draw, workload)
    return Case(config, workload)


@st.composite
def pooling_cases(draw: st.DrawFn) -> Case:
    """Draw requests of a pooling model, some of which cannot compute a prompt in parts."""
    case = draw(cases())
    workload = replace(case.workload, output_tokens=np.ones(len(case.workload), np.int64))
    config = replace(case.config, async_scheduling=False)
    if draw(st.booleans()):
        tokens = max(config.max_num_batched_tokens, int(workload.prompt_tokens.max()) + 1)
        config = replace(
            config,
            enable_chunked_prefill=False,
            long_prefill_token_threshold=0,
            max_num_batched_tokens=tokens,
            max_model_len=min(config.max_model_len, tokens),
        )
    return Case(config, workload, pooling=True)


def _column(n: int, low: int, high: int) -> st.SearchStrategy[np.ndarray]:
    """Draw ``n`` numbers: many evenly, few one by one, so that a difference can be made small."""
    if n >= 20:
        return st.integers(0, 1 << 30).map(
            lambda drawn: np.random.default_rng(drawn).integers(low, high + 1, n)
        )
    return st.lists(st.integers(low, high), min_size=n, max_size=n).map(
        lambda values: np.array(values, np.int64)
    )


def _num_blocks(
    draw: st.DrawFn, prompts: np.ndarray, outputs: np.ndarray, block: int, max_model_len: int
) -> int:
    """Draw a pool between a little less than the longest request needs and plenty."""
    needed = -(-np.minimum(prompts + outputs, max_model_len) // block)
    spare = draw(st.sampled_from((-1, 0, 1, 4, 4, 12, 12, 2000)))
    return max(int(needed.max()) + 1 + spare, 2)


def _chain(lanes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return successors such that each request of a lane waits for the one before it; 0: none."""
    after: list[list[int]] = [[] for _ in lanes]
    last: dict[int, int] = {}
    for i, lane in enumerate(lanes.tolist()):
        if lane and lane in last:
            after[last[lane]].append(i)
        last[lane] = i
    indptr = np.cumsum([0, *(len(a) for a in after)])
    return np.array([i for a in after for i in a], np.int64), indptr.astype(np.int64)


def _with_prefixes(draw: st.DrawFn, workload: Workload) -> Workload:
    n = len(workload)
    kind = draw(st.sampled_from(("none", "shared", "whole", "ids")))
    if kind == "none":
        return workload
    group = draw(_column(n, -1, 2))
    if kind == "ids":
        # few different ids, the generated one among them, so that anything may coincide
        seed = draw(st.integers(0, 1000))
        pools = [np.random.default_rng(seed + g).integers(5, 8, 2048) for g in range(3)]
        pools.append(np.full(2048, 7))
        ids = tuple(pools[g][:p] for g, p in zip(group, workload.prompt_tokens, strict=True))
        return replace(workload, prompt_token_ids=ids)
    shared = workload.prompt_tokens.copy()
    if kind == "shared":
        shared = np.minimum(shared, draw(_column(n, 0, 300)))
    return replace(workload, prefix_id=group, prefix_tokens=shared)


def named_cases() -> dict[str, Case]:
    """Return the cases the project promises by name."""
    rng = np.random.default_rng(3)

    def some(n: int, prompt: int, output: int, **columns: object) -> Workload:
        return Workload(
            rng.integers(1, prompt, n),
            rng.integers(1, output, n),
            **columns,  # type: ignore[arg-type]  # arrays
        )

    roomy = EngineConfig(max_num_seqs=64, max_num_batched_tokens=512, num_blocks=2000)
    tight = replace(roomy, num_blocks=70)
    cached = replace(tight, enable_prefix_caching=True)
    prompt = rng.integers(1, 30_000, 200)
    same = Workload(np.full(24, 200), rng.integers(20, 120, 24), prompt_token_ids=(prompt,) * 24)
    arriving = some(60, 300, 80, arrival_step=np.sort(rng.integers(0, 300, 60)))
    ranked = some(40, 300, 80, priority=rng.integers(0, 3, 40))
    late_and_ranked = replace(ranked, arrival_step=rng.integers(0, 120, 40))
    long_chain = replace(
        some(30, 200, 60), release_index=np.arange(1, 30), release_indptr=np.r_[0:30, 29]
    )
    alone = replace(roomy, max_model_len=512)
    # The second prompt begins with the first one and what it generates (token id 7).
    begun = rng.integers(10, 99, 15)
    goes_on = np.concatenate([begun, [7], rng.integers(10, 99, 5)])
    continued = Workload(np.array([15, 21]), np.array([2, 12]), prompt_token_ids=(begun, goes_on))
    prompts = ["7", "7777", "777", "7766", "66", "77", "7777", "7766", "7", "7", "6667", "7766"]
    left_out = Workload(
        np.array([len(p) for p in prompts]),
        np.array([26, 15, 33, 17, 32, 7, 22, 27, 3, 39, 29, 2]),
        arrival_step=np.array([26, 15, 1, 10, 23, 7, 11, 27, 30, 8, 36, 1]),
        priority=np.array([1, 0, 2, 0, 0, 2, 0, 2, 0, 0, 2, 1]),
        prompt_token_ids=tuple(np.array([int(c) for c in p]) for p in prompts),
    )
    drawn = np.random.default_rng(2)
    parting = Workload(
        drawn.integers(1, 40, 60),
        drawn.integers(1, 60, 60),
        priority=drawn.integers(-1, 3, 60),
        arrival_step=drawn.integers(0, 60, 60),
    )
    # The first generates on from the prefix of the last; none of its blocks is the last one's.
    beside = Workload(
        np.array([28, 9, 9, 40]),
        np.array([30, 2, 2, 5]),
        arrival_step=np.array([0, 0, 0, 20]),
        prefix_id=np.array([0, -1, -1, 0]),
        prefix_tokens=np.array([28, 0, 0, 28]),
    )
    # The last sequence's own turn is where blocks run out, and the others need all that are free:
    # what another had cached is gone, what it had itself is not.
    own_turn = Workload(np.array([15, 7, 7, 12, 12, 15]), np.array([9, 9, 12, 16, 14, 15]))
    small = EngineConfig(
        max_num_seqs=4,
        max_num_batched_tokens=64,
        max_model_len=256,
        block_size=4,
        num_blocks=14,
        enable_prefix_caching=True,
        async_scheduling=True,
    )
    few = EngineConfig(
        max_num_seqs=5, max_num_batched_tokens=16, num_blocks=8, scheduling_policy="priority"
    )
    result = {
        "prefix caching, one preempts itself and the others take every free block": Case(
            small, own_turn
        ),
        "priority, one preempts itself: vLLM 0.32 and 0.33 part": Case(few, parting),
        "prompts longer than the token budget": Case(
            replace(roomy, max_num_batched_tokens=100), some(40, 900, 60)
        ),
        "long prefill threshold": Case(
            replace(roomy, long_prefill_token_threshold=48), some(40, 900, 60)
        ),
        "max_num_seqs reached": Case(replace(roomy, max_num_seqs=5), some(60, 200, 60)),
        "preempted many times over": Case(tight, some(120, 60, 400)),
        "arriving over time": Case(roomy, arriving),
        "arriving over time, few blocks": Case(tight, arriving),
        "prefix caching, shared prefixes": Case(
            cached,
            some(60, 400, 120, prefix_id=rng.integers(-1, 4, 60), prefix_tokens=np.full(60, 150)),
        ),
        "prefix caching, identical prompts": Case(cached, same),
        "prefix caching, a prompt that another's output completes": Case(
            EngineConfig(
                max_num_seqs=1,
                max_num_batched_tokens=16,
                max_model_len=48,
                num_blocks=4,
                enable_prefix_caching=True,
            ),
            continued,
        ),
        "prefix caching, a prompt beside what another generates from its prefix": Case(
            replace(cached, block_size=4), beside
        ),
        "prefix caching, preempted find their own blocks": Case(
            replace(cached, num_blocks=60), some(60, 300, 250)
        ),
        "priority": Case(replace(tight, scheduling_policy="priority"), ranked),
        "priority, arriving over time": Case(
            replace(tight, scheduling_policy="priority"), late_and_ranked
        ),
        "priority, prefix caching": Case(
            replace(cached, scheduling_policy="priority"), late_and_ranked
        ),
        # Told apart only where a sequence that was left out, its last token known meanwhile, fills
        # a block with the next one: found by search.
        "priority, prefix caching, left out for lack of tokens": Case(
            EngineConfig(
                max_num_seqs=16,
                max_num_batched_tokens=6,
                max_model_len=200,
                num_blocks=6,
                enable_prefix_caching=True,
                scheduling_policy="priority",
            ),
            left_out,
        ),
        "ending at max_model_len": Case(alone, some(30, 511, 2000)),
        "a prompt one short of max_model_len": Case(
            alone, Workload(np.array([511, 5]), np.array([9, 9]))
        ),
        "never fits at once": Case(tight, Workload(np.array([40, 1200, 10]), np.array([30, 5, 5]))),
        "never fits after growing": Case(
            tight, Workload(np.array([900, 30, 30]), np.array([500, 9, 400]))
        ),
        "requests that wait for each other's end": Case(roomy, long_chain),
        "one token": Case(roomy, Workload(np.array([1]), np.array([1]))),
    }
    for block in BLOCK_SIZES:
        result[f"blocks of {block}"] = Case(
            replace(tight, block_size=block, num_blocks=70 * 16 // block), some(50, 400, 120)
        )
    full, sliding = KvCacheGroup("full"), KvCacheGroup("sliding_window", window_tokens=40)
    for name, groups in (
        ("full and sliding window", (full, sliding, sliding)),
        ("full and chunks", (full, KvCacheGroup("chunked_local", window_tokens=64))),
        ("full and state space", (full, KvCacheGroup("mamba"))),
        ("sliding windows of smaller blocks", (replace(full, block_size=32), sliding)),
    ):
        hybrid = replace(tight, kv_cache_groups=groups, num_blocks=160)
        result[name] = Case(hybrid, some(60, 300, 150))
        if groups[-1].kind != "mamba":
            result[f"{name}, prefix caching"] = Case(
                replace(hybrid, enable_prefix_caching=True),
                some(
                    60, 400, 120, prefix_id=rng.integers(-1, 4, 60), prefix_tokens=np.full(60, 250)
                ),
            )
    result["2 pipeline stages"] = Case(replace(roomy, pipeline_parallel_size=2), arriving)
    result["4 pipeline stages, few blocks, priority, prefix caching"] = Case(
        replace(cached, scheduling_policy="priority", pipeline_parallel_size=4), late_and_ranked
    )
    result["2 pipeline stages, full and sliding window"] = Case(
        replace(tight, kv_cache_groups=(full, sliding), num_blocks=100, pipeline_parallel_size=2),
        some(60, 300, 150),
    )
    for name, case in list(result.items()):
        result[f"{name}, asynchronous"] = replace(
            case, config=replace(case.config, async_scheduling=True)
        )
    return result
