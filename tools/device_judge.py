"""A judge on the device, --model, as the command line names it."""

import argparse
from collections.abc import Sequence

import jax

from simrl.evaluation.pairwise import judges
from simrl.evaluation.pairwise.judges import Verdict
from simrl.evaluation.pairwise.responses import Response
from simrl.evaluation.wildbench.asking import AskSettings
from simrl.experiments.checks import check_row_lengths
from simrl.experiments.judges import LocalJudgeSettings
from simrl.experiments.settings import MeshSettings
from simrl.experiments.sources import Model, ModelSettings, open_model
from simrl.models.transformer import Execution
from simrl.remote.cache import Cache
from simrl.rewards.llm_judge import judge_agent
from simrl.rollouts.agents import Policy
from simrl.rollouts.collect import for_sampling
from simrl.serving.identity import identity_of_model
from tools.device_replies import device
from tools.judges import cache_path


def open_judge(options: argparse.Namespace) -> Model:
    """--model without its weights.

    Raises:
        ValueError: --lengths or --rows are none, or the model has too few positions.
    """
    LocalJudgeSettings(lengths=tuple(options.lengths), batch_size=options.rows)  # refuses what is out of range
    # There is no history that a template could rewrite: a judge replies once.
    model = open_model(ModelSettings(options.model, rewrites='keep', date=options.date))
    check_row_lengths('--lengths', options.lengths, model.config)
    return model


def of_model(
    options: argparse.Namespace, model: Model, settings: AskSettings, asked: Sequence[tuple[Response, Response]]
) -> list[Verdict]:
    """The verdicts of --model, whose weights are loaded if one is missing."""
    with device(), Cache(cache_path(options.output / 'judge')) as cache:
        mesh = MeshSettings(data=1).make()

        def policy() -> Policy:
            agent = judge_agent(model.chat, model.config, model.load_params(mesh), Execution())
            with jax.set_mesh(mesh):
                return for_sampling(agent, mesh).policy

        return judges.by_model(
            asked,
            policy,
            model.chat,
            settings,
            cache,
            read=options.read,
            identity=f'{identity_of_model(model)} {jax.default_backend()}',
            lengths=options.lengths,
            batch_size=options.rows,
            mesh=mesh,
            name=f'verdicts, {options.model}',
        )
