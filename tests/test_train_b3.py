"""train_b3.py as a user runs it, on shards made by hand: it learns, gates can fail, a run is stopped, resumed, split.

Four kinds of items: the codes of an item are any of its kind's quarter of each range, its text is its kind's word. The
language model has learned one thing, to say again what it was told four times; rows that stand for the words steer it.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch
from conftest import REPO, read_log, run_script
from PIL import Image
from stub_codecs import AUDIO, IMAGE
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from small import make as make_small
from common import sha256_file
from data import write_sealed, write_shard
from uti import Grammar, TokenSpace, tokenizer_sha256

WORDS = [' red', ' blue', ' green', ' yellow']
ABLATIONS = [f"{task}: {what} cost more than the right ones" for task in ('i2t', 'a2t')
             for what in ("another item's media", 'random codes')]


def make_llm(tiny, folder):
    """A Qwen3 that continues `x w w w w y` with `w <|im_end|>`."""
    tokenizer = AutoTokenizer.from_pretrained(tiny / 'llm')
    torch.manual_seed(0)
    llm = Qwen3ForCausalLM(Qwen3Config.from_pretrained(tiny / 'llm'))
    end = tokenizer.convert_tokens_to_ids('<|im_end|>')

    def loss_of_step(step):
        ids = torch.randint(3, 500, (32, 8))
        ids[:, 1:5], ids[:, 6], ids[:, 7] = ids[:, 6:7], ids[:, 6], end
        labels = ids.clone()
        labels[:, :6] = -100
        return llm(ids, labels=labels).loss

    make_small.descend(llm, loss_of_step, n_steps=250, learning_rate=1e-2, title='copier')
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_shards(folder, tiny, image=IMAGE, shuffled=False):
    """60 items of each modality to train on, 24 to evaluate, 6 golden; shuffled: train texts dealt anew."""
    tokenizer = AutoTokenizer.from_pretrained(tiny / 'llm')
    space = TokenSpace({'name': 'tiny', 'text_rows': 512, 'tokenizer_sha256': tokenizer_sha256(tokenizer),
                        'end_of_text': tokenizer.convert_tokens_to_ids('<|im_end|>')}, image, AUDIO)
    grammar, rng = Grammar(space), np.random.default_rng(0)
    texts = [tokenizer.encode(word)[:1] for word in WORDS]
    assert len(set(map(tuple, texts))) == 4
    folder.mkdir(exist_ok=True)
    space.save(folder / 'token_space.json')
    splits = {}
    for split, n in ('train', 60), ('eval', 24), ('golden', 6):
        media, items = [], []
        for modality in 'image', 'audio':
            first, end = grammar.bounds(grammar.payload_ranges[modality])
            for k in range(n):
                kind, quarter = k % 4, (end - first) // 4
                codes = first + kind * quarter + rng.integers(0, quarter)
                kind = rng.integers(4) if shuffled and split == 'train' else kind
                items.append((f'{split} {modality} {k}', len(media), texts[kind]))
                media.append((f'{split} {modality} {k}', modality, codes))
        metas = [{'size': [4, 4]} if modality == 'image' else {'n_samples': 8} for _, modality, _ in media]
        side = write_shard(folder, f'{split}-00000', space, media, items, metas=metas)
        splits[split] = {'shards': [{'name': side['name'], 'sha256': side['shard_sha256']}]}
    write_sealed(folder / 'index.json', {'token_space': space.sha256, 'splits': splits})
    (folder / 'gates.json').write_text(json.dumps({'passed': True, 'gates': []}))
    return folder


@pytest.fixture(scope='module')
def config(tiny, tmp_path_factory):
    """100 steps of 16 rows, evaluated at steps 0, 50 and 100."""
    folder = tmp_path_factory.mktemp('b3')
    make_shards(folder / 'shards', tiny)
    make_llm(tiny, folder / 'llm')
    path = folder / 'b3_tiny.py'
    path.write_text(f'''
shards_dir = '{folder}/shards'
llm = '{folder}/llm'
text_jsonl = '{tiny}/text/eval.jsonl'
task_weights = {{'i2t': 2.0, 'a2t': 2.0, 't2i': 1.0, 't2a': 1.0}}
max_seq_len = 32
rows_per_step = 16
batch_size = 16
learning_rate = 2e-2
epoch_samples = 1600
eval_every = 50
n_golden = 4
n_text = 6
max_new_tokens = 4
log_every = 1
''')
    return path


@pytest.fixture(scope='module')
def straight(config, tmp_path_factory):
    """The out dir of one uninterrupted run, with codecs to decode by, and what it printed."""
    out = tmp_path_factory.mktemp('straight')
    script = out.parent / 'with_stubs.py'
    script.write_text(f'''
import runpy, sys
sys.path[:0] = ['{REPO}', '{REPO}/tests']
import stub_codecs, uti
space = uti.TokenSpace.load('{config.parent}/shards/token_space.json')
stub_codecs.StubUTI.build = classmethod(lambda cls, *how, **sizes: cls(space, None))
stub_codecs.put_in_place()
runpy.run_path('train_b3.py', run_name='__main__')
''')
    done = run_script(script, config, f'--out_dir={out}', '--image_codec=stub', '--audio_codec=stub')
    assert (out / 'gates.json').exists(), done.stderr
    return out, done


def rows_of(out):
    return torch.load(out / 'ckpt' / 'rows.pt', weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def json_of(path):
    return json.loads(path.read_text())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_learns_passes_its_gates_and_leaves_everything_it_promises(straight, tiny):
    out, done = straight
    evals = read_log(out, 'eval')
    assert [e['step'] for e in evals] == [0, 50, 100]
    for task in 'i2t', 'a2t', 't2i', 't2a':
        assert evals[-1][f'{task}_correct'] < evals[0][f'{task}_correct'] - 0.5
    gates = {g['name']: g for g in json.loads((out / 'gates.json').read_text())['gates']}
    assert done.returncode == 0 and len(gates) == 12 and all(gates[name]['passed'] for name in ABLATIONS), done.stdout
    state, meta = torch.load(out / 'trainable_rows.pt', weights_only=True), json_of(out / 'trainable_rows.json')
    assert same(state, rows_of(out)) and set(state) == {'new_in', 'new_out'}
    assert meta['token_space'] == TokenSpace.load(out / 'token_space.json').sha256
    assert meta['rows_with_gradient'] == {'new_in': 36, 'new_out': 36}
    stock = AutoModelForCausalLM.from_pretrained(out / 'export')
    assert torch.equal(stock.lm_head.weight[512:], state['new_out'])
    space, golden = TokenSpace.load(out / 'token_space.json'), out / 'golden' / 'step_000100'
    said = lines(golden / 'i2t.jsonl')
    assert len(said) == 4 and [s['prediction'] for s in said] == [s['truth'].strip() for s in said]
    for task, modality in ('t2i', 'image'), ('t2a', 'audio'):
        assert len(lines(golden / f'{task}.jsonl')) == 4
        for line in lines(golden / f'{task}.jsonl'):
            Grammar(space).check_payload(modality, line['codes'])
    with Image.open(golden / 't2i' / '003.png') as image:
        assert image.size == (4, 4) and (golden / 't2i.png').exists()
    assert soundfile.info(golden / 't2a' / '003.wav').frames == 8
    record = json_of(out / 'gates.json')
    assert record['bytes']['full_gradient'] * 2 == record['bytes']['gradient'] * 548 / 36   # the base is tied
    assert (out / 'curves.png').exists() and json.loads((out / 'status.json').read_text())['state'] == 'finished'


def test_shuffled_captions_fail_the_ablations_and_a_touched_base_fails_its_sha256(config, tiny, tmp_path):
    make_shards(tmp_path / 'shards', tiny, shuffled=True)
    script = tmp_path / 'touched_b3.py'
    source = (REPO / 'train_b3.py').read_text()
    assert source.count('\n# gates\ntext = ') == 1
    script.write_text(source.replace('\n# gates\ntext = ', '\nlm.llm.model.norm.weight.data[0] += 1e-6\ntext = '))
    env = {**os.environ, 'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, script, config, f'--out_dir={tmp_path}/out',
                           f'--shards_dir={tmp_path}/shards'], cwd=REPO, env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    failed = {g['name'] for g in json_of(tmp_path / 'out' / 'gates.json')['gates'] if not g['passed']}
    assert {name for name in ABLATIONS if 'another' in name} <= failed
    assert 'frozen weights changed (sha256)' in failed


def test_a_softmax_over_everything_moves_text_and_says_so(config, tmp_path):
    done = run_script('train_b3.py', config, f'--out_dir={tmp_path}', '--typed_head=False', '--epoch_samples=160')
    failed = {g['name'] for g in json_of(tmp_path / 'gates.json')['gates'] if not g['passed']}
    assert done.returncode == 1 and 'text log probabilities, largest difference from the base' in failed


def test_a_killed_run_goes_on_as_the_same_run_to_the_last_bit(config, straight, tmp_path):
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    args = [sys.executable, 'train_b3.py', str(config), f'--out_dir={tmp_path}']
    process = subprocess.Popen(args, cwd=REPO, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / 'ckpt').exists():
        time.sleep(0.002)                              # the checkpoint of step 50 is there, steps 51 to 100 are not
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode != 0
    done = run_script('train_b3.py', config, f'--out_dir={tmp_path}', '--resume=True')
    out, whole = straight
    assert done.returncode == whole.returncode, done.stderr
    assert same(rows_of(tmp_path), rows_of(out))
    for key in 'step', 'loss', 'grad_norm', 'lr':
        assert [r[key] for r in read_log(tmp_path)] == [r[key] for r in read_log(out)]
    assert read_log(tmp_path, 'eval') == read_log(out, 'eval')
    for task in 't2i', 'i2t':                          # sampling is seeded
        assert lines(tmp_path / f'golden/step_000100/{task}.jsonl') == lines(out / f'golden/step_000100/{task}.jsonl')


def test_micro_batch_size_is_only_memory_and_two_ranks_are_one_run(config, straight, tmp_path):
    """Loss and gradient norm agree to 1e-3 relative over the first 10 steps: sums in another order, nothing else."""
    want = read_log(straight[0])[:10]
    how = [config, '--eval_every=100']
    done = run_script('train_b3.py', *how, f'--out_dir={tmp_path}/micro', '--batch_size=5')
    assert 'Traceback' not in done.stderr, done.stderr
    done = run_script('train_b3.py', *how, f'--out_dir={tmp_path}/ranks', '--batch_size=8', ranks=2)
    assert (tmp_path / 'ranks' / 'gates.json').exists(), done.stderr
    for other in 'micro', 'ranks':
        got = read_log(tmp_path / other)[:10]
        for key in 'loss', 'grad_norm':
            np.testing.assert_allclose([r[key] for r in got], [r[key] for r in want], rtol=1e-3)
        first, wanted = read_log(tmp_path / other, 'eval')[0], read_log(straight[0], 'eval')[0]
        np.testing.assert_allclose(list(first.values())[2:], list(wanted.values())[2:], rtol=1e-4)


def test_shards_of_another_token_space_are_refused(config, straight, tiny, tmp_path):
    """The folder is named as before, what is in it was built anew."""
    shutil.copytree(straight[0], tmp_path / 'out')
    make_shards(tmp_path / 'shards', tiny, image={**IMAGE, 'sha256': 'zz'})
    meta = tmp_path / 'out' / 'ckpt' / 'meta.json'
    meta.write_text(meta.read_text().replace(str(config.parent / 'shards'), str(tmp_path / 'shards')))
    manifest = meta.with_name('manifest.json')
    manifest.write_text(json.dumps({**json_of(manifest), 'meta.json': sha256_file(meta)}))
    done = run_script('train_b3.py', config, f'--out_dir={tmp_path}/out', '--resume=True',
                      f'--shards_dir={tmp_path}/shards')
    assert done.returncode == 1 and "has another token space: image.sha256 is 'cd' there" in done.stderr


@pytest.mark.parametrize('change, found', [
    ("--task_weights={'i2t': 1.0, 'i2x': 1.0}", 'wanted shares of the tasks that this token space has codes for'),
    ('--shards_dir=nowhere', 'nowhere: no such folder'),
    ('--max_seq_len=6', 'max_seq_len = 6 leaves no room for text')])
def test_bad_input_gets_one_line(config, tmp_path, change, found):
    done = run_script('train_b3.py', config, f'--out_dir={tmp_path}', change)
    assert done.returncode == 1 and found in done.stderr and 'Traceback' not in done.stderr, done.stderr
