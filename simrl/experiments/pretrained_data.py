"""People's conversations and choices as a pretrained experiment uses them: read, checked, chosen."""

import collections
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from simrl.conversations.chat import Chat, EncodingError
from simrl.conversations.records import Conversation, Example, Preference, example_of
from simrl.conversations.views import Rendered, user_rows
from simrl.evaluation.fidelity.likelihood import start_of
from simrl.evaluation.fidelity.turns import turns_of
from simrl.experiments import sources
from simrl.experiments.pretrained_agents import usual_agents
from simrl.experiments.pretrained_settings import PretrainedSettings
from simrl.experiments.scene import LikelihoodRows
from simrl.experiments.sources import Model, of_split, subsample
from simrl.rollouts.agents import ModelAgent, fitting, told
from simrl.rollouts.logs import logged_transcript
from simrl.rollouts.state import Transcript
from simrl.run.config import ConfigError

ROW_STEP = 128  # tokens that a length beyond those of training is a multiple of
VALIDATION_SEED = 0  # of the choice of validation openings, the same for every arm and training seed


class PretrainedData:
    """Data of people, and the model whose tokenizer has tokens for all of it."""

    def __init__(self, settings: PretrainedSettings) -> None:
        self.settings = settings

    @functools.cached_property
    def model(self) -> Model:
        """The assistant's model, without its weights."""
        return sources.open_for('config.model', self.settings.model)

    @property
    def chat(self) -> Chat:
        return self.model.chat

    # Conversations and choices.

    @functools.cached_property
    def conversations(self) -> list[Conversation]:
        try:
            return sources.conversations_of(self.settings.data, self.chat.check)
        except (OSError, ValueError) as error:
            raise ConfigError(f'config.data.conversations: {error}') from error

    @functools.cached_property
    def preferences(self) -> list[Preference]:
        try:
            return sources.preferences_of(self.settings.data, self.chat.check)
        except (OSError, ValueError) as error:
            raise ConfigError(f'config.data.preferences: {error}') from error

    @functools.cache  # noqa: B019  (lives as long as its process)
    def people_of(self, split: str) -> list[Conversation]:
        """The conversations of a split, without those that are dropped for want of an intent; prints how many."""
        found = of_split(self.conversations, split)
        if self.settings.conversation.without_intent == 'keep':
            return found
        kept = [conversation for conversation in found if conversation.intent is not None]
        print(f'conversations ({split}): {len(kept)}; dropped, without an intent: {len(found) - len(kept)}', flush=True)
        return kept

    @property
    def dropped(self) -> dict[str, str]:
        """The rule for conversations without an intent, as a setting of stages; nothing where they are kept."""
        rule = self.settings.conversation.without_intent
        return {} if rule == 'keep' else {'without_intent': rule}

    # Examples.

    @functools.cache  # noqa: B019  (lives as long as its process)
    def openings(self, split: str) -> list[Example]:
        """The openings that fit into the prompts of the assistant and of the usual simulators; prints how many do not.

        All arms start from the same people, those that are added later as well. So it is not this run's arms that
        decide, but the simulators of `conversation`; an arm with a longer prompt is refused.
        """
        conversation, usual = self.settings.conversation, usual_agents(self.settings, self.model)
        size = conversation.limits.prompt_tokens - conversation.reserved_prompt_tokens
        examples = [example_of(one) for one in self.people_of(split)]
        try:
            kept, dropped = fitting(examples, usual, self.chat, size)
        except EncodingError as error:  # texts of people were checked when they were read
            raise ConfigError(f'config.conversation.role_play: {error}') from error
        if not kept:
            raise ConfigError(
                f'config.conversation.limits.prompt_tokens: expected room for at least one opening of the split '
                f'{split!r}, found that none of {len(examples)} fits into {size} tokens'
            )
        print(f'openings ({split}): {len(kept)}; with a prompt of over {size} tokens: {dropped}', flush=True)
        return kept

    def openings_identity(self) -> dict[str, Any]:
        """Settings that decide which openings fit: see `openings`."""
        conversation = self.settings.conversation
        usual, reserved = conversation.role_play, conversation.reserved_prompt_tokens
        openings = {'limits': conversation.limits, 'instructions': usual.instructions, 'signal': usual.signal}
        return {'openings': openings | ({'reserved_prompt_tokens': reserved} if reserved else {}) | self.dropped}

    def validated(self, number: int) -> list[Example]:
        """`number` openings between training and test."""
        return subsample(self.openings('dev'), number, VALIDATION_SEED)

    def held_out(self, numbers: range | None) -> list[Example]:
        """Held-out openings by one permutation for each seed, so that more people are the same ones and others."""
        openings, settings = self.openings('test'), self.settings.evaluation
        order = np.random.default_rng(settings.seed).permutation(len(openings))[: settings.people]
        return [openings[i] for i in (order if numbers is None else order[numbers.start : numbers.stop])]

    def logged(self, examples: Sequence[Example]) -> tuple[Transcript, int]:
        """The conversations that validation examples started from; see `scene.People.logs`."""
        by_id, limits = {one.id: one for one in self.people_of('dev')}, self.settings.conversation.limits
        return logged_transcript([by_id[example.id] for example in examples], self.chat, limits)

    # People's messages, for simulators' likelihoods and in replays.

    @functools.cached_property
    def people_to_predict(self) -> list[Conversation]:
        """The starts of held-out conversations that hold a message to predict; the same for every simulator."""
        settings, people = self.settings.user_sft, self.people_of('test')
        most = settings.sft.batch.lengths[-1]
        order = np.random.default_rng(settings.held_out_seed).permutation(len(people)).tolist()
        wanted, too_long = settings.held_out or len(people), 0
        found: dict[int, Conversation] = {}
        for i in order:
            if len(found) < wanted:
                start = start_of(people[i], self.chat, most)
                too_long += start is None
                found |= {} if start is None else {i: start}
        reason = f'without a second message of the user within {most} tokens'
        sources.print_counts('conversations to predict', len(found), collections.Counter({reason: too_long}))
        return [found[i] for i in sorted(found)]

    def rows_to_predict(self, simulator: ModelAgent, conversations: Sequence[Conversation]) -> list[Rendered]:
        """People's messages after their openings, in the simulator's view and under its system text; `user_rows`."""
        swapped = simulator.policy.spec.own_header == self.chat.header('assistant')
        rows, _ = user_rows(
            conversations,
            self.chat,
            simulator.policy.spec.config.max_positions,
            system=lambda conversation: told(simulator, example_of(conversation)),
            view='swapped' if swapped else 'natural',
            openings=simulator.opening,
        )
        return rows

    def likelihood_rows(self, simulator: ModelAgent) -> LikelihoodRows:
        """Rows are as long as what a simulator is told makes them, so that the same tokens of people count."""
        people, lengths = self.people_to_predict, self.settings.user_sft.sft.batch.lengths
        rows = self.rows_to_predict(simulator, people)
        if (longest := max(map(len, rows))) > lengths[-1]:
            rounded = -(-longest // ROW_STEP) * ROW_STEP
            lengths = (*lengths, min(rounded, simulator.policy.spec.config.max_positions))
        return LikelihoodRows(rows, [one.source for one in people], lengths)

    def people_to_replay(self, number: int) -> list[Conversation]:
        """Of the splits dev and test: simulators are trained on neither. As many of each data set as there are."""
        return sources.balanced(self.replayable, number, self.settings.evaluation.seed)

    @functools.cached_property
    def replayable(self) -> list[Conversation]:
        """Held-out conversations with more than an opening."""
        return [one for split in ('dev', 'test') for one in self.people_of(split) if len(turns_of(one)) > 1]

    def likelihood_identity(self) -> dict[str, Any]:
        """Settings that decide `likelihood_rows`."""
        settings = self.settings.user_sft
        return {
            'tokens': settings.sft.batch.lengths[-1],
            'held_out': settings.held_out,
            'held_out_seed': settings.held_out_seed,
            **self.dropped,
        }
