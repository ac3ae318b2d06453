"""Writes a model as a Hugging Face folder (config.json, safetensors, tokenizer, generation config).

    python tools/export.py --source=SmolLM2-135M-Instruct-Q8_0.gguf --output=smollm2
    python tools/export.py --source=Qwen/Qwen2.5-0.5B-Instruct --revision=main --output=qwen-bf16 --dtype=bfloat16
    python tools/export.py --stage=runs/smollm2-cpu/sft/user --output=user-simulator

A source is a hub name, a Hugging Face folder or a `.gguf` file. A stage is a finished stage folder of a run; its
tokenizer gets the terminal token that the run added. The folder is written whole or not at all.
"""

import argparse
import json
from pathlib import Path

from simrl.conversations.chat import TERMINAL_TEXT
from simrl.experiments import sources
from simrl.experiments.outputs import load_params
from simrl.experiments.settings import MeshSettings
from simrl.models import sharding
from simrl.models.files.export import export, read_generation_config
from simrl.models.files.huggingface import FLOAT_DTYPES
from simrl.models.files.load import find_folder, load_model
from simrl.run import config as config_lib
from simrl.run import stages


def generation_config_of(source: str, revision: str | None) -> dict | None:
    """The source's own generation config; a GGUF file has none."""
    return None if source.endswith('.gguf') else read_generation_config(find_folder(source, revision))


def model_of_run(stage: Path) -> sources.ModelSettings:
    """The model of the run that a stage is of, from the run's config."""
    for folder in stage.resolve().parents:
        if (folder / stages.CONFIG_FILE).exists():
            run = json.loads((folder / stages.CONFIG_FILE).read_text())
            if 'model' not in run:
                raise SystemExit(f'{folder}: expected a run that starts from a model, found that of {run.get("job")!r}')
            return config_lib.from_config_dict(sources.ModelSettings, run['model'], f'{folder}: model')
    raise SystemExit(f'{stage}: expected a stage in a run directory with {stages.CONFIG_FILE}, found none')


def export_stage(stage: Path, output: Path, dtype: str) -> None:
    """The parameters that a stage left, with the tokenizer of the model that it started from."""
    if not stages.is_done(stage):
        raise SystemExit(f'{stage}: expected a finished stage, found none')
    trained_with = json.loads((stage / stages.STAGE_FILE).read_text())['settings']
    settings = model_of_run(stage)
    model = sources.open_model(settings)
    heads = ('reward_head',) if 'reward_model' in trained_with else ()
    mesh = MeshSettings().make()
    params = load_params(stage, model.config, mesh, heads=heads, rules=sharding.TRAINING_RULES)
    model.tokenizer.add_tokens([TERMINAL_TEXT], special_tokens=True)
    if len(model.tokenizer) != model.chat.size:
        raise SystemExit(f'{stage}: expected {model.chat.size} tokens, found {len(model.tokenizer)}')
    export(
        params,
        model.config,
        model.tokenizer,
        output,
        dtype=dtype,
        generation_config=generation_config_of(settings.source, settings.revision),
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument('--source', help='hub name, Hugging Face folder or .gguf file')
    parser.add_argument('--revision', help='of a hub model; default: its main branch')
    which.add_argument('--stage', type=Path, help='finished stage folder of a run')
    parser.add_argument('--output', required=True, type=Path, help='folder to write; must not exist')
    parser.add_argument('--dtype', default='float32', choices=sorted(FLOAT_DTYPES.values()), help='of the weights')
    options = parser.parse_args(arguments)
    if options.stage is not None and options.revision is not None:
        parser.error('--revision: expected beside --source only; a stage knows the revision that it started from')
    if options.output.exists():  # before the long part
        raise SystemExit(f'{options.output}: expected no such folder yet, found one')
    if options.stage is not None:
        export_stage(options.stage, options.output, options.dtype)
    else:
        config, params, tokenizer = load_model(options.source, revision=options.revision)
        generation_config = generation_config_of(options.source, options.revision)
        export(params, config, tokenizer, options.output, dtype=options.dtype, generation_config=generation_config)
    print(f'{options.output}: written')


if __name__ == '__main__':
    main()
