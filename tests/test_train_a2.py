"""train_a2.py as a user runs it, on a tiny world: LoRA stays in its place, PEFT loads it, text-only loss is judged."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import REPO, read_log, run_script
from test_train_a1 import config as a1_config  # noqa: F401  the tiny A1 config


@pytest.fixture(scope='module')
def aligned(a1_config, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp('aligned')
    done = run_script('train_a1.py', a1_config, f'--out_dir={out}', '--gate_ablation_nats=-9.0')
    assert 'Traceback' not in done.stderr, done.stderr
    return out


@pytest.fixture(scope='module')
def config(tiny, aligned, tmp_path_factory):
    """8 steps of 8 chats, no dropout, evaluated at steps 0, 4 and 8."""
    path = tmp_path_factory.mktemp('a2') / 'a2_tiny.py'
    path.write_text(f'''
data_json = '{tiny}/instruct/data.json'
image_root = '{tiny}/instruct/images'
align_dir = '{aligned}'
text_jsonl = '{tiny}/text/eval.jsonl'
allow_failed_gates = True
lora_r = 4
lora_dropout = 0.0
max_seq_len = 320
rows_per_step = 8
batch_size = 8
learning_rate = 1e-3
lora_learning_rate = 5e-3
epoch_samples = 64
eval_every = 4
n_eval = 24
n_golden = 6
n_text = 40
n_predictions = 3
bucket_edges = (25, 50)
max_new_tokens = 4
log_every = 1
''')
    return path


@pytest.fixture(scope='module')
def straight(config, tmp_path_factory):
    out = tmp_path_factory.mktemp('straight')
    done = run_script('train_a2.py', config, f'--out_dir={out}')
    assert 'Traceback' not in done.stderr, done.stderr
    return out, done


def gates_of(out):
    return {g['name']: g for g in json.loads((out / 'gates.json').read_text())['gates']}


def test_it_learns_answers_every_turn_and_trains_only_connector_and_lora(straight):
    out, done = straight
    evals = read_log(out, 'eval')
    assert [e['step'] for e in evals] == [0, 4, 8] and evals[-1]['correct'] < evals[0]['correct'] - 0.1
    gates = gates_of(out)
    for name in ('parameters trained but not declared, or declared but not trained',
                 'trained parameters without a gradient', 'frozen weights changed (sha256)',
                 "LoRA weights outside the language model's layers", 'samples without a label'):
        assert gates[name]['passed'], name
    split = json.loads((out / 'split.json').read_text())
    predictions = [json.loads(line) for line in (out / 'predictions.jsonl').read_text().splitlines()]
    assert {p['id'] for p in predictions} == set(split['eval'][:3])
    assert all(p['question'] and p['truth'] for p in predictions)
    assert done.returncode == (0 if all(g['passed'] for g in gates.values()) else 1)


def test_stock_peft_loads_the_adapter_and_gives_the_logits_of_the_run(straight, tiny):
    from peft import PeftModel, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM
    out, _ = straight
    ids = torch.arange(5, 25)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny / 'llm')
    with torch.no_grad():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, out / 'adapter').eval()
        loaded = adapted(ids).logits
        set_peft_model_state_dict(adapted, torch.load(out / 'ckpt' / 'lora.pt', weights_only=True))
        assert torch.equal(adapted(ids).logits, loaded) and not torch.allclose(loaded, plain)
    beside = load_file(out / 'connector.safetensors')
    stored = torch.load(out / 'ckpt' / 'connector.pt', weights_only=True)
    assert beside.keys() == stored.keys() and all(torch.equal(beside[k], stored[k]) for k in stored)


def test_replayed_text_is_the_share_of_the_rows_that_was_asked_for(config, straight, tiny, tmp_path):
    done = run_script('train_a2.py', config, f'--out_dir={tmp_path}', f'--replay_jsonl={tiny}/text/train.jsonl',
                      '--replay_share=0.5', '--epoch_samples=8')
    without, with_replay = (int(re.search(r'(\d+) rows to train on', run.stdout)[1]) for run in (straight[1], done))
    assert with_replay == 2 * without


def test_a_run_that_ruins_the_text_fails_the_text_gate(config, tmp_path):
    done = run_script('train_a2.py', config, f'--out_dir={tmp_path}', '--lora_learning_rate=0.3', '--grad_clip=1000.0')
    assert done.returncode == 1
    gate = gates_of(tmp_path)['text-only loss, rise over the base model']
    assert gate['value'] > 0.02 and not gate['passed']


def test_lora_outside_the_layers_fails_its_gate(config, tmp_path):
    done = run_script('train_a2.py', config, f'--out_dir={tmp_path}', '--epoch_samples=16',
                      r'--lora_targets=lm_head|model\.layers\.0\.self_attn\.q_proj')
    gate = gates_of(tmp_path)["LoRA weights outside the language model's layers"]
    assert done.returncode == 1 and gate['value'] == 2 and not gate['passed']   # lora_A and lora_B of the head


def test_an_aligned_run_whose_gates_failed_is_refused(config, aligned, tmp_path):
    import shutil
    shutil.copytree(aligned, tmp_path / 'failed')
    path = tmp_path / 'failed' / 'gates.json'
    record = json.loads(path.read_text())
    record['gates'][0]['passed'] = record['passed'] = False
    path.write_text(json.dumps(record))
    done = run_script('train_a2.py', config, f'--out_dir={tmp_path}/out', f'--align_dir={tmp_path}/failed',
                      '--allow_failed_gates=False')
    assert done.returncode == 1 and 'failed its gate "shuffled image costs more' in done.stderr


def test_other_base_weights_than_the_aligned_ones_are_refused(config, aligned, tiny, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    from common import sha256_file
    shutil.copytree(tiny / 'llm', tmp_path / 'llm')
    weights = load_file(tmp_path / 'llm' / 'model.safetensors')
    weights['model.norm.weight'] = weights['model.norm.weight'] + 1e-3
    save_file(weights, tmp_path / 'llm' / 'model.safetensors', metadata={'format': 'pt'})
    shutil.copytree(aligned, tmp_path / 'aligned')
    meta = json.loads((tmp_path / 'aligned' / 'ckpt' / 'meta.json').read_text())
    meta['model']['llm'] = str(tmp_path / 'llm')
    (tmp_path / 'aligned' / 'ckpt' / 'meta.json').write_text(json.dumps(meta))
    manifest = json.loads((tmp_path / 'aligned' / 'ckpt' / 'manifest.json').read_text())
    manifest['meta.json'] = sha256_file(tmp_path / 'aligned' / 'ckpt' / 'meta.json')
    (tmp_path / 'aligned' / 'ckpt' / 'manifest.json').write_text(json.dumps(manifest))
    done = run_script('train_a2.py', config, f'--out_dir={tmp_path}/out', f'--align_dir={tmp_path}/aligned')
    assert done.returncode == 1 and 'was aligned to other weights' in done.stderr


def test_a_killed_run_with_dropout_goes_on_as_the_same_run_to_the_last_bit(config, tmp_path):
    """Dropout is a function of the step, so no generator state is needed to repeat it."""
    more = ['--lora_dropout=0.1']
    run_script('train_a2.py', config, f'--out_dir={tmp_path}/whole', *more)
    command = [sys.executable, 'train_a2.py', str(config), f'--out_dir={tmp_path}/cut', *more]
    process = subprocess.Popen(command, cwd=REPO, env={**os.environ, 'OMP_NUM_THREADS': '1'},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / 'cut' / 'ckpt').exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    done = run_script('train_a2.py', config, f'--out_dir={tmp_path}/cut', *more, '--resume=True')
    assert 'Traceback' not in done.stderr, done.stderr
    for name in 'connector', 'lora':
        a, b = (torch.load(tmp_path / run / 'ckpt' / f'{name}.pt', weights_only=True) for run in ('whole', 'cut'))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    for key in 'loss', 'grad_norm':
        assert [r[key] for r in read_log(tmp_path / 'whole')] == [r[key] for r in read_log(tmp_path / 'cut')]


def test_two_ranks_are_one_run(config, straight, tmp_path):
    done = run_script('train_a2.py', config, f'--out_dir={tmp_path}', '--batch_size=3', ranks=2)
    assert (tmp_path / 'gates.json').exists(), done.stderr
    for key in 'loss', 'grad_norm', 'grad_norm_lora':
        np.testing.assert_allclose([r[key] for r in read_log(tmp_path)],
                                   [r[key] for r in read_log(straight[0])], rtol=1e-3)
    for key in 'text', 'noise':
        np.testing.assert_allclose([r[key] for r in read_log(tmp_path, 'eval')],
                                   [r[key] for r in read_log(straight[0], 'eval')], rtol=1e-3)


@pytest.mark.parametrize('change, found', [('--align_dir=nowhere', 'nowhere: no such folder'),
                                           ('--text_jsonl=nowhere', 'nowhere: cannot read this text file'),
                                           ('--lora_targets=nothing', 'lora_targets')])
def test_bad_input_gets_one_line(config, tmp_path, change, found):
    done = run_script('train_a2.py', config, f'--out_dir={tmp_path}', change, '--allow_failed_gates=False'
                      if 'align' in change else '--allow_failed_gates=True')
    assert done.returncode == 1 and found in done.stderr and 'Traceback' not in done.stderr, done.stderr
