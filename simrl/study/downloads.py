"""Files that administrators download: tables of a study, blind ones or those of a look."""

import asyncio
import re
from collections.abc import Mapping, Sequence

from fastapi.responses import Response

from simrl.study import export, tables
from simrl.study.events import Stored
from simrl.study.running import Running
from simrl.study.web import PageError

FORMATS = {'jsonl': 'application/jsonl', 'parquet': 'application/vnd.apache.parquet', 'csv': 'text/csv; charset=utf-8'}


async def table_of(
    running: Running,
    events: Sequence[Stored],
    flags: Mapping[str, Sequence[str]],
    name: str,
    kind: str,
    *,
    blind: bool,
) -> Response:
    """A table of the study's mode as a file.

    Args:
        events: of the store, those that count.
        flags: names by participant.
        name: turns, participants or preferences; `kind`: jsonl or parquet.

    Raises:
        PageError: there is no such table.
    """
    if name not in ('turns', 'participants', 'preferences') or kind not in ('jsonl', 'parquet'):
        raise PageError(404, 'There is no such table.')

    def make() -> bytes:
        taken = export.snapshot(events, running.settings.mode, flags)
        if name == 'preferences':
            found, _ = export.preferences(taken, running.settings.name, blind=blind)
            table = export.preference_rows(found)
        else:
            table = export.turn_rows(taken, blind=blind) if name == 'turns' else export.participant_rows(taken)
        return b''.join(tables.to_jsonl(table.rows)) if kind == 'jsonl' else tables.to_parquet(table)

    return download(running, name if blind else f'{name}-unblinded', kind, await asyncio.to_thread(make))


async def payments(running: Running) -> Response:
    """The list of payments, by the panel's ids."""
    identities = await asyncio.to_thread(running.store.identities)
    table = export.payment_rows(running.participants.values(), identities, running.settings)
    return download(running, 'payments', 'csv', tables.to_csv(table).encode())


def download(running: Running, name: str, kind: str, content: bytes) -> Response:
    study = re.sub(r'[^A-Za-z0-9_.-]+', '-', running.settings.name)
    file = f'{study}-{running.settings.mode}-{name}.{kind}'
    headers = {'Content-Disposition': f'attachment; filename="{file}"'}
    return Response(content, media_type=FORMATS[kind], headers=headers)
