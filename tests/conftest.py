"""A tiny world for tests: real files and model classes with random weights, made in seconds, shared by all tests."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
torch.set_num_threads(1)                               # two processes share two cores; results do not depend on it


def run_script(script, *args, ranks=1, **how):
    """Run a script as a user would, with torchrun when ranks > 1; returns the CompletedProcess, its output as text."""
    launch = [sys.executable] if ranks == 1 else [
        sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}']
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    return subprocess.run([*launch, script, *map(str, args)], cwd=REPO, env=env, capture_output=True, text=True, **how)


def read_log(out_dir, kind='step'):
    """The records of one kind in out_dir/log.jsonl."""
    records = map(json.loads, (Path(out_dir) / 'log.jsonl').read_text().splitlines())
    return [r for r in records if r['kind'] == kind]


@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    """A folder with captions/, instruct/, text/, llm/, vision/: 200 pictures, a 2-layer Qwen3 and a 2-layer SigLIP."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipConfig, SiglipImageProcessorPil, SiglipModel

    from small import make as make_small
    from data import read_texts
    root = tmp_path_factory.mktemp('tiny')
    make_small.make_captions(root / 'captions', n=200)
    make_small.make_captions(root / 'instruct', n=150, seed=7, kind='instruct')
    make_small.make_text(root / 'text', n_train=2000, n_eval=60)
    captions = [r['conversations'][1]['value'] for r in json.loads((root / 'captions' / 'data.json').read_text())]
    # 500 ids are few: the captions' words become whole ones first
    tokenizer = make_small.make_tokenizer([*10 * captions, *read_texts(root / 'text' / 'train.jsonl')], n_ids=500)
    torch.manual_seed(0)
    llm = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None))
    texts = read_texts(root / 'text' / 'replay.jsonl')                 # as varied as the end of what the real one reads
    ids = [i for text in texts for i in tokenizer(text)['input_ids']]
    rows = torch.tensor(ids[:len(ids) // 32 * 32]).view(-1, 32)

    def loss_of_step(step):
        batch = rows[step * 16:step * 16 + 16]
        return llm(batch, labels=batch).loss

    # some steps: a random model cannot be steered
    make_small.descend(llm, loss_of_step, n_steps=80, learning_rate=1e-2, title='tiny llm')
    llm.save_pretrained(root / 'llm')
    tokenizer.save_pretrained(root / 'llm')
    layers = {'hidden_size': 32, 'intermediate_size': 64, 'num_attention_heads': 2, 'num_hidden_layers': 2}
    config = SiglipConfig(text_config={**layers, 'vocab_size': 512, 'bos_token_id': None, 'eos_token_id': 1},
                          vision_config={**layers, 'image_size': 32, 'patch_size': 8})
    SiglipModel(config).save_pretrained(root / 'vision')
    SiglipImageProcessorPil(size={'height': 32, 'width': 32}).save_pretrained(root / 'vision')
    return root
