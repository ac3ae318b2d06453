"""The stages of the concierge world before the first arm, and what they leave: a tokenizer, models and logs."""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from simrl.conversations.chat import Chat
from simrl.conversations.records import Conversation, read_conversations
from simrl.conversations.sentencepiece import sentencepiece_chat
from simrl.conversations.views import natural_prompt
from simrl.experiments import concierge_setup
from simrl.experiments.concierge_people import people_agent
from simrl.experiments.concierge_settings import PEOPLE, ConciergeSettings
from simrl.experiments.outputs import load_params
from simrl.experiments.sources import RandomModel
from simrl.models.transformer import Params, TransformerConfig
from simrl.rollouts.agents import ModelAgent, assistant
from simrl.rollouts.token_sampling import Sampling
from simrl.run.config import ConfigError
from simrl.run.stages import Stage
from simrl.simulators.personas import directed
from simrl.worlds.concierge.language import all_intents
from simrl.worlds.concierge.people import STEREOTYPES


class ConciergeStages:
    """All that is made before the first arm; `concierge_setup` does the work.

    Args:
        check: what each stage does before anything else.
    """

    def __init__(self, settings: ConciergeSettings, workdir: pathlib.Path, check: Callable[[], None]) -> None:
        self.settings, self.workdir, self.check = settings, workdir, check

    # What they leave.

    @functools.cached_property
    def chat(self) -> Chat:
        """The tokenizer that the world's stage left.

        Raises:
            ConfigError: what a simulator may be told is longer than prompts may be.
        """
        chat = sentencepiece_chat(
            (self.workdir / concierge_setup.WORLD_STAGE / concierge_setup.TOKENIZER_FILE).read_bytes()
        )
        texts = (directed(name, intent.text) for intent in all_intents() for name in STEREOTYPES)
        longest = max((natural_prompt(chat, None, text).tokens for text in texts), key=len)
        if len(longest) > self.settings.limits.prompt_tokens:
            raise ConfigError(
                f'config.limits.prompt_tokens: expected at least {len(longest)}, of the longest that a simulator is '
                f'told ({chat.decode(longest.tolist())!r}), found {self.settings.limits.prompt_tokens}'
            )
        return chat

    def load(
        self, stage: pathlib.Path, model: RandomModel, mesh: Mesh | None = None
    ) -> tuple[TransformerConfig, Params]:
        """The parameters that a stage left, on a mesh; None: that of the assistant."""
        config = model.transformer_config(self.chat.size)
        return config, load_params(stage, config, self.settings.compute.mesh.make() if mesh is None else mesh)

    def assistant(self, stage: pathlib.Path) -> ModelAgent:
        """A model as an assistant. It sees what is said and nothing else, and is sampled as it is."""
        return assistant(
            self.chat,
            *self.load(stage, self.settings.assistant.model),
            self.settings.compute.sampling,
            max_new_tokens=self.settings.limits.assistant_tokens,
            sampling=Sampling(),
        )

    def held_out_logs(self) -> list[Conversation]:
        """Conversations of people with the initial assistant that no simulator was trained on."""
        logs, _ = read_conversations(self.workdir / concierge_setup.LOGS_STAGE / concierge_setup.HELD_OUT_LOGS)
        return logs

    # The stages.

    def identity(self) -> dict[str, Any]:
        """Settings that the results of all stages but the first depend on."""
        return {'world': self.settings.world, 'limits': self.settings.limits, 'compute': self.settings.compute}

    def inputs(self) -> dict[str, pathlib.Path]:
        """Inputs of all stages but the first."""
        return {'world': self.workdir / concierge_setup.WORLD_STAGE}

    def setup(self) -> list[Stage]:
        """The stages, in an order in which each has its inputs."""
        s = self.settings
        trained = [settings for settings in s.arms.values() if settings.simulator != PEOPLE]
        sizes = dict.fromkeys(settings.size for settings in trained)
        return [
            self._world(),
            self._assistant(),
            *(self._base_user(size) for size in sizes),
            self._logs(),
            *(
                self._fine_tuned(arm, seed)
                for seed in s.seeds
                for arm, settings in s.arms.items()
                if settings.simulator == 'fine_tuned'
            ),
        ]

    def _stage(
        self, name: str, settings: dict[str, Any], inputs: Mapping[str, str], run: Callable[[pathlib.Path], None]
    ) -> Stage:
        folders = {key: self.workdir / stage for key, stage in inputs.items()}
        return Stage(name, self.identity() | settings, self.inputs() | folders, run, self.check)

    def _world(self) -> Stage:
        world, c = self.settings.world, self.settings.corpora
        corpora = {
            'vocabulary': c.vocabulary,
            'assistant': c.assistant,
            'base_user': c.base_user,
            'held_out': c.held_out,
        }

        def run(folder: pathlib.Path) -> None:
            concierge_setup.make_world(folder, world=world, **corpora)

        return Stage(concierge_setup.WORLD_STAGE, {'world': world, 'corpora': corpora}, {}, run, self.check)

    def _assistant(self) -> Stage:
        own = self.settings.assistant

        def run(folder: pathlib.Path) -> None:
            concierge_setup.fit_assistant(folder, own.model, own.sft, self._fitting())

        return self._stage(concierge_setup.ASSISTANT_STAGE, {'assistant': own}, {}, run)

    def _base_user(self, size: str) -> Stage:
        user = self.settings.users[size]

        def run(folder: pathlib.Path) -> None:
            concierge_setup.fit_base_user(folder, user.model, user.base, self._fitting())

        return self._stage(concierge_setup.base_user_stage(size), {'model': user.model, 'base': user.base}, {}, run)

    def _logs(self) -> Stage:
        corpora = self.settings.corpora

        def run(folder: pathlib.Path) -> None:
            concierge_setup.collect_logs(
                folder,
                people_agent(self.settings.world, self.settings.limits),
                self.assistant(self.workdir / concierge_setup.ASSISTANT_STAGE),
                corpora,
                world=self.settings.world,
                chat=self.chat,
                limits=self.settings.limits,
                batch_size=self.settings.evaluation.batch_size,
                compute=self.settings.compute,
            )

        settings = {'logs': corpora.logs, 'held_out': corpora.held_out}
        return self._stage(concierge_setup.LOGS_STAGE, settings, {'assistant': concierge_setup.ASSISTANT_STAGE}, run)

    def _fine_tuned(self, arm: str, seed: int) -> Stage:
        size = self.settings.arms[arm].size
        user, base = self.settings.users[size], concierge_setup.base_user_stage(size)

        def run(folder: pathlib.Path) -> None:
            config, logs = user.model.transformer_config(self.chat.size), self.workdir / concierge_setup.LOGS_STAGE

            def load() -> Params:
                return self.load(self.workdir / base, user.model)[1]

            concierge_setup.fine_tune_simulator(folder, config, load, user.fine_tuning, self._fitting(), logs, seed)

        settings = {'model': user.model, 'fine_tuning': user.fine_tuning, 'seed': seed}
        inputs = {'base': base, 'logs': concierge_setup.LOGS_STAGE}
        return self._stage(concierge_setup.fine_tuned_stage(arm, seed), settings, inputs, run)

    def _fitting(self) -> concierge_setup.Fitting:
        world = self.workdir / concierge_setup.WORLD_STAGE
        return concierge_setup.Fitting(world, self.chat, self.settings.compute, self.settings.corpora.held_out)
