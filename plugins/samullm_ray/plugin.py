"""Registers the executor ``ray`` and the command ``cluster``; neither imports Ray by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from samullm_plugin import Executor, hookimpl

if TYPE_CHECKING:
    import typer


@hookimpl
def register_executors(register: Callable[[type[Executor]], None]) -> None:
    """Offer the executor ``ray``."""
    from samullm_ray.executor import RayExecutor

    register(RayExecutor)


@hookimpl
def register_commands(app: typer.Typer) -> None:
    """Add ``samullm cluster``."""
    import typer

    @app.command("cluster")
    def cluster(
        address: str = typer.Option("auto", help="Address of the Ray cluster."),
    ) -> None:
        """Print the machines of a Ray cluster as the `cluster` section of an app.yaml."""
        import yaml

        from samullm_ray.cluster import connect
        from samullm_ray.describe import cluster_section, find_machines
        from samullm_ray.options import RayOptions

        connect(RayOptions(address=address))
        typer.echo(yaml.safe_dump({"cluster": cluster_section(find_machines())}, sort_keys=False))
