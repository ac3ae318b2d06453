"""Conversations on the host while the device decodes them: all their tokens in both views, and what is not fed yet.

1. `start_histories`: prompts, as `prompts.start_dialogue` has them on the device.
2. `replay_records`: recorded messages in the place of sampled ones.
3. `open_messages`: the next message's header in the view of its sender, or the conversation's end.
4. `add_sampled`: tokens of a block. `sampled_messages`, or `discard_messages`: the whole messages.
5. `end_messages`: the transcript has a message, and its receiver hears it.
6. `dialogue_of`: conversations as the device has them after `dialogue.conversing`.

What a view's model has to be fed before it samples is what its tokens have beyond `fed`, whether prompt, header or a
message that it heard.

Letters: N conversations, n of them in a call, S capacity of a context, M messages of a conversation, L tokens of a
message.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from simrl.conversations.chat import ASSISTANT, TEMPLATE, USER
from simrl.rollouts.agents import GenerationSpec, Limits
from simrl.rollouts.context import PREFIX, Context, capacities_from
from simrl.rollouts.dialogue import capacity
from simrl.rollouts.messages import header_lengths, room_to_receive, room_to_send
from simrl.rollouts.prompts import PromptRows, Prompts
from simrl.rollouts.state import Dialogue, EndReason, Transcript

ROLES = (USER, ASSISTANT)  # of the sides 0 and 1
SAID = ('messages', 'message_length', 'truncated', 'num_messages', 'num_given', 'end_reason')
COUNTED = ('decoded_steps', 'loop_steps', 'resamples')


@dataclasses.dataclass(frozen=True, eq=False)
class HostView:
    """One model's view, as `Context` without a cache; arrays are changed in place.

    Attributes beside those of `Context`:
        spec: of the model.
        fed: int32 `[N]`, the first tokens of each row that the cache has.
        most_fed: max tokens given to a row at once: what it hears, or a prompt.
        rooms: sizes of its caches in tokens, rising, the first with room for prompts.
    """

    spec: GenerationSpec
    tokens: np.ndarray
    role: np.ndarray
    message: np.ndarray
    log_prob: np.ndarray
    length: np.ndarray
    fed: np.ndarray
    most_fed: int
    rooms: tuple[int, ...]

    @property
    def capacity(self) -> int:
        return self.tokens.shape[1]


@dataclasses.dataclass(frozen=True, eq=False)
class Histories:
    """N conversations; arrays are changed in place.

    Attributes beside those of `Transcript`:
        views: of both sides, None for one that is not on the device.
        max_new_tokens: of both sides.
        max_messages: int32 `[N]`, with which a conversation ends as TURNS.
        begun: int32 `[N]`, the length of the sender's view where the content of the open message begins.
        attempt: int32 `[N]`, at the open message, 0 the first.
    """

    views: tuple[HostView | None, HostView | None]
    max_new_tokens: tuple[int, int]
    messages: np.ndarray
    message_length: np.ndarray
    truncated: np.ndarray
    num_messages: np.ndarray
    num_given: np.ndarray
    end_reason: np.ndarray
    decoded_steps: np.ndarray
    loop_steps: np.ndarray
    resamples: np.ndarray
    max_messages: np.ndarray
    begun: np.ndarray
    attempt: np.ndarray

    def view(self, side: int) -> HostView:
        view = self.views[side]
        assert view is not None
        return view

    @property
    def running(self) -> np.ndarray:
        return self.end_reason == EndReason.RUNNING


@dataclasses.dataclass(frozen=True, eq=False)
class Messages:
    """Whole messages of one side, as of `SampledMessage`: arrays `[n]`, content `[n, at most L]`."""

    rows: np.ndarray
    content: np.ndarray
    length: np.ndarray
    stopped: np.ndarray
    truncated: np.ndarray

    def where(self, chosen: np.ndarray) -> 'Messages':
        """Those that are chosen, bool `[n]`."""
        return Messages(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))


def start_histories(
    specs: Sequence[GenerationSpec | None],
    prompts: Prompts,
    *,
    limits: Limits,
    max_new_tokens: tuple[int, int],
) -> Histories:
    """Conversations before their first sampled message; none is open.

    Args:
        specs: of both sides, None for one that is not on the device.
        prompts: on the host.
    """
    rows, width = prompts.opening.shape

    def view(side: int, given: PromptRows) -> HostView | None:
        spec = specs[side]
        if spec is None:
            return None
        name = ('user', 'assistant')[side]
        size = capacity(spec, max_new_tokens[1 - side], limits.prompt_tokens, limits.turns, name)
        real = np.arange(given.tokens.shape[1]) < given.length[:, None]

        def padded(x: Any, dtype: type) -> np.ndarray:
            out: np.ndarray = np.zeros((rows, size), dtype)
            out[:, : x.shape[1]] = np.where(real, x, 0)
            return out

        return HostView(
            spec,
            padded(given.tokens, np.int32),
            padded(given.role, np.int8),
            padded(given.message, np.int16),
            np.zeros((rows, size), np.float32),
            np.array(given.length, np.int32),
            np.zeros(rows, np.int32),
            max(room_to_receive(spec, max_new_tokens[1 - side]) + header_lengths(spec)[0], given.tokens.shape[1]),
            capacities_from(given.tokens.shape[1], size),
        )

    views = view(0, prompts.user), view(1, prompts.assistant)
    longest, said = max(width, *max_new_tokens), 2 * limits.turns
    length = np.where(prompts.given, prompts.opening_length, 0).astype(np.int32)
    messages, lengths = np.zeros((rows, said, longest), np.int32), np.zeros((rows, said), np.int32)
    messages[:, 0, :width] = np.where(np.arange(width) < length[:, None], prompts.opening, 0)
    lengths[:, 0] = length
    truncated = np.zeros((rows, said), bool)
    truncated[:, 0] = prompts.truncated
    reason = np.array(prompts.end_reason, np.int8)
    for present in views:
        if present is not None:
            reason[(present.length == 0) & (reason == EndReason.RUNNING)] = EndReason.FAILURE
    given = np.array(prompts.given, np.int32)
    return Histories(
        views=views,
        max_new_tokens=max_new_tokens,
        messages=messages,
        message_length=lengths,
        truncated=truncated,
        num_messages=given.copy(),
        num_given=given,
        end_reason=reason,
        decoded_steps=np.zeros(rows, np.int32),
        loop_steps=np.zeros(rows, np.int32),
        resamples=np.array(prompts.resamples, np.int32),
        max_messages=np.full(rows, said, np.int32),
        begun=np.zeros(rows, np.int32),
        attempt=np.zeros(rows, np.int32),
    )


def append(
    view: HostView,
    rows: np.ndarray,
    tokens: np.ndarray,
    role: np.ndarray | int,
    message: np.ndarray,
    count: np.ndarray,
    log_prob: np.ndarray | float = 0.0,
) -> None:
    """Appends the first `count` `[n]` of `[n, T]` tokens to rows `[n]`; `role` and `log_prob` as tokens, or one."""
    row, index = np.nonzero(np.arange(tokens.shape[1]) < count[:, None])
    at = rows[row], view.length[rows][row] + index
    view.tokens[at] = tokens[row, index]
    view.role[at] = np.broadcast_to(role, tokens.shape)[row, index]
    view.message[at] = message[row]
    view.log_prob[at] = np.broadcast_to(log_prob, tokens.shape)[row, index]
    view.length[rows] += count


def _append_known(h: Histories, side: int, sender: int, messages: Messages) -> None:
    """Appends whole messages of a sender to the view of a side; no end-of-turn where a stop sequence ended one."""
    view, rows = h.view(side), messages.rows
    spec, number = view.spec, h.num_messages[rows]
    own = side == sender
    _append_header(view, rows, number, own=own)
    index = np.arange(messages.content.shape[1] + 1)
    ends = index == messages.length[:, None]
    end = spec.end_of_turn if own else spec.partner_end_of_turn
    tokens = np.where(ends, end, np.pad(messages.content, ((0, 0), (0, 1))))
    role = np.where(ends & messages.truncated[:, None], TEMPLATE, ROLES[sender])
    append(view, rows, tokens, role, number, messages.length + ~messages.stopped)


def _append_header(view: HostView, rows: np.ndarray, number: np.ndarray, *, own: bool) -> None:
    spec = view.spec
    later, first = (spec.own_header, spec.own_first_header) if own else (spec.partner_header, spec.partner_first_header)
    is_first = view.message[rows, view.length[rows] - 1] == PREFIX
    for header, chosen in ((later, ~is_first), (first, is_first)):
        if chosen.any() and header:
            tokens = np.tile(np.array(header, np.int32), (int(chosen.sum()), 1))
            append(view, rows[chosen], tokens, TEMPLATE, number[chosen], np.full(len(tokens), len(header)))


def open_messages(h: Histories, rows: np.ndarray) -> None:
    """Opens the next message of conversations `[n]` that run, or ends them where there is no room for one."""
    rows = rows[h.running[rows]]
    over = h.num_messages[rows] >= h.max_messages[rows]
    h.end_reason[rows[over]] = EndReason.TURNS
    rows = rows[~over]
    for side in (0, 1):
        own = rows[h.num_messages[rows] % 2 == side]
        sender, receiver = h.views[side], h.views[1 - side]
        fits = np.ones(len(own), bool)
        if sender is not None:
            fits &= sender.length[own] + room_to_send(sender.spec) <= sender.capacity
        if receiver is not None:
            room = room_to_receive(receiver.spec, h.max_new_tokens[side])
            fits &= receiver.length[own] + room <= receiver.capacity
        h.end_reason[own[~fits]] = EndReason.BUDGET
        own = own[fits]
        h.attempt[own] = 0
        if sender is not None and own.size:
            _append_header(sender, own, h.num_messages[own], own=True)
            h.begun[own] = sender.length[own]


def add_sampled(
    h: Histories, side: int, rows: np.ndarray, tokens: np.ndarray, log_prob: np.ndarray, count: np.ndarray
) -> None:
    """Appends the first `count` `[n]` of `[n, T]` sampled tokens to open messages; the cache has all but the last."""
    view = h.view(side)
    append(view, rows, tokens, ROLES[side], h.num_messages[rows], count, log_prob)
    view.fed[rows] = view.length[rows] - 1
    h.decoded_steps[rows] += count


def sampled_messages(h: Histories, side: int, rows: np.ndarray, stopped: np.ndarray) -> Messages:
    """The open messages of `rows`, whose last tokens are sampled."""
    view = h.view(side)
    last = view.tokens[rows, view.length[rows] - 1]
    ended = ~stopped & (last == view.spec.end_of_turn)
    length = view.length[rows] - h.begun[rows] - ended
    index = np.arange(h.messages.shape[2])
    at = np.minimum(h.begun[rows][:, None] + index, view.capacity - 1)
    content = np.where(index < length[:, None], view.tokens[rows[:, None], at], 0)
    return Messages(rows, content, length, stopped, ~stopped & ~ended)


def force_ends(h: Histories, side: int, messages: Messages) -> None:
    """Appends the end-of-turn to sampled messages that their budget cut."""
    view, rows = h.view(side), messages.rows[messages.truncated]
    end = np.full((len(rows), 1), view.spec.end_of_turn, np.int32)
    append(view, rows, end, TEMPLATE, h.num_messages[rows], np.ones(len(rows), np.int32))


def discard_messages(h: Histories, side: int, rows: np.ndarray) -> None:
    """Removes the sampled tokens of open messages, for another attempt; `fed` tokens that are gone are never read."""
    view = h.view(side)
    index = np.arange(view.capacity)
    gone = (index >= h.begun[rows][:, None]) & (index < view.length[rows][:, None])
    for array in (view.tokens, view.role, view.message, view.log_prob):
        array[rows] = np.where(gone, np.zeros((), array.dtype), array[rows])
    view.length[rows] = h.begun[rows]
    view.fed[rows] = h.begun[rows] - 1
    h.attempt[rows] += 1
    h.resamples[rows] += 1


def end_messages(h: Histories, side: int, messages: Messages) -> None:
    """Records messages of a side, which are in the sender's view; those without a stop sequence are heard."""
    rows, content = messages.rows, messages.content
    number = h.num_messages[rows]
    if h.views[1 - side] is not None:
        _append_known(h, 1 - side, side, messages.where(~messages.stopped))
    h.messages[rows, number, : content.shape[1]] = content
    h.message_length[rows, number] = messages.length
    h.truncated[rows, number] = messages.truncated
    h.num_messages[rows] += 1
    h.end_reason[rows[messages.stopped]] = EndReason.SIGNAL


def replay_records(h: Histories, record: Transcript, messages: int) -> None:
    """Replays the first `messages` messages of each record, or all that it has; see `replay.replay_messages`.

    Args:
        record: on the host.
    """
    for number in range(messages):
        side = number % 2
        rows = np.flatnonzero(h.running & (h.num_messages == number) & (np.asarray(record.num_messages) > number))
        stopped = (record.end_reason[rows] == EndReason.SIGNAL) & (record.num_messages[rows] == number + 1)
        heard = Messages(
            rows,
            np.asarray(record.messages[rows, number]),
            np.asarray(record.message_length[rows, number]),
            np.asarray(stopped),
            np.asarray(record.truncated[rows, number]),
        )
        if h.views[side] is not None:
            _append_known(h, side, side, heard)
        end_messages(h, side, heard)


def unfed(view: HostView, rows: np.ndarray) -> np.ndarray:
    """Tokens that are to be fed before the rows sample: all but the last, which the decode loop feeds."""
    return view.length[rows] - 1 - view.fed[rows]


def dialogue_of(h: Histories, rows: slice, side: int) -> Dialogue:
    """Conversations as arrays on the host, in the view of a side, without a cache."""
    view = h.view(side)
    fields = ('tokens', 'role', 'message', 'log_prob', 'length')
    context: Any = Context(**{name: getattr(view, name)[rows] for name in fields}, cache=None)  # type: ignore[arg-type]
    dialogue: Any = Dialogue(user=None, assistant=None, **{name: getattr(h, name)[rows] for name in (*SAID, *COUNTED)})
    return dialogue.with_view(ROLES[side], context)
