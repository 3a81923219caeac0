"""Python nodes in a simulated run: calls in the order they come, rows behind them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from samullm_plugin.model.application import Application, PythonNode
from samullm_plugin.model.types import Bools, Floats
from samullm_plugin.simulator.requests import NodeInputs


def python_finish_s(
    node: PythonNode,
    inputs: NodeInputs,
    taken: Bools,
    available_s: Floats | None,
    done_s: Floats,
) -> Floats:
    """Return when a Python node's calls end and its rows are there, shape ``(n,)``.

    Args:
        node: the node.
        inputs: what its requests wait for.
        taken: which of its requests are needed; the others are settled with their inputs.
        available_s: when the inputs from other nodes are there; None: from the start.
        done_s: when those finished that are done already, inf for the others.
    """
    there = np.zeros(len(taken)) if available_s is None else available_s
    ends = there.copy()
    open_ = np.isinf(done_s)
    calls = np.flatnonzero(taken[: node.num_calls] & open_[: node.num_calls])
    ends[calls] = node.call_ends_s(there[calls])
    ends[~open_] = done_s[~open_]
    rows = open_[inputs.own_row]
    row, call = inputs.own_row[rows], inputs.own_request[rows]
    ends[row] = np.maximum(ends[row], ends[call])
    return ends


def settle_python(
    app: Application, inputs: Sequence[NodeInputs], taken: Sequence[Bools], finish_s: list[Floats]
) -> None:
    """Fill in the Python nodes' entries of ``finish_s``, in place, from those of the others.

    Args:
        app: the application.
        inputs: per node.
        taken: per node.
        finish_s: per node, Python nodes last, when its requests finish.
    """
    for i in app.full_order if app.python else ():
        node = app.all_nodes[i]
        if isinstance(node, PythonNode):
            available = inputs[i].available_s(finish_s)
            nothing = np.full(len(taken[i]), np.inf)
            finish_s[i] = python_finish_s(node, inputs[i], taken[i], available, nothing)
