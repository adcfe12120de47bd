"""Weights & Biases, Trackio and TensorBoard, each behind the same six calls. Used only inside the worker process.

A service is made with a `Spec`; then come `log` for the numbers of a step, `table` for a small table of texts and
numbers, `picture` for a PIL image, `flush`, and `close` at the end. Any of them may raise anything or hang: the worker
is there for that.
"""

import io
import netrc
import os
import time
import urllib.parse
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Row = Sequence[Any]


@dataclass(frozen=True)
class Spec:
    """What a tracker is told of a run."""

    folder: str
    """Where its files may go."""
    project: str
    name: str
    group: str | None
    identity: str
    """Names the run from session to session."""
    settings: dict[str, Any]
    """The run's settings, flat."""


class Service(Protocol):
    def log(self, step: int, values: dict[str, float]) -> None: ...

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Row]) -> None: ...

    def picture(self, step: int, name: str, image: Any) -> None: ...

    def flush(self) -> None: ...

    def close(self, *, failed: bool) -> None: ...


class Wandb:
    """Weights & Biases. Without an account, or with WANDB_MODE=offline, its files stay in the run folder."""

    def __init__(self, spec: Spec) -> None:
        import wandb

        self._wandb = wandb
        self.note: str | None = None
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if _wandb_account() else "offline")
        folder = os.environ.get("WANDB_DIR") or spec.folder
        if mode == "offline":
            self.note = f"no network is used; the files are in {folder}/wandb, `wandb sync` sends them"
        self._run = wandb.init(
            mode=mode,
            project=spec.project,
            name=spec.name,
            group=spec.group,
            id=spec.identity,
            resume="allow",
            dir=folder,
            config=spec.settings,
            # Nothing is sent that was not asked for: no console, no code, no command line, no list of packages.
            settings=wandb.Settings(
                console="off",
                silent=True,
                save_code=False,
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
        table = self._wandb.Table(columns=list(columns), data=[list(map(_cell, row)) for row in rows])
        self._run.log({name: table}, step=step)

    def picture(self, step: int, name: str, image: Any) -> None:
        self._run.log({name: self._wandb.Image(image)}, step=step)

    def flush(self) -> None: ...

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _wandb_account() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    places = [Path(os.environ["NETRC"])] if "NETRC" in os.environ else [Path("~/.netrc"), Path("~/_netrc")]
    for place in places:
        try:
            if netrc.netrc(str(place.expanduser())).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


class Trackio:
    """Trackio: a SQLite file in TRACKIO_DIR, or the server that its own variables name.

    What it could not write it drops with a Python warning, so its warnings are errors here.
    """

    def __init__(self, spec: Spec) -> None:
        import trackio

        self.note: str | None = None
        self._lost: list[str] = []
        own = str(Path(trackio.__file__).parent)
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, kind, file, *rest: (
            self._lost.append(str(message)) if kind is UserWarning and file.startswith(own) else None
        )
        self._markdown, self._image = trackio.Markdown, trackio.Image
        self._run = trackio.init(
            project=spec.project,
            name=f"{spec.name}-{spec.identity}",
            group=spec.group,
            config=spec.settings,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
        self._run.log({name: self._markdown(markdown(columns, rows))}, step=step)

    def picture(self, step: int, name: str, image: Any) -> None:
        self._run.log({name: self._image(image)}, step=step)

    def flush(self) -> None:
        """Writes what is queued. Raises OSError if some of it could not be written."""
        if self._run._is_local:  # a server gets it from trackio's own thread, which keeps what it cannot send
            with self._run._client_lock:
                self._run._flush_queues_inline()
            self._check()

    def close(self, *, failed: bool) -> None:
        self._run.finish()
        self._check()

    def _check(self) -> None:
        if self._lost:
            raise OSError(self._lost[0])


class TensorBoard:
    """Event files in the run folder, written with TensorBoard's own writer: torch is not needed."""

    def __init__(self, spec: Spec) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.note: str | None = None
        protos: tuple[Any, Any] = (event_pb2, summary_pb2)  # whose classes are made when they are imported
        self._event, self._summary, self._text = protos[0].Event, protos[1].Summary, text_pb
        self._writer = EventFileWriter(spec.folder)
        rows = [(key, value) for key, value in spec.settings.items()]
        self.table(0, "settings", ("setting", "value"), rows)

    def log(self, step: int, values: dict[str, float]) -> None:
        found = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=found)))

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
        summary = self._text(name, markdown(columns, rows))
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def picture(self, step: int, name: str, image: Any) -> None:
        out = io.BytesIO()
        image.save(out, "PNG")
        width, height = image.size
        png = self._summary.Image(height=height, width=width, colorspace=3, encoded_image_string=out.getvalue())
        summary = self._summary(value=[self._summary.Value(tag=name, image=png)])
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        self._writer.close()


def _cell(value: Any) -> Any:
    return value if isinstance(value, str | int | float) or value is None else str(value)


def markdown(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """A Markdown table."""

    def line(cells: Sequence[Any]) -> str:
        shown = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
        return "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in shown) + " |"

    return "\n".join([line(columns), line(["---"] * len(columns)), *map(line, rows)])


SERVICES = {"wandb": Wandb, "trackio": Trackio, "tensorboard": TensorBoard}
