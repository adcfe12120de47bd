"""The sections of a report on one run: what was run on what, how it went, what it cost, how to do it again."""

import json
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tomli_w
from markupsafe import Markup

from .. import config
from . import scored
from .blocks import Chart, Code, Section, Table, Text, Tiles
from .folder import RunFolder, smooth
from .svg import Series, heat, plot
from .words import between, duration, number

INTERVALS = (
    "Bands and intervals are 95 %, from a bootstrap over questions. The loss is the log loss over the two "
    "answer words, with correct and incorrect rows weighing as in train."
)


def head(run: RunFolder) -> Section:
    """The figures that are seen first."""
    best, (state, reason) = run.metrics.best, run.state()
    tiles = []
    if best:
        for key, name in (("accuracy", "accuracy"), ("auroc", "AUROC")):
            tiles.append((name, number(best.get(key)), between(best.get(f"{key}_interval"))))
        tiles.append(("validation loss", number(best["loss"]), f"best, after step {best['step']:,}"))
        if "rows" in best and "questions" in best:
            tiles.append(("validation", f"{best['rows']:,} rows", f"of {best['questions']:,} questions"))
    of = f" of {run.steps:,}" if run.steps else ""
    tiles.append(("steps", f"{run.metrics.done:,}{of}", state))
    tiles.append(("time", duration(hours(run) * 3600), device(run)))
    blocks: list[Any] = [Tiles(tiles)]
    if state == "failed":
        blocks.append(Text(f"The run failed: {reason}", warning=True))
    return Section("summary", "Summary", blocks)


def what(run: RunFolder, data: Path | None) -> Section:
    """Settings and data."""
    s, about = run.settings, scored.manifest(run, data)
    train, lora, model = s["train"], s["lora"], s["model"]
    schedule = "wsd" if s["strategy"]["kind"] == "stream" else train["schedule"]
    trained = run.status.get("parameters")
    facts = [
        ("base model", f"{model['path']} ({run.about['resolved'].get('precision', model['base'])})"),
        ("adapter", f"LoRA rank {lora['rank']}, alpha {lora['alpha']:g}, dropout {lora['dropout']:g}"
         + (f", {trained:,} trained parameters" if trained else "")),
        ("learning", f"{train['optimizer']}, lr {train['lr']:g}, {schedule}, "
         f"warm-up {train['warmup_ratio']:g}"),
        ("a step", f"{train['batch_size'] * train['gradient_accumulation']} rows, "
         f"{train['per_question']} of a question"),
        ("answers", " / ".join(s["prompt"]["answers"])),
        ("data", f"{s['data']['path']}" + (f", its first {s['data']['rows']:,} rows" if s["data"].get("rows") else "")),
        ("fingerprint", str(run.about["resolved"].get("fingerprint", ""))),
        ("veritune", str(run.about.get("veritune", ""))),
    ]  # fmt: skip
    blocks: list[Any] = [Table(facts, title="Run")]
    if about:
        blocks.append(Table(data_facts(about), title="Data"))
        blocks.append(
            Table(
                [
                    (x["name"], f"{x['rows']:,}", f"{x['refused']:,}", (x["sha256"] or "")[:16])
                    for x in about["sources"]
                ],
                ("source", "rows", "refused", "SHA-256"),
                details="Sources of the data",
            )
        )
    else:
        blocks.append(Text(f"{scored.not_its_own(run, data)}: name it with --data.", True))
    phases = [(x["name"], f"{x['rows']:,}", f"{x['start']:,}", f"{x['steps']:,}") for x in run.phases]
    if len(phases) > 1:
        blocks.append(Table(phases, ("phase", "rows", "from step", "steps"), title="Phases"))
    flat = config.flat(s)
    blocks.append(Table([(key, json.dumps(flat[key], ensure_ascii=False)) for key in flat], details="All settings"))
    return Section("what", "What was run", blocks)


def data_facts(about: dict[str, Any]) -> list[tuple[str, str]]:
    """A manifest's counts in words."""
    rows, train, validation, leaks = about["rows"], about["train"], about["validation"], about["leaks"]
    near = leaks["near_duplicate_questions"]
    left_out = sum(value for key, value in train.items() if key.startswith("left_out"))
    return [
        ("rows read", f"{rows['read']:,}"),
        ("not used", f"{rows['refused']:,} refused, {rows['contradictory']:,} contradictory, "
         f"{rows['duplicates']:,} copies, {left_out:,} left out for balance, limits and held-out questions"),
        ("train", f"{train['rows']:,} rows of {train['questions']:,} questions, {train['true_share']:.1%} correct"),
        ("validation", f"{validation['rows']:,} rows of {validation['questions']:,} questions, "
         f"{validation['true_share']:.1%} correct" if validation["rows"] else "none"),
        ("in both", f"{leaks['shared_questions']:,} questions; near-duplicates "
         + ("not counted" if near is None else f"{near:,}")),
    ]  # fmt: skip


def training(run: RunFolder) -> Section:
    """Loss, learning rate and gradient norm over the steps."""
    steps = run.metrics.steps
    if not steps["step"]:
        return Section("training", "Training", [Text("No step is finished yet.")])
    x = steps["step"]
    shades = [(p["start"], p["start"] + p["steps"], p["name"]) for p in run.phases] if len(run.phases) > 1 else []
    end = float(max(run.steps or 0, x[-1]))

    def over(series: list[Series], **how: Any) -> Markup:
        return plot(series, x_label="step", x_range=(0, end), shades=shades, **how)

    smoothed = smooth(steps["loss"])
    losses = [Series(x, steps["loss"], 1, kind="faint"), Series(x, smoothed, 1)]
    legend = [("s1", "training, over the whole vocabulary, smoothed")]
    held = [v for v in run.metrics.validations if isinstance(v.get("loss"), int | float)]
    if held:
        losses.append(Series([v["step"] for v in held], [v["loss"] for v in held], 2, kind="both"))
        legend.append(("s2", "validation, over the two answer words"))
    # The first steps of a run can be far above all others: the axis shows the smoothed loss and what is near it.
    shown = sorted([v for v in [*smoothed, *[e["loss"] for e in held]] if v == v]) or [1.0]
    top = max(shown[int(len(shown) * 0.98) - 1] * 1.25, shown[-1] if shown[-1] < 4 * shown[len(shown) // 2] else 0)
    blocks = [
        Chart("Loss (nats)", over(losses, y_range=(0, top)), legend),
        Chart("Learning rate", over([Series(x, steps["lr"], 3)])),
        Chart("Gradient norm before clipping", over([Series(x, steps["grad_norm"], 4, kind="thin")], log_y=True)),
        Chart("Rows a second", over([Series(x, smooth(speeds(run), 0.9), 5)])),
    ]
    return Section("training", "Training", blocks, "Phases are shaded in turn." if shades else "")


def speeds(run: RunFolder) -> list[float]:
    """Rows a second of each step."""
    pairs = zip(run.metrics.steps["rows"], run.metrics.steps["seconds"], strict=True)
    return [rows / seconds if seconds > 0 else float("nan") for rows, seconds in pairs]


def validation(run: RunFolder) -> Section:
    """Figures on the held-out rows over the steps."""
    entries = run.metrics.validations
    if not entries:
        return Section("validation", "Validation", [Text("No validation is finished yet.")])
    blocks: list[Any] = []
    for key, name in (("accuracy", "Accuracy"), ("auroc", "AUROC")):
        blocks.append(Chart(f"{name} on validation", plot([over_steps(entries, key, 1)], x_label="step")))
    best = run.metrics.best
    rows = [
        (
            f"{e['step']:,}" + (" (best)" if e is best else ""),
            *(f"{number(e.get(key))}  {between(e.get(key + '_interval'))}" for key in ("accuracy", "auroc")),
            *(number(e.get(key)) for key in ("loss", "balanced_accuracy", "f1", "brier", "log_loss")),
        )
        for e in entries
    ]
    names = ("step", "accuracy", "AUROC", "loss", "balanced", "F1", "Brier", "log loss")
    blocks.append(Table(rows, names, details=f"All {len(rows):,} validations" if len(rows) > 3 else ""))
    return Section("validation", "Validation", blocks, INTERVALS)


def over_steps(entries: list[dict[str, Any]], key: str, colour: int) -> Series:
    """A figure of each validation with its interval."""

    def values(i: int) -> list[float]:
        found = [(e.get(f"{key}_interval") or (None, None))[i] for e in entries]
        return [float("nan") if value is None else value for value in found]

    y = [e[key] if isinstance(e.get(key), int | float) else float("nan") for e in entries]
    return Series([e["step"] for e in entries], y, colour, "", "both", values(0), values(1))


FORGETTING = {
    "average_forgetting": "average forgetting (less is better)",
    "backward_transfer": "backward transfer (negative is forgetting)",
}
PROBES = {"trained": "Rows it trained on", "held_out": "Held-out questions of their kind"}


def forgotten(run: RunFolder) -> dict[str, Any] | None:
    """What forgetting.json holds (see docs/phases.md), for a run with phases; empty where it cannot be read."""
    try:
        found = json.loads((run.path / "forgetting.json").read_text(encoding="utf-8"))
        names = [[str(x["name"]) for x in found[part]] for part in ("slices", "phases")]
        for probe in PROBES:
            if [len(row) for row in found["accuracy"][probe]] != [len(names[0])] * len(names[1]):
                raise ValueError("a matrix of another size")
        return found if all(probe in found[key] for key in FORGETTING for probe in PROBES) else {}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def forgetting(run: RunFolder) -> Section | None:
    """The forgetting matrix of a run with phases."""
    found = forgotten(run)
    if found is None:
        return None
    if not found:
        return Section("forgetting", "What was forgotten", [Text("forgetting.json cannot be read.", warning=True)])
    slices, phases = ([x["name"] for x in found[part]] for part in ("slices", "phases"))
    blocks: list[Any] = []
    for probe, title in PROBES.items():
        values = [[float("nan") if v is None else v for v in row] for row in found["accuracy"][probe]]
        known = [v for row in values for v in row if v == v] or [0.0]
        drawn = heat(values, phases, slices, low=min(known), high=max(known))
        blocks.append(Chart(f"{title}: accuracy after each phase (down) on each slice (across)", drawn))
    rows = [(name, *(number(found[key][probe]) for probe in PROBES)) for key, name in FORGETTING.items()]
    blocks.append(Table(rows, ("", "rows trained on", "held-out questions")))
    return Section("forgetting", "What was forgotten", blocks)


def cost(run: RunFolder, price: float | None) -> Section:
    """Time, machine, and money at `price` an hour."""
    rows = [
        (
            session["started"].replace("T", " ")[:16],
            f"{session['from_step']:,}",
            duration(seconds) if (seconds := lasted(session, run)) is not None else "-",
            session["state"],
            session["machine"].get("device", ""),
            f"torch {session['machine'].get('torch', '')}",
        )
        for session in run.status["sessions"]
    ]
    steps = run.metrics.steps
    busy, shown = sum(v for v in steps["seconds"] if v == v), sum(v for v in steps["rows"] if v == v)
    total = hours(run)
    facts = [
        ("time in sessions", duration(total * 3600)),
        ("time in steps", f"{duration(busy)}" + (f", {busy / total / 36:.0f} % of it" if total > 0 else "")),
        ("row presentations", f"{shown:,.0f}" + (f", {shown / busy:,.1f} a second in steps" if busy > 0 else "")),
    ]
    if price is not None:
        facts.append(("cost", f"{total * price:,.2f} at {price:g} an hour"))
    blocks: list[Any] = [Table(facts)]
    if rows:
        head_ = ("session began (UTC)", "at step", "lasted", "ended", "machine", "software")
        blocks.append(Table(rows, head_, title="Sessions"))
    return Section("cost", "Cost and hardware", blocks)


def lasted(session: dict[str, Any], run: RunFolder) -> float | None:
    """Seconds of a session; of one that goes on or was killed, until the run's last sign."""
    try:
        started = datetime.fromisoformat(session["started"]).timestamp()
        ended = datetime.fromisoformat(session["ended"]).timestamp() if session["ended"] else run.seen()
    except (TypeError, ValueError):
        return None
    return max(ended - started, 0.0)


def hours(run: RunFolder) -> float:
    """Hours in all sessions; in steps alone where the sessions are not known."""
    known = [lasted(session, run) or 0.0 for session in run.status["sessions"]]
    return sum(known or [v for v in run.metrics.steps["seconds"] if v == v]) / 3600


def device(run: RunFolder) -> str:
    """What the last session ran on."""
    sessions = run.status["sessions"]
    return sessions[-1]["machine"].get("device", "") if sessions else ""


def reproduce(run: RunFolder, data: Path | None) -> Section:
    """The commands and the run file that lead to this run."""
    about, path = scored.manifest(run, data), run.settings["data"]["path"]
    lines = []
    if about:
        names = [str(x["name"]) for x in about["sources"]]
        flags = prepare_flags(about["settings"])
        lines.append(shlex.join(["veritune", "prepare", *names, "--out", path, *flags]))
    lines.append("veritune train run.toml")
    lines.append(shlex.join(["veritune", "evaluate", f"{run.settings['out']}/best", path, "--baseline"]))
    blocks = [
        Code("\n".join(lines), "Commands"),
        Code(run_file(run.settings), "run.toml"),
        Text(f"Data with another fingerprint than {run.about['resolved'].get('fingerprint')} is other data."),
    ]
    return Section("again", "How to reproduce", blocks)


def prepare_flags(settings: dict[str, Any]) -> list[str]:
    """The flags of `veritune prepare` that differ from the defaults."""
    usual, out = config.flat(config.as_dict(config.Prepare())), []
    for key, value in config.flat(settings).items():
        if key in usual and value != usual[key]:
            flag = "--" + key.replace("_", "-")
            if isinstance(value, bool):
                out.append(flag if value else "--no-" + key.replace("_", "-"))
            else:
                out += [flag, str(value)]
    return out


def run_file(settings: dict[str, Any]) -> str:
    """Settings as a run file (TOML); what is not set is left out."""
    return tomli_w.dumps(_without_none(settings))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list | tuple) else value


def now() -> str:
    """The time of the report."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
