"""Writes a model as a Hugging Face folder (config.json, safetensors, tokenizer, generation config).

    python tools/export.py --source=SmolLM2-135M-Instruct-Q8_0.gguf --output=smollm2
    python tools/export.py --source=Qwen/Qwen2.5-0.5B-Instruct --output=qwen-bf16 --dtype=bfloat16

A source is a hub name, a Hugging Face folder or a `.gguf` file. The folder is written whole or not at all. Trained
params are written by the same function, `simrl.models.export.export(params, config, tokenizer, folder)`.
"""

import argparse
from pathlib import Path

from simrl.models.export import export, read_generation_config
from simrl.models.huggingface import FLOAT_DTYPES
from simrl.models.load import find_folder, load_model


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--source', required=True, help='hub name, Hugging Face folder or .gguf file')
    parser.add_argument('--output', required=True, type=Path, help='folder to write; must not exist')
    parser.add_argument('--dtype', default='float32', choices=sorted(FLOAT_DTYPES.values()), help='of the weights')
    options = parser.parse_args(arguments)
    if options.output.exists():  # before the long part
        raise SystemExit(f'{options.output}: expected no such folder yet, found one')
    config, params, tokenizer = load_model(options.source)
    is_gguf = options.source.endswith('.gguf')
    generation_config = None if is_gguf else read_generation_config(find_folder(options.source))
    export(params, config, tokenizer, options.output, dtype=options.dtype, generation_config=generation_config)
    print(f'{options.output}: written')


if __name__ == '__main__':
    main()
