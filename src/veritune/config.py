"""Every setting, declared once: frozen, validated, unknown keys refused.

A run file is TOML with these tables: `[data]`, `[model]`, `[prompt]`, `[lora]`, `[train]`, `[strategy]`,
`[[phases]]`, `[validation]`, `[checkpoint]`, `[session]`, `[track]`; and `[sweep]`, which `veritune train` checks and
leaves alone. Flags override it under the same names (`--train.lr 1e-4`). What a key means stands under it here and is
what `veritune train --help` prints.
"""

import dataclasses
import json
import tomllib
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from .errors import ConfigError, MissingError, refused
from .redact import holds_secret
from .suggest import did_you_mean, nearest
from .sweepkeys import Place, Sweep, tables

T = TypeVar("T")
STRICT = ConfigDict(extra="forbid", validate_default=False, use_attribute_docstrings=True, allow_inf_nan=False)
LARGEST = 2**53
"""Of whole numbers; beyond it the libraries below overflow."""
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Names = Annotated[tuple[str, ...], Field(min_length=1)]

INSTRUCTION = (
    "Check the solution to the math problem step by step. Answer {true} if its final answer is correct, "
    "otherwise answer {false}."
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Data:
    """What to train on."""

    path: Place = "prepared"
    """The prepared dataset: a folder that `veritune prepare` wrote."""
    rows: Count | None = None
    """Train on the first N rows of the prepared order (drawn evenly by label); all of them by default."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Model:
    """The base model, whose weights stay frozen."""

    path: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """A hub id, a folder with weights and tokenizer, or a .gguf file."""
    base: Literal["auto", "fp32", "bf16", "nf4", "fp8"] = "auto"
    """How the frozen weights are held. auto: bf16 where the GPU or CPU multiplies in
    it, else fp32. nf4: 4-bit with double quantisation. fp8: products in 8 bits, the fastest on GPUs that have them
    (Ada, Hopper and later)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run. auto: a CUDA GPU if there is one."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Prompt:
    """The words around a question and its solution. They are stored with the adapter; scoring can use no others."""

    template: Literal["auto", "chat", "plain"] = "auto"
    """chat: the tokenizer's own chat template. plain: plain text, for base models. auto: chat if there is one."""
    instruction: Annotated[str, Field(min_length=1)] = INSTRUCTION
    """What the model is told to do; {true} and {false} stand for the two answer words."""
    answers: tuple[str, str] = ("True", "False")
    """The answer words for a correct and an incorrect solution: each one token, and different."""
    max_length: Annotated[int, Field(ge=64, le=LARGEST)] = 2048
    """Tokens a row may have. A longer solution loses its middle, never its end or the label."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Lora:
    """The low-rank adapter, the only weights that are trained (Hu et al. 2021)."""

    rank: Count = 16
    """Rank r of the update B·A."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """The update is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    targets: Names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """The projections that get an adapter, by the end of their name."""


Optimizer = Literal["adamw_torch", "adamw_8bit", "paged_adamw_32bit", "lion_8bit"]
Schedule = Literal["linear", "cosine", "cosine_with_restarts", "constant", "wsd"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Train:
    """How the adapter is trained."""

    lr: Annotated[float, Field(gt=0)] = 2e-4
    """The highest learning rate of the schedule."""
    optimizer: Optimizer = "adamw_torch"
    """adamw_torch: torch's, with 32-bit state. The others are bitsandbytes': adamw_8bit and lion_8bit with 8-bit state,
    and paged_adamw_32bit, whose 32-bit state can move to the host. lion_8bit wants an lr several times smaller."""
    schedule: Schedule = "cosine"
    """How the learning rate falls after warm-up. wsd: constant, then linear to 0 over the last `decay_ratio`."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """The part of all steps over which the learning rate rises from 0."""
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = 0.2
    """wsd: the part of all steps over which the learning rate falls to 0."""
    restarts: Count = 2
    """cosine_with_restarts: how many times the cosine runs."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """The gradient's norm is clipped to this; 0: it is not clipped."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What to do where a step's loss or gradient is NaN or infinite. skip: leave weights and optimiser as they are and
    go on with the next step; ten such steps in a row stop the run."""
    batch_size: Count = 16
    """Examples in one accumulation of a step."""
    gradient_accumulation: Count = 1
    """Accumulations in a step: a step has batch_size x gradient_accumulation examples. Only the product counts: memory
    is decided by micro_batch_tokens."""
    per_question: Count = 8
    """Solutions of one question that stand in a step together, with both labels where it has both; 1: rows drawn
    independently. More share more tokens, so a step is cheaper, and a right beside a wrong solution teaches more."""
    epochs: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """How often each row is shown."""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Compute layers' activations again in the backward pass: less memory, up to half more work. auto: as few layers as
    the GPU's memory asks for, none on a CPU; on: all; off: none."""
    micro_batch_tokens: Annotated[int | None, Field(ge=64, le=LARGEST)] = None
    """Tokens computed at once; memory grows with it, the result does not depend on it. Default: what is fastest in the
    GPU's memory, at most 32768; 2048 on a CPU."""
    memory_gib: Annotated[float | None, Field(ge=1)] = None
    """GPU memory that the run may take, GiB, what CUDA itself takes included; it is held to that. Default: what is free
    when it starts."""
    compile: bool = True
    """On a GPU, compile each layer: some ten seconds at the start, then much faster. The result differs by rounding."""
    cuda_graphs: bool = True
    """On a GPU with compile, record a small model's passes as CUDA graphs, if they give the same gradients, and repeat
    them: several times faster where Python could not start kernels as fast as they end."""
    deterministic: bool = False
    """On a GPU, compute the same bits every time, so that a resumed run ends as one that was never stopped: slower, and
    without CUDA graphs. On a CPU every run does."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Decides the order of rows, the adapter's first weights and dropout."""
    start_from: str | None = None
    """An adapter folder to start from (its rank, alpha and targets must be those of [lora])."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Strategy:
    """Training on slices of the rows one after another, as they would arrive. Each slice is a phase of the run."""

    kind: Literal["plain", "sequential", "cumulative", "replay", "stream"] = "plain"
    """plain: one phase, all rows. sequential: each slice alone. cumulative: each slice with all before it. replay: each
    slice with some rows of those before it. stream: the slices in one global warmup-stable-decay schedule."""
    slices: Count | None = None
    """How many slices, of equal size; 4 unless `ends` or `slice_rows` tell."""
    ends: tuple[Count, ...] | None = None
    """In place of `slices`: where each slice ends in the training order, rising; ends beyond the rows are cut off."""
    slice_rows: Count | None = None
    """At most N rows in a slice; rows that are then in no slice are not trained on."""
    column: str | None = None
    """A column of the prepared rows (`dataset`, `solver`) whose values make the slices, each value in one of them. By
    default a slice is a stretch of the training order, which is random."""
    replay_ratio: Annotated[float, Field(ge=0)] = 0.1
    """replay: old rows for each new one, drawn evenly by label and by the slice they come from."""
    optimizer_state: Literal["reset", "keep"] = "reset"
    """Whether the optimiser's moments are reset at the start of a phase; stream keeps them."""
    start_from: Literal["last", "best"] = "last"
    """The adapter a phase starts from: the last, or that of the lowest validation loss so far. stream: the last."""
    presentations: Count | None = None
    """Row presentations of the whole run, repeats counted: epochs are stretched to it, to compare strategies at equal
    cost. Default: what train.epochs gives."""
    cooldowns: tuple[Count, ...] = ()
    """stream: after so many row presentations a branch trains on rows seen so far while the rate falls to 0, for
    train.decay_ratio of the steps so far; its adapter is kept and the main line goes on as if it had not been."""
    probe_rows: Annotated[int, Field(ge=0, le=LARGEST)] = 200
    """Rows in each of a slice's two probes of forgetting (rows trained on; held-out questions of its kind); 0: none."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Phase:
    """One phase of a run that lists its own."""

    rows: tuple[Annotated[int, Field(ge=0, le=LARGEST)], Count]
    """The rows trained on: those of the training order from the first number up to, without, the second."""
    replay_ratio: Annotated[float, Field(ge=0)] = 0.0
    """Rows of earlier phases for each row of this one, drawn evenly by label and by the phase that brought them."""
    epochs: Annotated[float | None, Field(gt=0, le=1e6)] = None
    """How often each row is shown. Default: train.epochs, like the next three."""
    lr: Annotated[float | None, Field(gt=0)] = None
    """The highest learning rate."""
    schedule: Schedule | None = None
    """How the learning rate falls within the phase."""
    warmup_ratio: Annotated[float | None, Field(ge=0, lt=1)] = None
    """The part of the phase's steps over which the learning rate rises."""
    optimizer_state: Literal["reset", "keep"] = "reset"
    """Whether the optimiser's moments are reset at the start."""
    start_from: Literal["last", "best"] = "last"
    """The adapter to start from: the last, or that of the lowest validation loss so far."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Validation:
    """How often the adapter is measured while it trains."""

    every: Count = 200
    """Steps between two validations; there is always one at the end."""
    rows: Count | None = 1000
    """Use at most N validation rows, of whole questions. `veritune evaluate` measures on all of them."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Checkpoint:
    """How often the run is saved, so that it can go on after a stop."""

    every: Count = 200
    """Steps between two checkpoints; there is always one at the end."""
    keep: Count = 2
    """Checkpoints that are kept."""
    replica: str | None = None
    """A folder on a mounted drive, one for each run, to which every checkpoint is copied after it was saved. The folder
    above it must exist. A new machine goes on from the copy alone."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Session:
    """The time that one session has."""

    hours: Annotated[float | None, Field(gt=0)] = None
    """Save and stop before the command has run this long (`--hours 12`); the same command again goes on."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Track:
    """Where else the run is shown. metrics.jsonl is always written; nothing is sent anywhere unless this asks for it.
    Keys and tokens are taken from the environment (WANDB_API_KEY, HF_TOKEN), never from here."""

    to: tuple[Literal["wandb", "trackio", "tensorboard"], ...] = ()
    """The trackers; each needs the extra of its name. `--track wandb` on the command line."""
    project: Annotated[str, Field(min_length=1)] = "veritune"
    """wandb, trackio: the project."""
    name: Annotated[str, Field(min_length=1)] | None = None
    """wandb, trackio: the run's name, with the trial's number in a sweep. Default: that of the run folder."""
    group: Annotated[str, Field(min_length=1)] | None = None
    """wandb, trackio: the group that the run belongs to; trials of a sweep have the sweep's."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Run:
    """One training run."""

    out: Place
    """The run folder. The same command again goes on from its last checkpoint."""
    phases: tuple[Phase, ...] = ()
    """Phases spelt out, in place of a strategy: each `[[phases]]` table is one."""
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    prompt: Prompt = field(default_factory=Prompt)
    lora: Lora = field(default_factory=Lora)
    train: Train = field(default_factory=Train)
    strategy: Strategy = field(default_factory=Strategy)
    validation: Validation = field(default_factory=Validation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    session: Session = field(default_factory=Session)
    track: Track = field(default_factory=Track)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Columns:
    """Names of the columns that hold a row's parts; by default the usual names are recognised."""

    question: str | None = None
    """The problem's text."""
    solution: str | None = None
    """The worked solution's text."""
    label: str | None = None
    """Whether the solution is correct."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Prepare:
    """How labelled rows become a frozen dataset."""

    columns: Columns = field(default_factory=Columns)
    validation_rows: Annotated[int | None, Field(ge=0, le=LARGEST)] = None
    """Rows held out for validation, by question. Default: 5,000 or 5 % of the rows, the smaller, of questions that hold
    at most a quarter of the rows."""
    validation_per_question: Count = 8
    """Validation rows of one question; more questions make a tighter interval than more rows of one."""
    balance: str = "undersample"
    """Labels in train. none: as they come; undersample: 50/50 by dropping from the larger class; or a ratio of True
    rows such as 0.4, reached by dropping."""
    balance_validation: bool = False
    """Balance the validation rows too; by default they keep the labels' natural share."""
    limit: Annotated[int | None, Field(ge=2, le=LARGEST)] = None
    """Keep at most N train rows, with the labels' shares kept."""
    max_row_bytes: Annotated[int, Field(ge=100, le=LARGEST)] = 1_000_000
    """A row whose question and solution together are larger than this is refused."""
    allow_refused: Annotated[float, Field(ge=0, le=1)] = 0.05
    """The part of rows that may be refused before preparing stops."""
    near_duplicates: bool = False
    """Count near-duplicate questions across the splits (5-gram MinHash; needs the extra near-duplicates)."""
    seed: Annotated[int, Field(ge=0, le=LARGEST)] = 0
    """Decides which questions are held out and which rows are dropped."""


MAY_HOLD_PASSWORD = ("storage",)  # a database's URL, which is written nowhere


def keys(cls: Any, prefix: str = "") -> list[str]:
    """Every dotted key of a settings class, for suggestions and for comparing runs."""
    out = []
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(item.type):
            out += keys(item.type, f"{prefix}{item.name}.")
        else:
            out.append(prefix + item.name)
    return out


def build(cls: type[T], values: dict[str, Any], where: str, beside: Sequence[str] = ()) -> T:
    """Checks `values` (nested, as TOML gives it) against a settings class. beside: tables that were taken out of them.

    Raises ConfigError that names each wrong key or value, `where` it stands, and the nearest right key.
    """
    for key, value in flat(values).items():
        if key.rpartition(".")[2] not in MAY_HOLD_PASSWORD and any(map(holds_secret, _texts(value))):
            raise ConfigError(
                f"{where}: {key} holds a key, token or password, which would be written into the run folder and the "
                "model card. Take it out; the environment (HF_TOKEN, WANDB_API_KEY, PGPASSWORD) is the place for it"
            )
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        lines = [_explain(cls, item, beside) for item in error.errors()]
    raise ConfigError(f"{where}: " + "; ".join(lines))


def _texts(value: Any) -> list[str]:
    if isinstance(value, list | tuple):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) else []


def _explain(cls: Any, item: Any, beside: Sequence[str]) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = keys(cls) + [f.name for f in dataclasses.fields(cls) if dataclasses.is_dataclass(f.type)] + [*beside]
        known += [f"{listed}.{name}" for listed, kind in tables(cls).items() for name in keys(kind)]
        meant = ".".join(str(part) for part in item["loc"] if not isinstance(part, int))
        return f"unknown key {key!r}{did_you_mean(nearest(meant, known))}"
    if item["type"] in ("missing", "missing_keyword_only_argument"):
        return f"{key!r} is not set"
    if item["type"] == "too_short":
        return f"{key} is empty: write one name at least, such as q_proj; without {key} its default stands"
    return refused(item)


def read_run(path: Path, out: str | None = None) -> Run:
    """Reads a run file. out: the run's folder where the file names none, since a flag does. Raises as `read_sweep`."""
    return read_sweep(path, out)[0]


def read_sweep(path: Path, out: str | None = None) -> tuple[Run, Sweep, dict[str, Any]]:
    """Reads a run file: the run, how to search around it, and the content of its `[sweep.space]`, unchecked. Raises
    MissingError or ConfigError."""
    values = {**({} if out is None else {"out": out}), **read_toml(path)}
    searched = values.pop("sweep", {})
    space = searched.pop("space", {}) if isinstance(searched, dict) else {}
    run = build(Run, values, str(path), ["sweep"])
    if not isinstance(searched, dict) or not isinstance(space, dict):
        raise ConfigError(f"{path}: [sweep] and [sweep.space] must be tables")
    return run, build(Sweep, searched, f"{path}: [sweep]", ["space"]), space


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file's content. Raises MissingError or ConfigError."""
    if not path.is_file():
        raise MissingError(f"{path}: no such run file")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def as_dict(settings: Any) -> dict[str, Any]:
    """Plain JSON values of a settings object, every key spelt out."""
    return json.loads(TypeAdapter(type(settings)).dump_json(settings))


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"train": {"lr": 1}}` -> `{"train.lr": 1}`."""
    out: dict[str, Any] = {}
    for key, value in settings.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out
