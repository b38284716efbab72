"""The command line. Every verb imports what it needs inside its function, so that `lmleak ls` never waits for torch."""

from __future__ import annotations

import json
import os
import traceback
from pathlib import Path
from typing import Any

import click

from lmleak import __version__, _arguments
from lmleak.errors import LmleakError, RecipeError, did_you_mean

SHOW = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class _Verbs(click.Group):
    """One place where errors become exit codes: 2 for bad input, 130 for Ctrl-C; anything else is a bug and shows."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LmleakError as error:
            if os.environ.get("LMLEAK_DEBUG") == "1":
                traceback.print_exc()
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted; the same command again resumes", err=True)
            ctx.exit(130)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            near = did_you_mean(args[0], self.commands) or f" (there are: {', '.join(self.commands)})"
            raise click.UsageError(f"no command '{args[0]}'{near}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=_Verbs, context_settings=SHOW)
@click.version_option(__version__, prog_name="lmleak")
def main() -> None:
    """What can someone who sees only some modules' gradients read about the training data, and what stops it?

    \b
      lmleak run quickstart               a study of a pretrained model, offline, in minutes
      lmleak ls attacks                   what there is
      lmleak modules gpt2 --layers 0      names to select by
    """


@main.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--run-dir", type=click.Path(path_type=Path), help="Run folder. Default: found by the recipe's id.")
@click.option("--fresh", is_flag=True, help="Start anew instead of resuming.")
@click.option("--fail-fast", is_flag=True, help="Stop at the first cell that fails.")
@click.option("--evenly", is_flag=True, help="Every cell's first batch before any cell's second.")
@click.option("--dry-run", is_flag=True, help="Print the cells and stop.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line a cell on standard output.")
@click.option("--quiet", is_flag=True, help="No progress.")
def run(recipe: str, overrides: tuple[str, ...], **options: Any) -> None:
    """Run RECIPE (a name or a path). The same command again resumes.

    KEY=VALUE overrides any field: data.limit=5 attack.kind=matching 'sweep.select.layers=[[0], [1]]'
    """
    from lmleak.config import load_recipe

    study = load_recipe(recipe, overrides)
    if options["dry_run"]:
        _arguments.print_cells(study, options["as_json"])
        return
    from lmleak import report, runs

    done = runs.run(
        study,
        run_dir=options["run_dir"],
        root=_arguments.RUNS,
        fresh=options["fresh"],
        fail_fast=options["fail_fast"],
        evenly=options["evenly"],
        json_lines=options["as_json"],
        quiet=options["quiet"],
    )
    if int(os.environ.get("RANK", "0")) == 0:
        page = report.write([done.path])
        if not options["as_json"]:
            report.print_table(report.compare([done.path]))
        click.echo(f"run:    {done.path}\nreport: {page}", err=options["as_json"])
    if done.exit_code:
        click.get_current_context().exit(done.exit_code)


@main.command()
@click.argument("room", required=False)
@click.option("--json", "as_json", is_flag=True)
def ls(room: str | None, as_json: bool) -> None:
    """List recipes and every kind, or one ROOM: recipes, models, data, defenses, attacks, measures, metrics."""
    from lmleak import registry

    rooms = ("recipes", *registry.ROOMS)
    if room is not None and room not in rooms:
        raise LmleakError(f"no room '{room}'{did_you_mean(room, rooms)} (rooms: {', '.join(rooms)})")
    found: dict[str, dict[str, str]] = {}
    for name in rooms if room is None else (room,):
        if name == "recipes":
            from lmleak.config import library

            found[name] = {stem: library.summary(path) for stem, path in library.packaged().items()}
        else:
            found[name] = {kind: registry.summary(name, kind) for kind in registry.kinds(name)}
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for name, lines in found.items():
        if room is None:
            click.echo(name)
        width = max(map(len, lines), default=0)
        for kind, line in lines.items():
            click.echo(f"{'  ' if room is None else ''}{kind:{width}}  {line}".rstrip())


@main.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def cat(recipe: str, overrides: tuple[str, ...]) -> None:
    """Print RECIPE as it would run: overrides applied, every default filled in."""
    from lmleak.config import load_recipe

    click.echo(load_recipe(recipe, overrides).to_yaml(), nl=False)


@main.command()
@click.argument("recipe")
@click.argument("dest", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Overwrite DEST.")
def cp(recipe: str, dest: Path, force: bool) -> None:
    """Copy RECIPE to DEST, comments and all, to change it there."""
    from lmleak.config import find

    source = find(recipe)
    target = dest / source.name if dest.is_dir() else dest
    if target.exists() and not force:
        raise LmleakError(f"{target}: exists; --force overwrites it")
    try:
        target.write_bytes(source.read_bytes())
    except OSError as error:
        raise LmleakError(f"{target}: {error.strerror or error}") from error
    click.echo(target)


@main.command()
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE...")
@click.option("--modules", "with_modules", is_flag=True, help="Also resolve every selection against its model.")
def validate(recipes: tuple[str, ...], with_modules: bool) -> None:
    """Check every RECIPE and every cell of its sweep; all faults at once. KEY=VALUE arguments override each of them."""
    from lmleak.config import cells, load_recipe

    overrides = [word for word in recipes if "=" in word and not Path(word).exists()]
    problems: list[str] = []
    for name in (word for word in recipes if word not in overrides):
        try:
            study = load_recipe(name, overrides)
            if with_modules:
                for _ in _arguments.selections(study):
                    pass
            click.echo(f"{name}: ok, {len(cells(study))} cells")
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)


@main.command()
@click.argument("model")
@click.argument("words", nargs=-1, metavar="[PATTERN] [KEY=VALUE]...")
@click.option("--layers", help="Blocks, e.g. 0, -1, 3-5 or 0,3-5.")
@click.option("--components", help="Parts by family-independent name, e.g. attn_query,ffn_in.")
@click.option("--observe", is_flag=True, help="Compute the first batch's gradient and say what each module shows.")
@click.option("--json", "as_json", is_flag=True)
def modules(
    model: str, words: tuple[str, ...], layers: str | None, components: str | None, observe: bool, as_json: bool
) -> None:
    """Show which modules a PATTERN, layers or components match, without loading weights.

    MODEL is a kind (gpt2), a local folder, package:NAME/PATH or hub id, or a RECIPE, whose own selections are shown.

    With --observe MODEL is a RECIPE: its model is loaded, the gradient of its first batch is computed, and each module
    comes with its rank, the tokens it speaks for, the attacks that can read it exactly, or why there are none.
    """
    pattern, overrides = _arguments.pattern_and_overrides(words)
    parts = components.split(",") if components else None
    chosen = {"target_modules": [pattern] if pattern else None, "layers": layers, "components": parts}
    rows = list(_arguments.module_rows(model, {k: v for k, v in chosen.items() if v is not None}, overrides, observe))
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
    else:
        (_arguments.print_readings if observe else _arguments.print_modules)(rows)


@main.command()
@click.argument("run_names", nargs=-1, required=True, metavar="RUN...")
@click.option("--utility", "trained", multiple=True, metavar="RECIPE", help="What `lmleak utility` kept of RECIPE.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line a cell.")
@click.option("--csv", "as_csv", is_flag=True)
def compare(run_names: tuple[str, ...], trained: tuple[str, ...], as_json: bool, as_csv: bool) -> None:
    """Put the cells of one or more RUNs side by side. RUN is a folder, or a recipe's name for its newest run.

    Prints the table and writes compare.html, with the figures, and compare.csv into the first RUN. What the defenses
    cost is taken from `lmleak utility` of the same recipes, or of those named.
    """
    from lmleak import report
    from lmleak.report import _csv, _store
    from lmleak.runs.utility import folder_of

    folders = [_arguments.run_folder(name) for name in run_names]
    if as_csv:
        click.echo(_csv.table([_store.read(folder) for folder in folders]), nl=False)
        return
    lines = report.compare(folders)
    if as_json:
        for line in lines:
            click.echo(json.dumps(line))
    else:
        report.print_table(lines)
    page = report.write(folders, folders[0] / "compare.html", [folder_of(name, _arguments.RUNS) for name in trained])
    click.echo(f"report: {page}", err=as_json)


@main.command()
@click.argument("run_names", nargs=-1, required=True, metavar="RUN...")
def report(run_names: tuple[str, ...]) -> None:
    """Write one HTML page about one or more RUNs; prints its path."""
    from lmleak import report as pages

    click.echo(pages.write([_arguments.run_folder(name) for name in run_names]))


@main.command()
@click.argument("run_name", metavar="RUN")
def score(run_name: str) -> None:
    """Score a RUN's stored reconstructions again, with the metrics as they are now."""
    from lmleak import report as pages
    from lmleak import runs

    folder = _arguments.run_folder(run_name)
    runs.rescore(folder)
    pages.print_table(pages.compare([folder]))


@main.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="One JSON line a defense on standard output.")
def utility(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """What each defense of RECIPE costs: its model fine-tuned under it. The same command again resumes."""
    from lmleak.runs import utility as trained

    say = lambda text: click.echo(text, err=True)  # noqa: E731
    folder, lines = trained.utility(recipe, overrides, root=_arguments.RUNS, said=say)
    found = trained.summary(lines)
    if as_json:
        for line in found:
            click.echo(json.dumps(line))
    else:
        from lmleak.report._trained import print_trained

        print_trained(found)
    click.echo(f"runs:   {folder / trained.RESULTS}", err=as_json)


@main.command()
@click.option("--json", "as_json", is_flag=True)
def env(as_json: bool) -> None:
    """Versions, devices and caches: what to paste into an issue."""
    import platform
    from importlib import metadata

    facts = {"lmleak": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in ("torch", "transformers", "datasets", "accelerate", "pydantic", "opacus", "peft", "numpy", "scipy"):
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name] = "not installed"
    import torch

    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts |= {"cuda": ", ".join(cards) or "none", "threads": str(torch.get_num_threads())}
    for name in ("HF_HOME", "HF_HUB_OFFLINE", "ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES"):
        facts[name] = os.environ.get(name, "not set")
    width = max(map(len, facts))
    click.echo(json.dumps(facts) if as_json else "\n".join(f"{name:{width}}  {fact}" for name, fact in facts.items()))
