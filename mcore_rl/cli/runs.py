"""mcore-rl train, plan, lint: what begins with a configuration and needs no engine of its own.

A configuration is read before what takes seconds to import, so that its mistakes are told at once.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from mcore_rl.config import dump_config, load_config
from mcore_rl.launch import Nodes

app = typer.Typer()
ConfigFile = Annotated[Path, typer.Argument(help="YAML file, for example examples/demo/grpo.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value ...")]


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc_per_node: Annotated[int, typer.Option(min=1, help="trainer ranks on this node, through torchrun")] = 1,
    nnodes: Annotated[int, typer.Option(min=1, help="run this command on every one of them")] = 1,
    rdzv_endpoint: Annotated[
        str | None, typer.Option(help="HOST:PORT where the nodes meet; HOST is one of them")
    ] = None,
    node_rank: Annotated[int | None, typer.Option(help="0 on HOST; without it the nodes agree on an order")] = None,
    dry_run: Annotated[bool, typer.Option(help="print the resolved config and the layout, start nothing")] = False,
) -> None:
    """Train a policy as CONFIG says; see docs/launch.md for several nodes."""
    nodes = Nodes(nproc_per_node, nnodes, rdzv_endpoint, node_rank)
    asked = load_config(config, overrides or ())
    from mcore_rl.planning.check import check_run_folder, make_plan

    plan = make_plan(asked, nodes.world_size)
    if dry_run:
        print(dump_config(plan.config))
        print(plan.layout.table())
        return
    check_run_folder(plan.config)
    if nodes.world_size == 1:
        from mcore_rl.train import train as run

        run(plan.config)
        return
    sys.stdout.flush()
    options = nodes.torchrun_options(plan.config.name, plan.config.parallel.timeout_s)
    command = [sys.executable, "-m", "mcore_rl.launch", *options, "--", str(config), *(overrides or ())]
    os.execv(sys.executable, command)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    world_size: Annotated[int, typer.Option(min=1, help="trainer ranks, one a GPU")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 8,
    gpu_memory_gb: Annotated[float, typer.Option(min=1, help="of one GPU, in units of 2**30 bytes")] = 80.0,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object, in bytes and elements")] = False,
) -> None:
    """Say whether CONFIG fits WORLD_SIZE GPUs; reads only the model's config.json. Exit code 2: invalid, 1: too big."""
    asked = load_config(config, overrides or ())
    from mcore_rl.planning.estimate import Hardware
    from mcore_rl.planning.fit import plan_run
    from mcore_rl.planning.tables import as_json as report
    from mcore_rl.planning.tables import show

    planned, changes = plan_run(asked, world_size, Hardware(gpus_per_node, gpu_memory_gb))
    if as_json:
        print(json.dumps(report(planned, changes)))
    else:
        show(planned, changes)
    raise typer.Exit(1 if planned.problems else 0)


@app.command()
def lint(config: ConfigFile, overrides: Overrides = None) -> None:
    """List what in CONFIG would learn nothing, or something else than meant. Exit code 2 where that is certain."""
    asked = load_config(config, overrides or ())
    from mcore_rl import algorithms
    from mcore_rl.planning.lint import lint as findings_of

    findings = findings_of(asked, algorithms.load(asked.algorithm.name, **asked.algorithm.fields))
    for finding in findings:
        print(finding)
    if not findings:
        print("nothing found")
    raise typer.Exit(2 if any(f.level == "error" for f in findings) else 0)
