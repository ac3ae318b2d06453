"""Talk in the terminal with an assistant or a user simulator, or let two of them talk with each other.

    python -m tools.chat HuggingFaceTB/SmolLM2-135M-Instruct       a model of the hub, its folder, or a .gguf file
    python -m tools.chat runs/quickstart                           lists the assistants and simulators of a run
    python -m tools.chat runs/quickstart/persona/seed-0            an assistant of a run: you are the user
    python -m tools.chat --simulator=runs/quickstart/persona       a simulator: you are the assistant
    python -m tools.chat runs/quickstart/initial --simulator=runs/quickstart/persona       they talk with each other
    python -m tools.chat http://127.0.0.1:8000/v1 --model=NAME     a model behind an OpenAI-compatible server

The folder of a stage is a name, too: runs/quickstart/rl/persona/seed-0 is the assistant that it trained, or with
--simulator the simulator that it trained against. A model outside a run plays the user if it is prompted: --persona is
the message that it opens with. So does a model behind a server: --simulator=URL --simulator-model=NAME.
"""

import argparse
import contextlib
import dataclasses
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

from simrl.conversations.chat import ASSISTANT, HEADERS, USER
from simrl.conversations.records import Example
from simrl.main import USER_ERRORS
from simrl.rollouts.agents import ModelAgent
from simrl.run.program import run_program
from simrl.run.runtime import enable_compilation_cache, numeric_defaults, start_backend
from simrl.serving.load import Loaded, find_assistant, find_simulator, resampled, with_persona, with_system
from simrl.serving.remote import ContextError, Remote, RemoteView, find_remote, is_url
from simrl.serving.stream import View, view_of

HELP = """\
/reset           begin anew
/system [TEXT]   show the system text, or set it and begin anew
/persona [TEXT]  show what the simulator wants, or set it (its intent; its opening message if it is told no intent)
/help            show this
/quit            leave, as Ctrl-D does; Ctrl-C stops a message"""
NAMES = {USER: 'user', ASSISTANT: 'assistant'}
Speaker = Loaded | Remote


class Talk:
    """A conversation in the terminal. The person has the role that no agent has."""

    def __init__(self, agents: dict[int, Speaker], *, seed: int, turns: int) -> None:
        self.agents, self.seed, self.turns = agents, seed, turns
        chats = [of.chat for of in agents.values() if isinstance(of, Loaded)]
        self.share_tokenizer = len(chats) == len(agents) and all(
            chat is chats[0]
            or (chat.size == chats[0].size and all(chat.decode([i]) == chats[0].decode([i]) for i in range(chat.size)))
            for chat in chats[1:]
        )
        self.sample = -1  # conversations before this one
        self.begin()

    def begin(self) -> None:
        """Begins a conversation with random numbers of its own.

        Raises:
            ValueError: what an agent is told cannot be encoded, or is too long. The conversation before continues.
        """
        example = self.agents[min(self.agents)].example  # the simulator's, if there is one
        self.views = {role: self.view(role, example) for role in self.agents}
        self.sample += 1
        self.ended = self.paused = False
        self.number = 0  # of the next message
        if example.opening is not None:
            print(f'{NAMES[USER]}> {example.opening}')
            self.number = 1

    def view(self, role: int, example: Example) -> View | RemoteView:
        """The conversation that `begin` begins, as an agent sees it."""
        of, sample = self.agents[role], self.sample + 1
        if isinstance(of, Remote):
            return RemoteView(dataclasses.replace(of, example=example), seed=self.seed, sample=sample)
        return view_of(of.agent, of.chat, example, role, seed=self.seed, sample=sample)

    def change(self, role: int, other: Speaker) -> None:
        """Begins anew with another agent or example.

        Raises:
            ValueError: as of `begin`.
        """
        before = self.agents[role]
        self.agents[role] = other
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
                self.hear(role, line)
                self.number += 1
        except ValueError as error:
            note(str(error))

    def hear(self, role: int, text: str, ids: Sequence[int] | None = None) -> None:
        """Gives the other agent a message of `role`.

        Args:
            ids: of its content, where both agents share a tokenizer.

        Raises:
            ValueError: the agent cannot read it. The conversation is as before.
        """
        other = ASSISTANT if role == USER else USER
        of, view = self.agents[other], self.views[other]
        if isinstance(view, RemoteView):
            view.receive(text)
        elif isinstance(of, Loaded):
            view.receive(of.chat.encode(text, HEADERS[role]) if ids is None else ids)

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
            self.change(owner, told(self.agents[owner], text))
        elif command == '/persona' and USER not in self.agents:
            raise ValueError('/persona is about a simulator, and you are the user')
        elif command == '/persona' and not text:
            example = self.agents[USER].example
            note(f'intent: {example.intent}; opening: {example.opening}; told: {system_text(self.agents[USER])}')
        elif command == '/persona':
            of = self.agents[USER]
            example = (
                dataclasses.replace(of.example, opening=text)
                if isinstance(of, Remote)
                else with_persona(of.agent, of.example, text)
            )
            self.change(USER, dataclasses.replace(of, example=example))
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
                self.hear(role, view.sent.text, view.sent.ids if self.share_tokenizer else None)
                if self.number >= 2 * self.turns:
                    self.ended = True
                    note(f'{self.turns} turns are over')
        except (ValueError, RuntimeError) as error:
            print()
            note(str(error))
            if isinstance(view, RemoteView):  # another time it may answer
                self.paused = True
                most = view.max_tokens
                full = f'--max-new-tokens below {most} leaves a conversation more room; /reset begins another'
                note(full if isinstance(error, ContextError) else 'Enter asks again')
            else:
                self.ended = True


def told(of: Speaker, text: str) -> Speaker:
    """The agent with another system text.

    Raises:
        ValueError: as of `with_system`.
    """
    if isinstance(of, Remote):
        return dataclasses.replace(of, system=lambda example: text)
    return dataclasses.replace(of, agent=with_system(of.agent, of.chat, text))


def system_text(of: Speaker) -> str:
    """The system text of an agent."""
    system = of.system if isinstance(of, Remote) else of.agent.system
    if system is not None:
        return system(of.example)
    if isinstance(of, Remote):
        return 'none is sent'
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


def load(options: argparse.Namespace) -> dict[int, Speaker]:
    """The agents that were asked for, by role."""
    names = {USER: options.simulator, ASSISTANT: options.assistant}
    names = {role: name for role, name in names.items() if name is not None}
    is_here = not all(map(is_url, names.values()))
    if is_here:  # else the devices are left to a server that may be on this machine
        start_backend()
        enable_compilation_cache()
    found = {role: find(role, name, options) for role, name in names.items()}
    if is_here:
        print('loading; the first message of a model on this machine takes a while to compile', flush=True)
    agents = {role: sampled(load_agent(), options) for role, load_agent in found.items()}
    if options.system is not None:
        role = max(agents)  # the assistant where there are two
        agents[role] = told(agents[role], options.system)
    return agents


def find(role: int, name: str, options: argparse.Namespace) -> Callable[[], Speaker]:
    """The function that loads an agent."""
    persona = options.persona if role == USER else None
    if is_url(name):
        model = options.simulator_model if role == USER else options.model
        remote = find_remote(name, role, model=model, key_variable=options.key_variable, persona=persona)
        return lambda: remote
    return find_assistant(name) if role == ASSISTANT else find_simulator(name, persona=persona, number=options.seed)


def sampled(of: Speaker, options: argparse.Namespace) -> Speaker:
    """The agent, sampled as the command line says."""
    if isinstance(of, Loaded):
        sampling = {name: getattr(options, name) for name in ('temperature', 'top_p', 'max_new_tokens')}
        return dataclasses.replace(of, agent=resampled(of.agent, **sampling))
    given = {name: getattr(options, name) for name in ('temperature', 'top_p') if getattr(options, name) is not None}
    max_tokens = of.max_tokens if options.max_new_tokens is None else options.max_new_tokens
    return dataclasses.replace(of, sampling=dataclasses.replace(of.sampling, **given), max_tokens=max_tokens)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = 'RUN/STAGE, a folder, OWNER/MODEL, a .gguf file or the URL of a server'
    parser.add_argument('assistant', nargs='?', help=f'RUN/ASSISTANT, {names}')
    parser.add_argument('--simulator', help=f'RUN/SIMULATOR, {names}')
    parser.add_argument('--model', help="the assistant's name on its server; default: the only one there")
    parser.add_argument('--simulator-model', help="the simulator's name on its server; default: the only one there")
    parser.add_argument('--key-variable', help='environment variable with the key of the server; default: no key')
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
    for option, name in (('model', options.assistant), ('simulator_model', options.simulator)):
        if getattr(options, option) is not None and (name is None or not is_url(name)):
            parser.error(
                f'--{option.replace("_", "-")}: expected the URL of a server beside it, found {name or "none"}'
            )
    urls = {name for name in (options.assistant, options.simulator) if name is not None and is_url(name)}
    if options.key_variable is not None and len(urls) != 1:
        parser.error(f'--key-variable: expected one URL that its key is sent to, found {len(urls)}')
    try:
        with numeric_defaults():
            agents = load(options)
            you = ', '.join(f'you are the {name}' for role, name in NAMES.items() if role not in agents)
            print(f'{you or "they talk with each other"}; /help lists the commands')
            Talk(agents, seed=options.seed, turns=options.turns).run()
    except (*USER_ERRORS, ValueError) as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    run_program(main)
