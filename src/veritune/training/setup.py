"""From a run's settings to what trains: data, plan, weights and adapter, checked against each other and made fast."""

from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from .. import config
from ..errors import MissingError, ModelError
from ..model import adapter, load, self_check, swiglu
from ..model.compiled import compile_layers, gradients, plain_layers
from ..model.graphs import launch_bound, own_stream, record
from ..tokens import prompt
from ..tokens.encode import encoder
from . import distributed, room
from . import optimizer as optimizers
from .feed import micro_batches, read
from .state import Training
from .step import micro_loss


def prepare(
    run: config.Run, console: Console, base: load.Base | None = None, world: distributed.World = distributed.ALONE
) -> Training:
    """Reads the data and makes the plan, loads weights and adapter, and checks them against each other."""
    source = read(run)
    space = room.limit(run, base.device if base else load.pick_device(run.model.device))
    with console.status("loading the model"):
        base = base or load.load_base(run.model)
        load.check_length(base, run.prompt.max_length)
        words = prompt.render(run.prompt, base.tokenizer)
        rows_encoder = replace(encoder(words, base.tokenizer), known=base.ids)
        self_check.check_paths(base, run.prompt.max_length)
    if slower := self_check.slower(base, run.prompt.max_length):
        console.out(slower, style="yellow", highlight=False)
    start = run.train.start_from if not begun_from_nothing(run) else None
    model = adapter.add_adapter(base, run.lora, seed=run.train.seed, start_from=start)
    if start is not None and (told := other_words(start, words.answers)):
        console.out(told, style="yellow", highlight=False)
    if problem := swiglu.problem(model):
        console.out(f"MLPs are computed layer by layer, which is slower: {problem}", style="yellow", highlight=False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    state = Training(
        run=run,
        source=source,
        base=base,
        model=model,
        optimizer=optimizers.make(parameters, run.train),
        encoder=rows_encoder,
        way=base.ways[run.prompt.max_length],
        budget=run.train.micro_batch_tokens or room.UNFORESEEN[base.device.type],
        about=adapter.About(
            words, base.path, base.precision, source.fingerprint, float(source.train.labels.mean()), base.weights
        ),
        world=world,
        recomputed=len(load.layers(model)) if run.train.gradient_checkpointing == "on" else 0,
    )
    room.use(state, room.planned(state, space))
    room.unpack(state)
    if state.planned and not state.planned.fit.fits:
        console.print(f"memory may not suffice: {state.planned}", style="yellow", markup=False)
    if run.train.compile and base.device.type == "cuda" and state.way == "paths":
        with console.status("compiling the layers"):
            speed_up(state, console)
    else:
        plain_layers(model)
    if run.lora.dropout:  # it depends on how a step is cut, which memory may have decided otherwise on each rank
        state.budget = min(world.gather(state.budget))
    return state


def begun_from_nothing(run: config.Run) -> bool:
    """Whether train.start_from names an adapter that is not there (any more): a run that goes on does not need it."""
    return run.train.start_from is not None and not Path(run.train.start_from).expanduser().is_dir()


def other_words(start: str, answers: tuple[str, str]) -> str | None:
    """What to know of an adapter to start from that was trained with other answer words; None if it was not, or does
    not tell, not being of veritune's making."""
    with suppress(MissingError, ModelError):
        before = adapter.read_about(start).frame.answers
        if before != answers:
            return (
                f"train.start_from = {start!r}: this adapter learnt to answer {' or '.join(map(repr, before))}, not "
                f"{' or '.join(map(repr, answers))} (prompt.answers), so it begins with having to learn its words anew"
            )
    return None


def speed_up(state: Training, console: Console) -> None:
    """Compiles the layers and records passes, where that gives the same gradients on the run's first rows."""
    alone = replace(state, world=distributed.ALONE)
    graphs = state.run.train.cuda_graphs and not state.run.lora.dropout and launch_bound(state.model, state.budget)
    graphs = graphs and state.base.precision != "fp32"  # its attention asks the GPU for sizes
    if graphs:
        own_stream(state.base.device)
    # Plain layers, which these are compared with, take up to twice the memory: a few rows.
    _, (few, *_), _ = micro_batches(alone, 0, min(state.budget // 2, room.PROBE_TOKENS))
    compute = partial(gradients, state.model, partial(micro_loss, state, few))
    problem = compile_layers(state.model, compute, precision=state.base.precision)
    slower = "layers are not compiled"
    if problem:
        room.replan(state, compiled=False)
    elif graphs and not state.recomputed:
        slower, problem = "steps are not recorded as CUDA graphs", _recorded(state, alone)
    if problem:
        console.out(f"{slower}, which is slower: {problem}", style="yellow", highlight=False)


def _recorded(state: Training, alone: Training) -> str | None:
    """Records passes of the run's first rows; why it cannot."""
    before = state.planned
    if not room.for_recording(state):
        return "memory does not suffice for them beside a pass of another size"
    _, (micro, *_), _ = micro_batches(alone, 0, state.budget)
    assert micro.trie is not None, "only rows that share a beginning get here"
    state.graphs, problem = record(
        state.model, state.base.device, state.encoder.frame.answer_ids, micro.trie, micro.labels,
        lambda: micro_loss(state, micro), precision=state.base.precision,
    )  # fmt: skip
    if problem:
        room.use(state, before)
    return problem
