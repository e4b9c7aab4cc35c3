"""`proclip train`: run the stages of a recipe."""

from typing import TYPE_CHECKING, Annotated

import typer


if TYPE_CHECKING:
    from trainers.recipe.curriculum import Curriculum


def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A .yaml file, or its address in an object store; recipes/ has those of the papers.", metavar="RECIPE"
        ),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings that override the recipe's, such as output_dir=runs/1 data.train.source=/data/cc3m.",
        ),
    ] = None,
    stage: Annotated[str | None, typer.Option(help="Run this stage only; the one before it must be finished.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and do nothing.")] = False,
) -> None:
    """Run or resume the stages of a recipe, each from the previous one's result.

    After a crash, give the same command again: finished stages are skipped, and an interrupted one resumes from its last checkpoint.
    On several GPUs: `accelerate launch -m trainers.cli train RECIPE`. Relative paths in a recipe are relative to the directory that the
    command is started in. docs/recipes.md explains every key.
    """
    from trainers.recipe.curriculum import Curriculum
    from trainers.recipe.schema import load_recipe

    curriculum = Curriculum(load_recipe(recipe, settings or ()))
    model = None if dry_run else curriculum.run(stage)
    if curriculum.processes.is_main_process:
        _print_plan(curriculum)
        if model is None:
            _print_memory(curriculum)
        else:
            typer.echo(f"the model is in {model}")
    curriculum.processes.destroy_process_group()  # else torch warns of it at the end of each process


def _print_plan(curriculum: "Curriculum") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from trainers.recipe.plan import plan_stages, plan_stores

    def number(value: int | None) -> str:
        return "?" if value is None else f"{value:,}"

    stages = plan_stages(curriculum)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("stage", no_wrap=True)
    for title in ("rows", "epochs", "steps", "batch", "on devices"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for plan in stages:
        table.add_row(
            plan.name,
            number(plan.rows),
            "?" if plan.epochs is None else f"{plan.epochs:.3g}",
            number(plan.steps),
            number(plan.global_batch_size),
            f"{plan.num_processes} × {plan.device_batch_size:,}" + ("*" if plan.gradient_caching else ""),
            plan.state if plan.seconds is None else f"{plan.state}, {plan.seconds:,.0f} s",
        )
    console = Console(highlight=False)
    console.print(table)
    if any(plan.gradient_caching for plan in stages):
        typer.echo(
            "* gradient caching: a device holds this many rows at a time; the gradient is that of the whole batch"
        )
    finished = all(plan.state == "finished" for plan in stages)
    for store in plan_stores(curriculum):
        texts = f"{store.stored:,}" if finished else f"{store.stored:,} of about {number(store.texts)}"
        size = (
            f"{store.dim:,} x {store.dtype} each"
            if store.dim is not None
            else f"{store.dtype}, of a size still unknown"
        )
        total = "" if store.num_bytes is None else f", {_bytes(store.num_bytes)}"
        typer.echo(f"text store {store.name}: {texts} texts, {size}{total}: {store.path}")
    typer.echo(
        f"computes in {curriculum.precision} on {curriculum.processes.device}; results go to {curriculum.output_dir}"
    )
    for plan in stages:
        held_out = {key: value for key, value in plan.last_evaluation.items() if "r@" in key or key == "eval_loss"}
        if held_out:
            numbers = ", ".join(f"{key.removeprefix('eval_')} {value:.4f}" for key, value in held_out.items())
            typer.echo(f"{plan.name}, held out: {numbers}")


def _print_memory(curriculum: "Curriculum") -> None:
    from trainers.recipe.memory import plan_memory
    from trainers.recipe.plan import plan_stages

    for plan in plan_stages(curriculum):
        memory = None if plan.state == "finished" else plan_memory(curriculum, plan.name)
        if memory is not None:
            parts = ", ".join(
                f"{name} {_bytes(getattr(memory, name))}"
                for name in ("weights", "gradients", "optimizer", "activations")
            )
            texts = "" if memory.num_tokens is None else f", for texts of {memory.num_tokens} tokens"
            typer.echo(f"memory of a device, {plan.name}: about {_bytes(memory.peak)} at its peak ({parts}){texts}")


def _bytes(number: int) -> str:
    return f"{number / 1e9:,.3g} GB" if number >= 1e9 else f"{number / 1e6:,.3g} MB"
