"""The running list: its slots, decode sequences by the step of their last token, preemption."""

from __future__ import annotations

from typing import Any

from samullm_plugin.engine import records as at
from samullm_plugin.engine.jit import inner
from samullm_plugin.engine.kv_cache import release_blocks
from samullm_plugin.engine.queues import prepend_waiting
from samullm_plugin.engine.records import Array, Record


@inner
def add_running(s: Record, slots: Array, request: int) -> int:
    """Append ``request`` to the running list and return its slot."""
    s.num_free_slots -= 1
    i: int = slots[s.num_free_slots].free_slot
    slots[i].request = request
    slots[i].state = at.PREFILL
    slots[i].order = s.next_order
    slots[i].no_token_in_flight = 0
    s.next_order += 1
    tail = s.running_tail
    slots[i].before = tail
    slots[i].after = -1
    if tail >= 0:
        slots[tail].after = i
    else:
        s.running_head = i
    s.running_tail = i
    s.num_running += 1
    return i


@inner
def remove_running(s: Record, slots: Array, i: int) -> None:
    """Take slot ``i`` out of the running list."""
    before, after = slots[i].before, slots[i].after
    if before >= 0:
        slots[before].after = after
    else:
        s.running_head = after
    if after >= 0:
        slots[after].before = before
    else:
        s.running_tail = before
    slots[i].state = at.EMPTY
    slots[s.num_free_slots].free_slot = i
    s.num_free_slots += 1
    s.num_running -= 1


@inner
def computed_tokens(s: Record, slots: Array, i: int) -> Any:
    """Return the tokens whose keys and values slot ``i`` has."""
    if slots[i].state == at.DECODE:
        return slots[i].offset + s.decode_step
    return slots[i].offset


@inner
def generated_tokens(s: Record, requests: Array, slots: Array, i: int) -> Any:
    """Return the output tokens of the request on slot ``i``."""
    if slots[i].state == at.DECODE:
        return requests[slots[i].request].output_tokens - (slots[i].target - s.decode_step)
    return requests[slots[i].request].generated


@inner
def start_decoding(
    s: Record, slots: Array, finish_wheel: Array, phases: Array, i: int, computed: int, left: int
) -> None:
    """Enter slot ``i`` with ``computed`` tokens and ``left`` steps to go among the decoding."""
    step = s.decode_step
    offset = computed - step
    slots[i].state = at.DECODE
    slots[i].offset = offset
    slots[i].target = step + left
    c = (step + left) & s.wheel_mask
    first = finish_wheel[c]
    slots[i].wheel_after = first
    slots[i].wheel_before = -1
    if first >= 0:
        slots[first].wheel_before = i
    finish_wheel[c] = i
    k = offset % s.block_size
    slots[i].phase = k
    phases[k].count += 1
    if s.caching == at.SHARED_BLOCKS:
        # kept in running order: blocks are handed out in this order
        order = slots[i].order
        before = phases[k].last
        after = -1
        while before >= 0 and slots[before].order > order:
            after = before
            before = slots[before].phase_before
        slots[i].phase_before = before
        slots[i].phase_after = after
        if before >= 0:
            slots[before].phase_after = i
        else:
            phases[k].first = i
        if after >= 0:
            slots[after].phase_before = i
        else:
            phases[k].last = i
    s.num_decode += 1
    s.offset_sum += offset
    if s.num_decode == 1:
        s.longest_offset = offset
        s.longest_is_stale = 0
    elif offset > s.longest_offset:
        s.longest_offset = offset


@inner
def leave_sums(s: Record, slots: Array, phases: Array, i: int) -> None:
    """Take slot ``i`` out of the sums over decoding sequences (not out of the finish_wheel)."""
    k = slots[i].phase
    phases[k].count -= 1
    if s.caching == at.SHARED_BLOCKS:
        before, after = slots[i].phase_before, slots[i].phase_after
        if before >= 0:
            slots[before].phase_after = after
        else:
            phases[k].first = after
        if after >= 0:
            slots[after].phase_before = before
        else:
            phases[k].last = before
    s.num_decode -= 1
    s.offset_sum -= slots[i].offset
    if slots[i].offset == s.longest_offset:
        s.longest_is_stale = 1


@inner
def stop_decoding(s: Record, slots: Array, finish_wheel: Array, phases: Array, i: int) -> None:
    """Take slot ``i`` out of the decoding before its last token."""
    before, after = slots[i].wheel_before, slots[i].wheel_after
    if before >= 0:
        slots[before].wheel_after = after
    else:
        finish_wheel[slots[i].target & s.wheel_mask] = after
    if after >= 0:
        slots[after].wheel_before = before
    leave_sums(s, slots, phases, i)


@inner
def remove_prefill(s: Record, slots: Array, i: int) -> None:
    """Take slot ``i`` out of the list of prefilling sequences, keeping its order."""
    kept = 0
    for j in range(s.num_prefill):
        if slots[j].prefilling != i:
            slots[kept].prefilling = slots[j].prefilling
            kept += 1
    s.num_prefill = kept


@inner
def longest_offset(s: Record, slots: Array) -> Any:
    """Return the largest offset of a decoding sequence."""
    if s.longest_is_stale:
        longest = -(1 << 60)
        i = s.running_head
        while i >= 0:
            if slots[i].state == at.DECODE and slots[i].offset > longest:
                longest = slots[i].offset
            i = slots[i].after
        s.longest_offset = longest
        s.longest_is_stale = 0
    return s.longest_offset


@inner
def preempt(
    s: Record,
    requests: Array,
    slots: Array,
    finish_wheel: Array,
    phases: Array,
    blocks: Array,
    table: Array,
    preempted: Array,
    i: int,
    extra: int,
) -> None:
    """Take away slot ``i`` and its blocks, ``extra`` tokens of which were allocated just now."""
    request = slots[i].request
    computed = computed_tokens(s, slots, i)
    generated = generated_tokens(s, requests, slots, i)
    if slots[i].state == at.DECODE:
        stop_decoding(s, slots, finish_wheel, phases, i)
        s.num_no_token_in_flight -= slots[i].no_token_in_flight
    elif slots[i].state == at.PREFILL:
        remove_prefill(s, slots, i)
    release_blocks(s, requests, slots, blocks, table, i, computed, extra)
    if slots[i].state == at.FINISHING:  # its last token arrives nevertheless
        for j in range(s.num_finishing):
            if slots[j].leaving == i:
                slots[j].leaving = -1
    else:
        requests[request].generated = generated
        requests[request].computed_before = max(requests[request].computed_before, computed)
        prepend_waiting(s, requests, request)
    remove_running(s, slots, i)
    if s.record == at.ALL_SEQUENCES:
        preempted[s.logged_preempted + s.step_preemptions] = request
    s.step_preemptions += 1


@inner
def last_in_priority(s: Record, requests: Array, slots: Array) -> Any:
    """Return the slot that policy ``priority`` preempts first."""
    worst = s.running_head
    i = slots[worst].after
    while i >= 0:
        if requests[slots[i].request].rank > requests[slots[worst].request].rank:
            worst = i
        i = slots[i].after
    return worst


@inner
def skip(s: Record, slots: Array, finish_wheel: Array, phases: Array, i: int) -> None:
    """Leave the decoding slot ``i`` out of the step at hand."""
    computed = computed_tokens(s, slots, i)
    stop_decoding(s, slots, finish_wheel, phases, i)
    slots[i].state = at.SKIPPED
    slots[i].offset = computed
    slots[i].target -= s.decode_step
    slots[s.num_skipped].skipped = i
    s.num_skipped += 1


@inner
def resume_skipped(s: Record, slots: Array, finish_wheel: Array, phases: Array) -> None:
    """Let the sequences left out of the step decode on."""
    for j in range(s.num_skipped):
        i = slots[j].skipped
        start_decoding(s, slots, finish_wheel, phases, i, slots[i].offset, slots[i].target)
        if s.async_scheduling and s.caching and not slots[i].no_token_in_flight:
            slots[i].no_token_in_flight = 1
            s.num_no_token_in_flight += 1
    s.num_skipped = 0
