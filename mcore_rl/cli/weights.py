"""mcore-rl convert, verify: weights on disk, of any layout. tools/hf_to_megatron.py and its neighbours start them."""

from __future__ import annotations

from math import lcm
from pathlib import Path
from typing import Annotated, Literal

import typer

LISTED = 50  # differences that verify prints

app = typer.Typer()
Axis = Annotated[int, typer.Option(min=1)]
Config = Annotated[
    Path | None,
    typer.Option(help="Hugging Face folder with config.json and tokenizer, where the weights have none beside them"),
]


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Hugging Face folder or Megatron checkpoint, of any layout")],
    out: Annotated[Path, typer.Argument(help="folder to write; must not exist")],
    to: Annotated[Literal["hf", "megatron"], typer.Option(help="what to write")],
    tp: Axis = 1,
    pp: Axis = 1,
    vpp: Axis = 1,
    ep: Axis = 1,
    etp: Axis = 1,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="default: each tensor keeps its own")
    ] = None,
    config: Config = None,
) -> None:
    """Convert weights on disk between Hugging Face and Megatron, or Megatron from one layout to another.

    One process on the CPU whatever the layout; about two parameters are in memory at a time.
    """
    import torch

    from mcore_rl.parallel.layout import ParallelLayout
    from mcore_rl.weights.convert import to_hf, to_megatron

    wanted = getattr(torch, dtype) if dtype else None
    # the fewest ranks that hold both the dense layers' and the experts' shards
    layout = ParallelLayout(tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp, dp=lcm(tp, ep * etp) // tp)
    if to == "megatron":
        written = to_megatron(source, out, layout, wanted, config)
        axes = " ".join(f"{name}={size}" for name, size in vars(layout).items() if size > 1)
        print(f"{written}: Megatron checkpoint of {layout.world_size} ranks {axes}".rstrip())
        return
    if layout != ParallelLayout():
        raise ValueError("a Hugging Face folder has no layout: leave --tp, --pp, --vpp, --ep and --etp away")
    print(f"{to_hf(source, out, wanted, config)}: Hugging Face folder")


@app.command()
def verify(
    a: Annotated[Path, typer.Argument(help="Hugging Face folder or Megatron checkpoint, of any layout")],
    b: Annotated[Path, typer.Argument(help="the other one")],
    config: Config = None,
) -> None:
    """Compare weights on disk bit by bit. Exit code 0: the same, 1: not (names the tensors), 2: not comparable."""
    from mcore_rl.weights.stored import open_weights
    from mcore_rl.weights.verify import compare

    weights = [open_weights(path, config) for path in (a, b)]
    differences = compare(*weights)
    for name, what in differences[:LISTED]:
        print(f"{name}: {what}")
    if len(differences) > LISTED:
        print(f"and {len(differences) - LISTED} more")
    if differences:
        names = len({difference.name for difference in differences})
        print(f"different: {names} of {len(weights[0].specs)} tensors ({a}, {b})")
        raise typer.Exit(1)
    print(f"the same: {len(weights[0].specs)} tensors, bit by bit ({a}, {b})")
