"""Talk in the terminal with an assistant or a user simulator, or let two of them talk with each other.

    python -m tools.chat HuggingFaceTB/SmolLM2-135M-Instruct       a model of the hub, its folder, or a .gguf file
    python -m tools.chat runs/quickstart                           lists the assistants and simulators of a run
    python -m tools.chat runs/quickstart/persona/seed-0            an assistant of a run: you are the user
    python -m tools.chat --simulator=runs/quickstart/persona       a simulator: you are the assistant
    python -m tools.chat runs/quickstart/initial --simulator=runs/quickstart/persona       they talk with each other

The folder of a stage is a name, too: runs/quickstart/rl/persona/seed-0 is the assistant that it trained, or with
--simulator the simulator that it trained against. A model outside a run plays the user if it is prompted: --persona is
the message that it opens with.
"""

import argparse
import contextlib
import dataclasses
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from simrl.conversations.chat import ASSISTANT, HEADERS, USER
from simrl.main import USER_ERRORS
from simrl.rollouts.agents import ModelAgent
from simrl.run.program import run_program
from simrl.run.runtime import enable_compilation_cache, numeric_defaults, start_backend
from simrl.serving.load import Loaded, find_assistant, find_simulator, resampled, with_persona, with_system
from simrl.serving.stream import view_of

HELP = """\
/reset           begin anew
/system [TEXT]   show the system text, or set it and begin anew
/persona [TEXT]  show what the simulator wants, or set it (its intent; its opening message if it is told no intent)
/help            show this
/quit            leave, as Ctrl-D does; Ctrl-C stops a message"""
NAMES = {USER: 'user', ASSISTANT: 'assistant'}


class Talk:
    """A conversation in the terminal. The person has the role that no agent has."""

    def __init__(self, agents: dict[int, Loaded], *, seed: int, turns: int) -> None:
        self.agents, self.seed, self.turns = agents, seed, turns
        first, *others = (of.chat for of in agents.values())
        self.share_tokenizer = all(
            chat is first
            or (chat.size == first.size and all(chat.decode([i]) == first.decode([i]) for i in range(chat.size)))
            for chat in others
        )
        self.sample = -1  # conversations before this one
        self.begin()

    def begin(self) -> None:
        """Begins a conversation with random numbers of its own.

        Raises:
            ValueError: what an agent is told cannot be encoded, or is too long. The conversation before continues.
        """
        example = self.agents[min(self.agents)].example  # the simulator's, if there is one
        self.views = {
            role: view_of(of.agent, of.chat, example, role, seed=self.seed, sample=self.sample + 1)
            for role, of in self.agents.items()
        }
        self.sample += 1
        self.ended = self.paused = False
        self.number = 0  # of the next message
        if example.opening is not None:
            print(f'{NAMES[USER]}> {example.opening}')
            self.number = 1

    def change(self, role: int, **changes: Any) -> None:
        """Begins anew with another agent or example.

        Raises:
            ValueError: as of `begin`.
        """
        before = self.agents[role]
        self.agents[role] = dataclasses.replace(before, **changes)
        try:
            self.begin()
        except ValueError:
            self.agents[role] = before
            raise

    def run(self) -> None:
        """Takes turns until the person leaves."""
        while True:
            role = ASSISTANT if self.number % 2 else USER
            if self.ended or self.paused or role not in self.agents:
                try:
                    line = input('> ' if role in self.agents else f'{NAMES[role]} (you)> ').strip()
                except EOFError:
                    print()
                    return
                except KeyboardInterrupt:
                    print('\n(Ctrl-D or /quit leaves)')
                    continue
                if line == '/quit':
                    return
                self.read(role, line)
            else:
                self.write(role)

    def read(self, role: int, line: str) -> None:
        """Follows a command, or takes the person's message."""
        command, _, text = line.partition(' ')
        try:
            if command.startswith('/'):
                self.follow(command, text.strip())
            elif self.ended:
                note('the conversation has ended: /reset begins another')
            elif role in self.agents:
                self.paused = False
            elif line:
                (partner,) = self.views.values()
                (of,) = self.agents.values()
                partner.receive(of.chat.encode(line, HEADERS[role]))
                self.number += 1
        except ValueError as error:
            note(str(error))

    def follow(self, command: str, text: str) -> None:
        """A command.

        Raises:
            ValueError: it cannot be followed.
        """
        owner = ASSISTANT if ASSISTANT in self.agents else USER  # of the text of /system
        if command == '/reset':
            self.begin()
        elif command == '/system' and not text:
            note(system_text(self.agents[owner]))
        elif command == '/system':
            of = self.agents[owner]
            self.change(owner, agent=with_system(of.agent, of.chat, text))
        elif command == '/persona' and USER not in self.agents:
            raise ValueError('/persona is about a simulator, and you are the user')
        elif command == '/persona' and not text:
            example = self.agents[USER].example
            note(f'intent: {example.intent}; opening: {example.opening}; told: {system_text(self.agents[USER])}')
        elif command == '/persona':
            of = self.agents[USER]
            self.change(USER, example=with_persona(of.agent, of.example, text))
        elif command == '/help':
            print(HELP)
        else:
            raise ValueError(f'{command}: expected one of /reset, /system, /persona, /help, /quit')

    def write(self, role: int) -> None:
        """Lets an agent write its message."""
        view, alone = self.views[role], len(self.views) == 1
        print(f'{NAMES[role]}> ', end='', flush=True)
        try:
            with stoppable() as stopped:
                pieces = view.stream()
                for piece in pieces:
                    print(piece, end='', flush=True)
                    if stopped.is_set():
                        pieces.close()
            print()
            assert view.sent is not None
            self.number += 1
            self.ended, self.paused = view.sent.ends, stopped.is_set() and not alone
            if self.ended:
                note(f'the {NAMES[role]} has ended the conversation')
            elif not alone:
                other = ASSISTANT if role == USER else USER
                ids = view.sent.ids
                if not self.share_tokenizer:
                    ids = tuple(self.agents[other].chat.encode(view.sent.text, HEADERS[role]))
                self.views[other].receive(ids)
                if self.number >= 2 * self.turns:
                    self.ended = True
                    note(f'{self.turns} turns are over')
        except (ValueError, RuntimeError) as error:
            print()
            note(str(error))
            self.ended = True


def system_text(of: Loaded) -> str:
    """The system text of an agent."""
    if of.agent.system is not None:
        return of.agent.system(of.example)
    return of.chat.default_system.strip() if isinstance(of.agent, ModelAgent) else 'nothing'


def note(text: str) -> None:
    print(f'[{text}]')


@contextlib.contextmanager
def stoppable() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that no compiled program is cut off in its work."""
    stopped = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stopped.set())
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def load(options: argparse.Namespace) -> dict[int, Loaded]:
    """The agents that were asked for, by role."""
    found = {}
    if options.simulator is not None:
        found[USER] = find_simulator(options.simulator, persona=options.persona, number=options.seed)
    if options.assistant is not None:
        found[ASSISTANT] = find_assistant(options.assistant)
    print('loading; the first message of a model on this machine takes a while to compile', flush=True)
    agents = {role: load_agent() for role, load_agent in found.items()}
    sampling = {name: getattr(options, name) for name in ('temperature', 'top_p', 'max_new_tokens')}
    agents = {role: dataclasses.replace(of, agent=resampled(of.agent, **sampling)) for role, of in agents.items()}
    if options.system is not None:
        role = max(agents)  # the assistant where there are two
        of = agents[role]
        agents[role] = dataclasses.replace(of, agent=with_system(of.agent, of.chat, options.system))
    return agents


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('assistant', nargs='?', help='RUN/ASSISTANT, RUN/STAGE, a folder, OWNER/MODEL or a .gguf file')
    parser.add_argument('--simulator', help='RUN/SIMULATOR, RUN/STAGE, a folder, OWNER/MODEL or a .gguf file')
    parser.add_argument('--system', help="the assistant's system text; the simulator's if there is no assistant")
    parser.add_argument('--persona', help="the simulator's intent, or its opening message if it is told no intent")
    parser.add_argument('--temperature', type=float, help='0: greedy; default: as the run samples, .7 outside a run')
    parser.add_argument('--top-p', type=float, help='default: as the run samples, .9 outside a run')
    parser.add_argument('--max-new-tokens', type=int, help='per message; default: those of the run, 512 outside a run')
    parser.add_argument('--seed', type=int, default=0, help='of sampling, and of the choice of a person in a run')
    parser.add_argument('--turns', type=int, default=8, help='of two agents that talk with each other')
    options = parser.parse_args(arguments)
    if options.assistant is None and options.simulator is None:
        parser.error('expected an assistant, a --simulator or both')
    if options.persona is not None and options.simulator is None:
        parser.error('--persona: expected a --simulator beside it')
    try:
        start_backend()
        enable_compilation_cache()
        with numeric_defaults():
            agents = load(options)
            you = ', '.join(f'you are the {name}' for role, name in NAMES.items() if role not in agents)
            print(f'{you or "they talk with each other"}; /help lists the commands')
            Talk(agents, seed=options.seed, turns=options.turns).run()
    except (*USER_ERRORS, ValueError) as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    run_program(main)
