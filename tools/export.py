"""Writes a model as a Hugging Face folder (config.json, safetensors, tokenizer, generation config).

    python -m tools.export --source=SmolLM2-135M-Instruct-Q8_0.gguf --output=smollm2
    python -m tools.export --source=Qwen/Qwen2.5-0.5B-Instruct --revision=main --output=qwen-bf16 --dtype=bfloat16
    python -m tools.export --stage=runs/smollm2-cpu/sft/fine_tuned --output=user-simulator

A source is a hub name, a Hugging Face folder or a `.gguf` file. A stage is a finished stage folder of a run; its
tokenizer gets the terminal token that the run added. Other software that reads the folder, such as vLLM, stops where
the chat template ends a message of the model, and where a stage's model learned to stop: these ids are in
generation_config.json. The folder is written whole or not at all.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from simrl.conversations.huggingface_tokenizer import with_terminal
from simrl.conversations.templates import chat_from_huggingface
from simrl.experiments.outputs import PARAMS_FOLDER, load_params
from simrl.experiments.pretrained import PretrainedScene, sft_stage
from simrl.experiments.pretrained_rewards import HELD_OUT_STAGE, REWARD_STAGE
from simrl.main import USER_ERRORS
from simrl.models.files.export import export, read_generation_config
from simrl.models.files.huggingface import FLOAT_DTYPES
from simrl.models.files.load import find_folder, load_model
from simrl.run import directory, stages
from simrl.run.config import local_path
from simrl.run.program import run_program
from simrl.run.runtime import start_backend
from simrl.serving.load import check_model, find_run

NO_DATE = '26 Jul 2024'  # of a template that writes today's


def generation_config_of(source: str, revision: str | None) -> dict | None:
    """The source's own generation config; a GGUF file has none."""
    return None if source.endswith('.gguf') else read_generation_config(find_folder(source, revision))


def end_of_turn_of(source: str, tokenizer: Any) -> list[int]:
    """The id that ends an assistant's message in the tokenizer's chat template; none, with a line, if there is none."""
    try:
        # The end of a message depends on neither.
        return [chat_from_huggingface(tokenizer, rewrites='keep', date=NO_DATE).end_of_turn['assistant']]
    except ValueError as error:
        print(f'{source}: generation stops by its own generation config alone: {error}', flush=True)
        return []


def export_stage(stage: Path, output: Path, dtype: str) -> None:
    """Exports the parameters that a stage left, with the tokenizer of the model that it started from.

    Raises:
        ValueError: not a finished stage that left a model, or its tokenizer has no Hugging Face form.
        WorkdirError, ConfigError: the run is of another version, or the stage of another model.
    """
    run = find_run(stage)
    if run is None:
        raise ValueError(f'{stage}: expected a stage in a run directory with {directory.CONFIG_FILE}, found none')
    scene, name = run
    if not isinstance(scene, PretrainedScene):
        raise ValueError(
            f'{stage}: expected a run of a pretrained model, found one of the concierge world, whose tokenizer is a '
            'sentencepiece model of its own that no Hugging Face folder has a place for'
        )
    if not stages.is_done(stage) or not (stage / PARAMS_FOLDER).exists():
        raise ValueError(f'{stage}: expected a finished stage that left a model, found none')
    arms = {sft_stage(arm): arm for arm in scene.settings.arms}
    check_model(scene, stage, (arms[name], scene.settings.seeds[0]) if name in arms else None)
    model = scene.simulators.model(arms[name]) if name in arms else scene.model
    heads = ('reward_head',) if name in (REWARD_STAGE, HELD_OUT_STAGE) else ()
    mesh = scene.compute.mesh.make()
    params = load_params(stage, model.config, mesh, heads=heads)
    tokenizer = with_terminal(model.tokenizer, model.chat.terminal)
    role = scene.settings.user_sft.role if name in arms else 'assistant'
    export(
        params,
        model.config,
        tokenizer,
        output,
        dtype=dtype,
        generation_config=generation_config_of(model.settings.source, model.settings.revision),
        stop_ids=[model.chat.end_of_turn[role], *([model.chat.terminal] if role == 'user' else [])],
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument('--source', help='hub name, Hugging Face folder or .gguf file')
    parser.add_argument('--revision', help='of a hub model; default: its main branch')
    which.add_argument('--stage', type=local_path, help='finished stage folder of a run')
    parser.add_argument('--output', required=True, type=local_path, help='folder to write; must not exist')
    parser.add_argument('--dtype', default='float32', choices=sorted(FLOAT_DTYPES.values()), help='of the weights')
    options = parser.parse_args(arguments)
    if options.stage is not None and options.revision is not None:
        parser.error('--revision: expected beside --source only; a stage knows the revision that it started from')
    if options.output.exists():  # before the long part
        raise SystemExit(f'{options.output}: expected no such folder yet, found one')
    try:
        start_backend()
        if options.stage is not None:
            export_stage(options.stage, options.output, options.dtype)
        else:
            config, params, tokenizer = load_model(options.source, revision=options.revision)
            export(
                params,
                config,
                tokenizer,
                options.output,
                dtype=options.dtype,
                generation_config=generation_config_of(options.source, options.revision),
                stop_ids=end_of_turn_of(options.source, tokenizer),
            )
    except (*USER_ERRORS, ValueError) as error:
        sys.exit(f'error: {error}')
    print(f'{options.output}: written')


if __name__ == '__main__':
    run_program(main)
