"""What the command line's arguments mean: a run's name, a model's family, a recipe's selections, and how they print."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lmleak.errors import DataError, LmleakError, ModelError, RecipeError, RunError, SelectionError, did_you_mean

if TYPE_CHECKING:
    from lmleak.config import Recipe
    from lmleak.records import Selection

RUNS = Path("runs")


@contextmanager
def placed(recipe: Recipe) -> Iterator[None]:
    """Errors about a model, data or a selection come from rooms that know no files: this adds the recipe's place.

    Raises:
        RecipeError: in place of SelectionError, ModelError and DataError.
    """
    blocks = {SelectionError: "select", ModelError: "model", DataError: "data"}
    try:
        yield
    except tuple(blocks) as error:
        field = next(block for kind, block in blocks.items() if isinstance(error, kind))
        raise RecipeError([recipe.explain(error, field)]) from error


def selections(recipe: Recipe) -> Iterator[tuple[dict[str, Any], Selection]]:
    """Each distinct selection of a recipe's cells, as written and as resolved against the model's architecture.

    Raises:
        RecipeError: a selection or the model is wrong, with its place.
    """
    from lmleak.config import cells
    from lmleak.defenses import install, installs
    from lmleak.gradients import select
    from lmleak.models import outline

    victims: dict[str, Any] = {}
    seen: set[str] = set()
    for cell in cells(recipe):
        change = cell.recipe.defense if installs(cell.recipe.defense) else {"kind": "none"}
        model, wanted = json.dumps([cell.recipe.model, change], sort_keys=True), cell.recipe.select
        key = model + json.dumps(wanted, sort_keys=True)
        if key in seen:
            continue
        seen.add(key)
        with placed(cell.recipe):
            if model not in victims:
                victims[model] = install(outline(**cell.recipe.model), change)
            yield {k: v for k, v in wanted.items() if v not in (None, [], "all")}, select(victims[model], **wanted)


def pattern_and_overrides(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Tells the one module pattern from KEY=VALUE words.

    Raises:
        LmleakError: more than one pattern.
    """
    patterns = [word for word in words if "=" not in word]
    if len(patterns) > 1:
        raise LmleakError(f"one PATTERN at most, not {len(patterns)}: {', '.join(patterns)}")
    return next(iter(patterns), None), [word for word in words if "=" in word]


def module_rows(
    model: str, chosen: dict[str, Any], overrides: Sequence[str], observe: bool
) -> Iterator[dict[str, Any]] | list[dict[str, Any]]:
    """Rows of `lmleak modules`, for a recipe or for a model.

    Raises:
        LmleakError: no such model; overrides or `observe` where no recipe is given; RecipeError and SelectionError.
    """
    from lmleak import registry
    from lmleak.config import load_recipe, packaged
    from lmleak.defenses import install
    from lmleak.gradients import modules_table
    from lmleak.models import outline

    is_recipe = model in packaged() or model.endswith((".yaml", ".yml"))
    if not is_recipe and (observe or overrides):
        what = "--observe needs data, so a recipe" if observe else f"{overrides[0]} overrides a recipe"
        near = did_you_mean(model, packaged()) or f", e.g. lmleak modules quickstart{' --observe' if observe else ''}"
        raise LmleakError(f"{what}, and '{model}' is none{near}")
    if observe:
        return observed(load_recipe(model, overrides), **chosen)
    if is_recipe and not chosen:
        found = selections(load_recipe(model, overrides))
        return [{"select": select, **row} for select, selection in found for row in entries(selection)]
    if is_recipe:
        recipe = load_recipe(model, overrides)
        victim = install(outline(**recipe.model), recipe.defense)
    elif model in registry.kinds("models"):
        victim = outline(model)
    else:
        victim = outline(family_of(model), weights=model)
    named = {**chosen, "pattern": next(iter(chosen.get("target_modules") or ()), None)}
    return modules_table(victim, **{k: v for k, v in named.items() if k != "target_modules"})


def observed(recipe: Recipe, **chosen: Any) -> Iterator[dict[str, Any]]:
    """What the first batch's gradient shows at every selected tensor, for each distinct observation of the cells.

    Args:
        recipe: its model, data, selections and defenses; attacks do not matter.
        chosen: a selection in place of the recipe's own and of its sweep.

    Raises:
        RecipeError: the model, the data or a selection is wrong, with its place.
    """
    from lmleak.attacks import _applicability
    from lmleak.config import cells, load_recipe
    from lmleak.runs.workbench import Workbench

    if chosen:
        recipe = load_recipe({**recipe.model_dump(), "select": chosen, "sweep": []})
    bench, seen = Workbench(), set()
    for cell in cells(recipe):
        settings = {name: getattr(cell.recipe, name) for name in ("model", "data", "select", "defense", "seed")}
        key = json.dumps(settings, sort_keys=True)
        if key in seen:
            continue
        seen.add(key)
        with placed(cell.recipe):
            batch, observation = bench.observe(cell, 0)
        victim = bench.victim(cell)
        mask = batch.inputs.get("attention_mask")
        about = {
            "select": {k: v for k, v in cell.recipe.select.items() if v not in (None, [], "all")},
            "defense": cell.recipe.defense["kind"],
            "batch": {"sentences": observation.batch_size, "tokens": None if mask is None else mask.sum(1).tolist()},
        }
        for one in _applicability.read_all(victim, observation):
            entry = one.entries[0]
            yield about | {
                "name": entry.name,
                "component": entry.component,
                "layer": entry.layer,
                "rows": one.rows,
                "rank": one.rank,
                "gap": one.space.gap,
                "tokens": one.tokens,
                "shows": one.shows,
                "attacks": list(_applicability.readers(one, victim, observation)),
                "status": one.status,
                "reason": one.reason,
                "spectrum": [value / max(one.spectrum[0], 1e-300) for value in one.spectrum],
            }


def entries(selection: Selection) -> list[dict[str, Any]]:
    """A selection as rows of the table that `lmleak modules` prints."""
    return [
        {
            "name": entry.name,
            "shape": list(entry.shape),
            "parameters": entry.numel,
            "share": entry.numel / selection.total,
            "component": entry.component,
            "layer": entry.layer,
        }
        for entry in selection.entries
    ]


def family_of(weights: str) -> str:
    """Kind whose architecture a folder, package path or hub id holds, by its config.json; `generic` for others.

    Raises:
        LmleakError: neither a kind nor weights that can be had.
    """
    from lmleak import registry
    from lmleak.config import packaged
    from lmleak.models._weights import resolve

    kinds = registry.kinds("models")
    if not re.search(r"[/:\\]", weights) and not Path(weights).is_dir():
        near = did_you_mean(weights, [*kinds, *packaged()])
        raise LmleakError(f"no model kind, recipe or folder '{weights}'{near} (kinds: {', '.join(kinds)})")
    try:
        found = json.loads((resolve(weights) / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{weights}: no usable config.json ({error})") from error
    return next(
        (kind for kind in kinds if found in getattr(registry.load("models", kind), "MODEL_TYPES", ())), "generic"
    )


def run_folder(name: str) -> Path:
    """Folder of a run given by path, by its name's beginning, by its id, or by its recipe (the newest one).

    Raises:
        RunError: there is none; the message names the nearest one.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.name != name:
        raise RunError(f"{name}: no such run folder")
    known = [folder for folder in RUNS.iterdir() if (folder / "recipe.yaml").is_file()] if RUNS.is_dir() else []
    exact = [folder for folder in known if re.match(rf"{re.escape(name)}-\d{{8}}", folder.name)]
    close = [f for f in known if f.name.startswith(name) or f.name.rpartition("-")[2].startswith(name)]
    if exact or close:
        return max(exact or close, key=lambda folder: ((folder / "recipe.yaml").stat().st_mtime_ns, folder.name))
    names = sorted({re.sub(r"-\d{8}.*", "", folder.name) for folder in known})
    near = did_you_mean(name, names) or f" (there are: {', '.join(names) or 'none'}, in {RUNS.absolute()})"
    raise RunError(f"no run '{name}'{near}")


def print_cells(recipe: Recipe, as_json: bool) -> None:
    """The cells of `--dry-run`."""
    from lmleak.config import cells

    points = cells(recipe)
    for cell in points:
        if as_json:
            click.echo(json.dumps({"cell": cell.id, "axes": cell.axes}))
        else:
            axes = "  ".join(f"{axis}={json.dumps(value)}" for axis, value in cell.axes.items())
            click.echo(f"{cell.id}  {axes}".rstrip())
    click.echo(f"{recipe.name} {recipe.id}: {len(points)} cells; nothing has run", err=True)


def print_modules(rows: list[dict[str, Any]]) -> None:
    """Rows of a module table; a change of `select` starts a block of its own. Plain, so that it can be grepped."""
    block: list[dict[str, Any]] = []
    for row in [*rows, None]:
        if block and (row is None or row.get("select") != block[0].get("select")):
            _print_block(block)
            block = []
        if row is not None:
            block.append(row)


def print_readings(rows: list[dict[str, Any]]) -> None:
    """Rows of `modules --observe`, a block for each observation. Plain, so that it can be grepped."""
    head = ("name", "rank", "rows", "tokens", "step", "read by", "why not")
    blocks: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        blocks.setdefault(json.dumps([row["select"], row["defense"], row["batch"]]), []).append(row)
    for block in blocks.values():
        about = block[0]
        behind = "" if about["defense"] == "none" else f", behind {about['defense']}"
        click.echo(f"select: {json.dumps(about['select'])}{behind}; first batch: {_size(about['batch'])}")
        table = [head]
        flat = [row for row in block if row["rows"] == "none" and not row["spectrum"] and not row["gap"] > 1]
        for row in block:
            if row in flat:
                continue
            step = "" if row["rows"] == "table" else f"{row['gap']:.2g}"
            tokens = "?" if row["tokens"] is None else str(row["tokens"])
            shown = [row["name"], str(row["rank"] or row["tokens"] or 0), row["rows"], tokens, step]
            table.append((*shown, ", ".join(row["attacks"]) or "-", row["reason"] or ""))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for line in table:
            click.echo("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
        if flat:
            click.echo(f"{len(flat)} more, biases and norms: sums of output gradients, no inputs")
        click.echo()
    click.echo("Exact attacks are listed; gradient matching can be tried on any gradient that is not zero.")


def _print_block(rows: list[dict[str, Any]]) -> None:
    if "select" in rows[0]:
        click.echo(f"select: {json.dumps(rows[0]['select'])}")
    table = [("name", "type", "shape", "parameters", "share", "component", "layer", "note")]
    for row in rows:
        notes = [f"tied to {row['tied_to']}"] if row.get("tied_to") else []
        notes += ["frozen"] if row.get("frozen") else []
        layer, shape = row.get("layer"), " x ".join(str(size) for size in row["shape"])
        shown = [row.get("component") or "", "" if layer is None else str(layer), ", ".join(notes)]
        table.append((row["name"], row.get("type", ""), shape, f"{row['parameters']:,}", f"{row['share']:.2%}", *shown))
    columns = [column for column in zip(*table, strict=True) if any(column[1:])]
    for i, column in enumerate(columns):
        width = max(map(len, column))
        columns[i] = tuple(
            text.rjust(width) if column[0] in ("parameters", "share") else text.ljust(width) for text in column
        )
    for line in zip(*columns, strict=True):
        click.echo("  ".join(line).rstrip())
    total = sum(row["parameters"] for row in rows)
    click.echo(f"{len(rows)} rows, {total:,} parameters, {sum(row['share'] for row in rows):.2%} of the model\n")


def _size(batch: dict[str, Any]) -> str:
    return f"{batch['sentences']} pictures" if batch["tokens"] is None else f"{batch['tokens']} tokens"
