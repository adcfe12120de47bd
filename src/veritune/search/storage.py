"""The database of a sweep: SQLite in its folder, for one machine, or PostgreSQL."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy
from optuna.storages import RDBStorage
from sqlalchemy.exc import ArgumentError, OperationalError, SQLAlchemyError

from ..errors import ConfigError


@contextmanager
def here_alone(folder: Path) -> Iterator[None]:
    """One process of this machine at a time."""
    with (folder / ".lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def open_sqlite(database: Path) -> RDBStorage:
    url = sqlalchemy.URL.create("sqlite", database=str(database)).render_as_string()
    return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}}, skip_compatibility_check=True)


def open_storage(url: str | None, database: Path) -> RDBStorage:
    """Optuna's storage: the SQLite file, or a PostgreSQL URL. Raises ConfigError, without the URL's password."""
    if url is None:
        with here_alone(database.parent):  # two that make the tables at once would collide
            if not database.exists():  # all of them or none: without its index a study can be there twice
                new = database.with_suffix(".new")
                new.unlink(missing_ok=True)
                open_sqlite(new).engine.dispose()
                new.rename(database)
            return open_sqlite(database)
    try:
        parsed = sqlalchemy.make_url(url)
    except ArgumentError:
        raise ConfigError("sweep.storage is not a URL; write postgresql://USER@HOST/DATABASE") from None
    if parsed.get_backend_name() != "postgresql":
        raise ConfigError(f"sweep.storage: {parsed.drivername} is not supported; use postgresql://USER@HOST/DATABASE")
    parsed = parsed.set(drivername="postgresql+psycopg")
    hidden = parsed.render_as_string(hide_password=True)
    for attempt in range(5):
        try:
            return RDBStorage(parsed.render_as_string(hide_password=False), engine_kwargs={"pool_pre_ping": True})
        except ImportError as error:
            raise ConfigError(f"sweep.storage: {error.name} is missing; pip install 'veritune[sweep]'") from None
        except OperationalError as error:
            reason = str(error.orig).strip().splitlines()[0]
            raise ConfigError(f"sweep.storage: {hidden} cannot be reached: {reason}") from None
        except SQLAlchemyError:  # another worker makes the tables at this moment
            if attempt == 4:
                raise
            time.sleep(1 + attempt)
    raise AssertionError
