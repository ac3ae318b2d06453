"""Settings of a study: its models, what a participant does, whom it is open to, and what was planned.

A model is served by this program or is behind an endpoint. Names of models are for the store and the report; nothing
that reaches a participant's browser depends on them.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Literal

from simrl.remote.settings import EndpointSettings
from simrl.run.config import NO_EFFECT, to_dict
from simrl.serving.shapes import EngineSettings
from simrl.study.flags import MEANINGS, ScreenSettings

ENCODED_BYTES = 12  # of a character in a form, at most: four of UTF-8, each as %XX
OTHER_BYTES = 4096  # of a form, beside its texts
NOTES = 3  # questions before writing, each answered at most at a message's length


@dataclasses.dataclass(frozen=True)
class StudyModel:
    """One of the assistants that are compared; exactly one of the two fields is given."""

    # A name as `tools.serve` takes it: RUN/ASSISTANT, a folder, OWNER/MODEL, a .gguf file. This program serves it.
    source: str = ''
    endpoint: EndpointSettings | None = None  # an OpenAI-compatible server that runs already

    def __post_init__(self) -> None:
        if bool(self.source) == (self.endpoint is not None):
            found = 'both' if self.source else 'neither'
            raise ValueError(f'StudyModel: expected a source or an endpoint, found {found}')


@dataclasses.dataclass(frozen=True)
class TaskSettings:
    """The work of a participant. Counts of exchanges leave out the training exchange."""

    exchanges: int = 5  # min exchanges before the final text
    max_exchanges: int = 15  # the conversation ends after as many
    check_tries: int = 2  # tries of the comprehension check
    message_chars: int = 8000  # max characters of a message
    min_words: int = 200  # min words of the final text
    text_chars: int = 40_000  # max characters of the final text
    reason_chars: int = 2000  # max characters of a reason
    min_reason_chars: int = 3
    temperature: float = 0.7  # of the assistants
    max_tokens: int = 2048  # max tokens of a reply
    tries: int = 3  # max times a message finds no replies; then it must be sent anew, in other words or the same

    def __post_init__(self) -> None:
        for field in ('exchanges', 'check_tries', 'message_chars', 'text_chars', 'reason_chars', 'max_tokens', 'tries'):
            if getattr(self, field) < 1:
                raise ValueError(f'TaskSettings.{field}: expected at least 1, found {getattr(self, field)!r}')
        for field in ('min_words', 'min_reason_chars', 'temperature'):
            if getattr(self, field) < 0:
                raise ValueError(f'TaskSettings.{field}: expected at least 0, found {getattr(self, field)!r}')
        if self.max_exchanges < self.exchanges:
            raise ValueError(
                f'TaskSettings.max_exchanges: expected at least exchanges ({self.exchanges}), '
                f'found {self.max_exchanges}'
            )


@dataclasses.dataclass(frozen=True)
class PanelSettings:
    """Completion codes of a panel of participants such as Prolific's, one per outcome, and the way back to it."""

    # The link back, with {code} where the code goes, for instance
    # https://app.prolific.com/submissions/complete?cc={code}; empty: the code alone is shown.
    return_url: str = ''
    completed: str = 'COMPLETED'
    declined: str = 'DECLINED'  # no consent
    failed_check: str = 'CHECKED'
    withdrawn: str = 'WITHDRAWN'
    # The study was full or paused when they came. Or a model or type that they began with was taken out of the config:
    # whoever has enough exchanges still completes the study, others have agreed and are owed their time.
    closed: str = 'CLOSED'
    # Who may enter: `panel` needs PROLIFIC_PID, STUDY_ID and SESSION_ID in the URL, `open` gives anyone an id.
    # The panel's link is a key, and no more is asked for: whoever knows the PROLIFIC_PID and STUDY_ID of a participant
    # reads their conversation and goes on in their place, by another SESSION_ID, too (as from a second device).
    # Withdrawing does not need more, either: participants are promised it at any moment, and it deletes nothing.
    # Deleting needs the SESSION_ID of the first time, or a browser that came by it.
    entry: Literal['panel', 'open'] = 'panel'
    study_ids: tuple[
        str, ...
    ] = ()  # STUDY_IDs that are let in; none: any, each participant by that of their first time

    def __post_init__(self) -> None:
        codes = {name: getattr(self, name) for name in CODES}
        if len(set(codes.values())) < len(codes) or not all(codes.values()):
            raise ValueError(f'PanelSettings: expected another code of each outcome, found {codes}')
        if self.return_url and not self.return_url.startswith('https://'):
            raise ValueError(f'PanelSettings.return_url: expected https://..., found {self.return_url!r}')


CODES = ('completed', 'declined', 'failed_check', 'withdrawn', 'closed')


@dataclasses.dataclass(frozen=True)
class PlanSettings:
    """The analysis plan. Its hash is stored at the first consent, and a report says where it departs from it."""

    participants: int = 283  # planned number who complete, all pairs together
    effect: float = 0.58  # win rate that the study is to find
    power: float = 0.8
    level: float = 0.95  # nominal coverage of intervals, over all pairs (Holm)
    tie_share: float = 0.2  # assumed until votes are there
    clustering: float = 0.1  # intraclass correlation of a participant's votes, assumed until votes are there
    # Shares of the planned participants, below 1, at which an interim look is allowed.
    looks: tuple[float, ...] = ()
    spending: Literal['obrien_fleming', 'pocock'] = 'obrien_fleming'  # alpha spent by looks (Lan and DeMets 1983)
    primary: Literal['participant', 'vote'] = 'participant'  # unit that the primary win rate weighs alike
    excluded_flags: tuple[str, ...] = ()  # flags whose participants the primary analysis leaves out

    def __post_init__(self) -> None:
        if not 0.5 < self.effect < 1:
            raise ValueError(f'PlanSettings.effect: expected more than .5 and less than 1, found {self.effect!r}')
        for field in ('power', 'level'):
            if not 0 < getattr(self, field) < 1:
                raise ValueError(
                    f'PlanSettings.{field}: expected a share between 0 and 1, found {getattr(self, field)!r}'
                )
        for field in ('tie_share', 'clustering'):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(
                    f'PlanSettings.{field}: expected from 0 to less than 1, found {getattr(self, field)!r}'
                )
        if self.participants < 1:
            raise ValueError(f'PlanSettings.participants: expected at least 1, found {self.participants!r}')
        if list(self.looks) != sorted(set(self.looks)) or not all(0 < look < 1 for look in self.looks):
            raise ValueError(f'PlanSettings.looks: expected rising shares between 0 and 1, found {self.looks}')
        if unknown := sorted(set(self.excluded_flags) - set(MEANINGS)):
            raise ValueError(f'PlanSettings.excluded_flags: expected names of {", ".join(MEANINGS)}, found {unknown}')


@dataclasses.dataclass(frozen=True)
class WebSettings:
    """The address of the study's pages and their limits. Sizes are bytes, times seconds."""

    host: str = dataclasses.field(default='127.0.0.1', metadata=NO_EFFECT)  # 0.0.0.0 is reached from other machines
    port: int = dataclasses.field(default=8080, metadata=NO_EFFECT)  # 0: a free one, which is printed
    # The pages are reached by https, through a proxy: cookies are sent by it alone.
    https: bool = dataclasses.field(default=False, metadata=NO_EFFECT)
    # Environment variable with the token of the administrators, at least 16 characters.
    admin_variable: str = dataclasses.field(default='SIMRL_STUDY_ADMIN', metadata=NO_EFFECT)
    body_bytes: int = dataclasses.field(default=2**20, metadata=NO_EFFECT)  # max size of a request's body
    poll_seconds: float = dataclasses.field(default=2.0, metadata=NO_EFFECT)  # between two looks of a waiting page
    admin_tries: int = dataclasses.field(default=10, metadata=NO_EFFECT)  # wrong tokens in a minute, from one address
    drain_seconds: float = dataclasses.field(default=30.0, metadata=NO_EFFECT)  # for replies under way once it stops

    def __post_init__(self) -> None:
        def check(field: str, ok: bool, expected: str) -> None:
            if not ok:
                raise ValueError(f'WebSettings.{field}: expected {expected}, found {getattr(self, field)!r}')

        check('host', bool(self.host), 'an address')
        check('port', 0 <= self.port < 2**16, '0 (a free one) to 65535')
        check('admin_variable', bool(self.admin_variable), 'a name')
        check('poll_seconds', self.poll_seconds > 0, 'more than 0')
        check('admin_tries', self.admin_tries >= 1, 'at least 1')
        check('drain_seconds', self.drain_seconds >= 0, 'at least 0')


@dataclasses.dataclass(frozen=True)
class StudySettings:
    """A study."""

    name: str = 'study'  # shown to no participant
    models: dict[str, StudyModel] = dataclasses.field(default_factory=dict)  # by name
    pairs: tuple[str, ...] = ()  # FIRST:SECOND, names of models; none: all pairs are compared
    # A database by its URL: sqlite:///FILE or postgresql://USER@HOST/NAME. Its password is in PGPASSWORD or .pgpass.
    store: str = dataclasses.field(default='sqlite:///study.sqlite', metadata=NO_EFFECT)
    # `live`, or `rehearsal`: a store is of one of the two for ever. Previews (see the admin page) are in neither.
    mode: Literal['live', 'rehearsal'] = 'live'
    # A YAML file of document types and tasks; None: the 36 that simrl ships. What is in it is a part of the config's
    # hash, its place is not.
    tasks: pathlib.Path | None = dataclasses.field(default=None, metadata=NO_EFFECT)
    # A YAML file of the pages' texts, of which missing ones are simrl's; hashed as `tasks`.
    texts: pathlib.Path | None = dataclasses.field(default=None, metadata=NO_EFFECT)
    seed: int = 0  # of all draws, together with the store's secret
    # A participant without an action for so long gives back their place in the balance; they may still continue.
    gone_seconds: float = 3600.0
    task: TaskSettings = TaskSettings()
    panel: PanelSettings = PanelSettings()
    plan: PlanSettings = PlanSettings()
    web: WebSettings = WebSettings()
    engine: EngineSettings = EngineSettings(rows=16)  # of each model that this program serves
    moderation: EndpointSettings | None = None  # answers POST {url}/moderations; None: messages are not moderated
    screens: ScreenSettings = ScreenSettings()
    screen: EndpointSettings | None = None  # a judge that screens finished conversations; None: heuristics alone

    def __post_init__(self) -> None:
        if len(self.models) < 2:
            raise ValueError(f'StudySettings.models: expected at least two models, found {len(self.models)}')
        for name in self.models:
            if not re.fullmatch(r'[\w.-]+', name):
                raise ValueError(f'StudySettings.models: expected names of letters, digits, _ . -, found {name!r}')
        for pair, names in zip(self.pairs, self.compared if self.pairs else (), strict=True):
            if len(set(names)) != 2 or not set(names) <= set(self.models):
                raise ValueError(
                    f'StudySettings.pairs: expected FIRST:SECOND, two of {sorted(self.models)}, found {pair!r}'
                )
        if len({frozenset(pair) for pair in self.compared}) < len(self.compared):
            raise ValueError(f'StudySettings.pairs: expected each pair once, found {self.pairs}')
        characters = max(self.task.text_chars, NOTES * self.task.message_chars)  # of the longest form
        if self.web.body_bytes < (least := ENCODED_BYTES * characters + OTHER_BYTES):
            raise ValueError(
                f'StudySettings.web.body_bytes: expected at least {least}, for {characters} '
                f'characters of a form, found {self.web.body_bytes}'
            )
        if self.gone_seconds <= 0:
            raise ValueError(f'StudySettings.gone_seconds: expected more than 0, found {self.gone_seconds!r}')

    @property
    def compared(self) -> tuple[tuple[str, str], ...]:
        """The pairs of names of models, each in the order of `models` or as given."""
        if self.pairs:
            return tuple((first, second) for first, _, second in (pair.partition(':') for pair in self.pairs))
        names = list(self.models)
        return tuple((first, second) for n, first in enumerate(names) for second in names[n + 1 :])


def plan_of(settings: StudySettings) -> dict[str, Any]:
    """The analysis plan as a JSON object: what is frozen at the first consent, and a report is held against."""
    task = settings.task
    return {
        **to_dict(settings.plan),
        'pairs': [list(pair) for pair in settings.compared],
        'exchanges': task.exchanges,
        'max_exchanges': task.max_exchanges,
        'min_words': task.min_words,
        'screens': to_dict(settings.screens),
    }


def hashed(value: Mapping[str, object]) -> str:
    """The SHA-256, in hex, of a mapping as JSON with sorted keys: an analysis plan's, or a config's."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
