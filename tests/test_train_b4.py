"""train_b4.py as a user runs it, from a tiny B3 run: it draws and sounds what it is told, gates can fail, a run is
stopped, resumed, split; and sample.py on what it leaves.

The items are those of test_train_b3.py: the codes of each are any of its kind's quarter of a range, its text the kind's
word. A codec of four patches and one of eight samples stand in for the real ones.
"""
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import stub_codecs
import torch
from conftest import REPO, read_log, run_script
from peft import PeftModel, set_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from test_train_b3 import WORDS, config, json_of, lines, make_shards, same  # noqa: F401  shards, a base model
from transformers import AutoModelForCausalLM, AutoTokenizer

import uti
from common import sha256_file, sha256_tensors
from data import read_audio, read_image
from token_model import load_token_lm, read_text
from uti import Grammar, TokenSpace

WRITE = [f'{task}: {what}' for task in ('t2i', 't2a')
         for what in ("another item's prompt costs more than the right one", 'no prompt costs more than the right one')]


@pytest.fixture(scope='module')
def b3_run(config, tmp_path_factory):  # noqa: F811
    """The out dir of a B3 run that has hardly seen the tasks that write."""
    out = tmp_path_factory.mktemp('b3_run')
    done = run_script('train_b3.py', config, f'--out_dir={out}', '--eval_every=100',
                      "--task_weights={'i2t': 1.0, 'a2t': 1.0, 't2i': 0.01, 't2a': 0.01}")
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope='module')
def b4_config(config, b3_run, tmp_path_factory):  # noqa: F811
    """60 steps of 20 rows, evaluated at steps 0, 30 and 60; beside it a script that runs others with stub codecs."""
    folder = tmp_path_factory.mktemp('b4')
    (folder / 'with_stubs.py').write_text(f'''
import runpy, sys
sys.path[:0] = ['{REPO}', '{REPO}/tests']
import test_train_b4
test_train_b4.put_stubs_in_place()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
''')
    said = [f'{a}{4 * word} then{word}' for word in WORDS for a in ('so', 'now', 'again')]   # as the base says
    (folder / 'text.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in said))
    path = folder / 'b4_tiny.py'
    path.write_text(f'''
shards_dir = '{config.parent}/shards'
rows_dir = '{b3_run}'
image_codec = 'stub'
audio_codec = 'stub'
text_jsonl = '{folder}/text.jsonl'
replay_jsonl = '{folder}/text.jsonl'
lora_r = 4
lora_alpha = 8
lora_dropout = 0.0
task_weights = {{'i2t': 1.5, 'a2t': 1.0, 't2i': 2.0, 't2a': 1.5}}
task_weights_start = {{'i2t': 1.0, 'a2t': 1.0, 't2i': 1.0, 't2a': 1.0}}
max_seq_len = 64
rows_per_step = 20
batch_size = 20
learning_rate = 1e-2
lora_learning_rate = 3e-3
epoch_samples = 1200
eval_every = 30
n_golden = 4
n_predictions = 16
n_text = 12
max_new_tokens = 4
guidance = (1.0, 2.0)
gate_items = 24
gate_prompt_nats = 0.2
gate_read_points = 15.0
gate_pixel_std = 1.0
gate_spectral_std = 0.1
log_every = 1
''')
    return path


def put_stubs_in_place():
    def build(cls, llm, *codecs, **sizes):
        tokenizer = AutoTokenizer.from_pretrained(llm)
        base = {'name': 'tiny', 'text_rows': 512, 'tokenizer_sha256': uti.tokenizer_sha256(tokenizer),
                'end_of_text': tokenizer.convert_tokens_to_ids('<|im_end|>')}
        return cls(uti.TokenSpace(base, stub_codecs.IMAGE, stub_codecs.AUDIO), tokenizer)
    stub_codecs.StubUTI.build = classmethod(build)
    stub_codecs.put_in_place()


def run(config_file, *args, **how):
    """train_b4.py in a process of its own."""
    return run_script(config_file.parent / 'with_stubs.py', 'train_b4.py', config_file, *args, **how)


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Run a script in this process, which has torch already: (exit status or message, what it printed)."""
    def run_it(script, *args):
        handlers = [(s, signal.getsignal(s)) for s in (signal.SIGTERM, signal.SIGINT)]
        monkeypatch.setattr(uti, 'UTI', uti.UTI)
        put_stubs_in_place()
        monkeypatch.setattr(sys, 'argv', [script, *map(str, args)])
        code = 0
        try:
            runpy.run_path(str(REPO / script), run_name='__main__')
        except SystemExit as e:
            code = e.code
        for number, handler in handlers:
            signal.signal(number, handler)
        return code, capsys.readouterr().out
    return run_it


@pytest.fixture(scope='module')
def b4_run(b4_config, tmp_path_factory):
    """The out dir of one uninterrupted run, and what it printed."""
    out = tmp_path_factory.mktemp('b4_run')
    done = run(b4_config, f'--out_dir={out}')
    assert (out / 'gates.json').exists(), done.stderr
    return out, done


def checkpoint(out, name):
    return torch.load(out / 'ckpt' / f'{name}.pt', weights_only=True)


def gates_of(out):
    return {g['name']: g for g in json_of(out / 'gates.json')['gates']}


def test_it_learns_to_draw_passes_its_gates_and_leaves_everything_it_promises(b4_run):
    out, done = b4_run
    evals = read_log(out, 'eval')
    assert [e['step'] for e in evals] == [0, 30, 60]
    for task in 't2i', 't2a':
        assert evals[-1][f'{task}_correct'] < evals[0][f'{task}_correct'] - 0.1
        assert evals[-1][f'{task}_swapped'] > evals[-1][f'{task}_correct'] + 0.5
    gates = gates_of(out)
    assert done.returncode == 0 and all(gates[name]['passed'] for name in WRITE), done.stdout
    space = TokenSpace.load(out / 'token_space.json')
    for folder, n in (out / 'golden' / 'step_000060', 4), (out / 'predictions', 16):
        for task, modality in ('t2i', 'image'), ('t2a', 'audio'):
            assert len(lines(folder / f'{task}.jsonl')) == n
            for line in lines(folder / f'{task}.jsonl'):
                Grammar(space).check_payload(modality, line['codes'])
        with Image.open(folder / 't2i' / f'{n - 1:03d}.png') as image:
            assert image.size == (4, 4) and (folder / 't2i.png').exists()
        assert soundfile.info(folder / 't2a' / f'{n - 1:03d}.wav').frames == 8
        assert [s['prediction'] for s in lines(folder / 'i2t.jsonl')] == [
            s['truth'].strip() for s in lines(folder / 'i2t.jsonl')]
    guided, plain = (lines(out / 'predictions' / f'{name}.jsonl') for name in ('t2i_guidance_2', 't2i'))
    assert len(guided) == 16 and [g['codes'] for g in guided] != [p['codes'] for p in plain]
    state, meta = torch.load(out / 'trainable_rows.pt', weights_only=True), json_of(out / 'trainable_rows.json')
    assert same(state, checkpoint(out, 'rows')) and meta['stage'] == 'b4' and meta['token_space'] == space.sha256
    assert (out / 'curves.png').exists() and json_of(out / 'status.json')['state'] == 'finished'


def test_the_shares_of_the_tasks_are_on_their_way_as_worked_out_by_hand(b4_run):
    """A ramp over 12 of 60 steps: t2i goes from 1/4 to 2/6 of what the fifth of replayed text leaves."""
    steps = read_log(b4_run[0])
    wanted = [0.8 * (1 / 4 + (1 / 3 - 1 / 4) * min(1, step / 12)) for step in range(60)]
    np.testing.assert_allclose([r['share_t2i'] for r in steps], wanted)
    assert {r['share_text'] for r in steps} == {0.2}


def test_stock_peft_loads_the_adapter_and_gives_the_logits_of_the_run(b4_run, config):  # noqa: F811
    ids = torch.arange(5, 25)[None]
    base = AutoModelForCausalLM.from_pretrained(config.parent / 'llm')
    with torch.no_grad():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, b4_run[0] / 'adapter').eval()
        loaded = adapted(ids).logits
        set_peft_model_state_dict(adapted, checkpoint(b4_run[0], 'tuned'))
        assert torch.equal(adapted(ids).logits, loaded) and not torch.allclose(loaded, plain)


def test_a_killed_run_goes_on_as_the_same_run_to_the_last_bit(b4_config, b4_run, tmp_path):
    args = [sys.executable, b4_config.parent / 'with_stubs.py', 'train_b4.py', b4_config, f'--out_dir={tmp_path}']
    process = subprocess.Popen(args, cwd=REPO, env={**os.environ, 'OMP_NUM_THREADS': '1'}, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / 'ckpt').exists():
        time.sleep(0.002)                              # the checkpoint of step 30 is there, steps 31 to 60 are not
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    done = run(b4_config, f'--out_dir={tmp_path}', '--resume=True')
    out, whole = b4_run
    assert done.returncode == whole.returncode, done.stderr
    for name in 'rows', 'tuned':
        assert same(checkpoint(tmp_path, name), checkpoint(out, name))
    for key in 'step', 'loss', 'grad_norm', 'lr', 'share_t2i':
        assert [r[key] for r in read_log(tmp_path)] == [r[key] for r in read_log(out)]
    assert read_log(tmp_path, 'eval') == read_log(out, 'eval')
    for name in 'golden/step_000060/t2a.jsonl', 'predictions/t2i.jsonl', 'predictions/a2t.jsonl':
        assert lines(tmp_path / name) == lines(out / name)
    assert json_of(tmp_path / 'gates.json') == json_of(out / 'gates.json')


def test_micro_batch_size_is_only_memory_and_two_ranks_are_one_run(b4_config, b4_run, tmp_path, run_here):
    """Loss and gradient norms agree to 1e-3 relative over the first 10 steps: sums in another order, nothing else."""
    want, how = read_log(b4_run[0])[:10], [b4_config, '--eval_every=60']
    run_here('train_b4.py', *how, f'--out_dir={tmp_path}/micro', '--batch_size=6')
    done = run(*how, f'--out_dir={tmp_path}/ranks', '--batch_size=7', ranks=2)
    assert (tmp_path / 'ranks' / 'gates.json').exists(), done.stderr
    for other in 'micro', 'ranks':
        got = read_log(tmp_path / other)[:10]
        for key in 'loss', 'grad_norm', 'grad_norm_rows', 'grad_norm_lora':
            np.testing.assert_allclose([r[key] for r in got], [r[key] for r in want], rtol=1e-3)
        first, wanted = read_log(tmp_path / other, 'eval')[0], read_log(b4_run[0], 'eval')[0]
        np.testing.assert_allclose(list(first.values())[2:], list(wanted.values())[2:], rtol=1e-4)


def test_shuffled_captions_fail_the_prompt_ablation_and_reading_gets_worse(b4_config, tiny, tmp_path, run_here):
    make_shards(tmp_path / 'shards', tiny, shuffled=True)
    code, _ = run_here('train_b4.py', b4_config, f'--out_dir={tmp_path}/out', f'--shards_dir={tmp_path}/shards',
                       '--replay_jsonl=', '--lora_learning_rate=0.1', '--gate_text=-0.99')
    failed = {name for name, gate in gates_of(tmp_path / 'out').items() if not gate['passed']}
    assert code == 1 and {name for name in WRITE if 'another' in name} <= failed
    assert {'i2t: points of right labels lost since B3', 'text-only loss, rise over the base model'} <= failed


def test_full_tuning_trains_the_layers_and_leaves_a_whole_model(b4_config, tmp_path, run_here):
    how = f'--out_dir={tmp_path}', '--full_tune=True', '--lora_learning_rate=1e-3', '--eval_every=60', '--resume=True'
    code, _ = run_here('train_b4.py', b4_config, *how)
    evals, gates = read_log(tmp_path, 'eval'), gates_of(tmp_path)
    assert evals[-1]['t2i_correct'] < evals[0]['t2i_correct'] - 0.1 and not (tmp_path / 'adapter').exists()
    for name in ('parameters trained but not declared, or declared but not trained',
                 'trained parameters without a gradient', 'frozen weights changed (sha256)'):
        assert gates[name]['passed'], gates[name]
    stock, tuned = AutoModelForCausalLM.from_pretrained(tmp_path / 'export'), checkpoint(tmp_path, 'tuned')
    name = 'model.layers.1.mlp.up_proj.weight'
    assert torch.equal(stock.state_dict()[name], tuned[f'llm.{name}']) and 'llm.model.norm.weight' in tuned
    assert stock.lm_head.weight.shape[0] == 548
    code, said = run_here('sample.py', tmp_path, '--draw', ' red', '--to', tmp_path, '--device=cpu')
    assert code == 0 and (tmp_path / 'draw_0_0.png').exists(), said
    code, said = run_here('sample.py', tmp_path, '--export', tmp_path / 'left')
    assert code == 0 and 'gates' in said
    left, there = (load_file(tmp_path / folder / 'model.safetensors') for folder in ('left', 'export'))
    assert same(left, there) and 'layers tuned whole' in (tmp_path / 'left' / 'README.md').read_text()
    code, _ = run_here('train_b4.py', b4_config, *how)
    assert same(checkpoint(tmp_path, 'tuned'), tuned) and gates_of(tmp_path) == gates


@pytest.mark.parametrize('change, found', [
    ('--rows_dir=nowhere', 'nowhere: no such folder'),
    ("--task_weights={'i2x': 1.0}", 'wanted shares of the tasks that this token space has codes for'),
    ('--lora_targets=nothing', 'lora_targets'),
    ('--prompt_dropout=1.0', 'wanted shares from 0 to below 1')])
def test_bad_input_gets_one_line(b4_config, tmp_path, change, found, run_here):
    assert found in run_here('train_b4.py', b4_config, f'--out_dir={tmp_path}', change)[0]


def test_a_b3_run_that_failed_or_of_another_space_or_base_is_refused(b4_config, b3_run, tiny, tmp_path, run_here):
    make_shards(tmp_path / 'shards', tiny, image={**stub_codecs.IMAGE, 'sha256': 'zz'})
    code, _ = run_here('train_b4.py', b4_config, f'--out_dir={tmp_path}/out', f'--shards_dir={tmp_path}/shards')
    assert "has another token space: image.sha256 is 'cd' there" in code
    shutil.copytree(b3_run, tmp_path / 'b3')
    record = json_of(tmp_path / 'b3' / 'gates.json')
    record['gates'][1]['passed'] = record['passed'] = False
    (tmp_path / 'b3' / 'gates.json').write_text(json.dumps(record))
    code, _ = run_here('train_b4.py', b4_config, f'--out_dir={tmp_path}/two', f'--rows_dir={tmp_path}/b3')
    assert 'failed its gate "i2t: another' in code
    meta = json_of(tmp_path / 'b3' / 'trainable_rows.json')
    (tmp_path / 'b3' / 'trainable_rows.json').write_text(json.dumps({**meta, 'base_sha256': 'other'}))
    code, _ = run_here('train_b4.py', b4_config, f'--out_dir={tmp_path}/three', f'--rows_dir={tmp_path}/b3',
                       '--allow_failed_gates=True')
    assert 'was made on other weights' in code


# -----------------------------------------------------------------------------
# sample.py on Track B


def test_sample_draws_and_sounds_and_reads_what_it_made(b4_run, tmp_path, run_here):
    code, said = run_here('sample.py', b4_run[0], '--draw', ' red', ' blue', '--sound', ' red', '--n=2', '--seed=3',
                          '--guidance=2', '--to', tmp_path, '--json')
    said = [json.loads(line) for line in said.splitlines()]
    assert code == 0 and [(s['seed'], s['text']) for s in said[:3]] == [(3, ' red'), (4, ' red'), (3, ' blue')]
    files = [s.get('image') or s['audio'] for s in said]
    assert [f.rsplit('/')[-1] for f in files] == ['draw_0_3.png', 'draw_0_4.png', 'draw_1_3.png', 'draw_1_4.png',
                                                  'sound_0_3.wav', 'sound_0_4.wav']
    with Image.open(files[0]) as image:
        assert image.size == (4, 4)
    rows = [*files[0:4], *files[4:]]
    code, told = run_here('sample.py', b4_run[0], '--image', *rows[:4], '--audio', *rows[4:], '--max_new_tokens=2')
    assert code == 0 and told.splitlines() == [f'{file}: {word}' for file, word in zip(
        rows, ['red', 'red', 'blue', 'blue', 'red', 'red'])]


def test_a_prompt_that_no_model_has_seen_gives_a_picture(b4_run, b3_run, tmp_path, run_here):  # noqa: F811
    prompt = 'ein Bär <|img_start|> \U0001f43b ' * 20
    for out, codecs in ((b4_run[0], ()), (b3_run, ('--image_codec=stub', '--audio_codec=stub'))):
        for text in prompt, '':
            code, _ = run_here('sample.py', out, '--draw', text, '--to', tmp_path / out.name, *codecs)
            assert code == 0 and (tmp_path / out.name / 'draw_0_0.png').exists()


def test_sample_says_what_does_not_go_together(b4_run, run_here):
    assert 'takes no --prompt' in run_here('sample.py', b4_run[0], '--image', 'x.png', '--prompt', 'what?')[0]
    assert 'x.png: no such image' in run_here('sample.py', b4_run[0], '--image', 'x.png')[0]
    assert run_here('sample.py', b4_run[0])[0] == 2


# -----------------------------------------------------------------------------
# a run that leaves


STOCK = """
import json, sys
prompts = json.load(open(sys.argv[1]))
out = {'read': [go_on(p, ['text'], 4) for p in prompts['read']],
       'write': [write(' red', 'img'), write(' blue', 'img'), write(' red', 'aud'), write(' blue', 'aud')]}
unrestricted = [model.generate(torch.tensor([p]), max_new_tokens=4)[0, len(p):].tolist() for p in prompts['read']]
with torch.no_grad():
    logits = [model(torch.tensor([p])).logits[0].tolist() for p in prompts['read']]
words = [read(p[1:-1], kind, 4) for p, kind in zip(prompts['read'], prompts['kind'])]
own = sorted({name for name in sys.modules if name.split('.')[0] in
              ('export', 'tokens', 'model', 'uti', 'data', 'common', 'peft')})
print(json.dumps({**out, 'unrestricted': unrestricted, 'logits': logits, 'words': words, 'own': own}))
"""


def stock(folder, prompts):
    """What the card's own lines and STOCK say in a fresh process that is in the exported folder, far from here."""
    card = (folder / 'README.md').read_text()
    (folder / 'prompts.json').write_text(json.dumps(prompts))
    code = re.search(r'```python\n(.*?)```', card, re.DOTALL)[1]
    done = subprocess.run([sys.executable, '-c', code + STOCK, 'prompts.json'], cwd=folder, capture_output=True,
                          text=True, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': ''})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def reading(b4_run):
    """Prompts that read an item of each kind and modality: ids, and img or aud."""
    grammar, prompts, kinds = Grammar(TokenSpace.load(b4_run[0] / 'token_space.json')), [], []
    for task, modality, kind in ('i2t', 'image', 'img'), ('a2t', 'audio', 'aud'):
        first, end = grammar.bounds(grammar.payload_ranges[modality])
        for k in range(4):
            prompts.append(grammar.prompt(task, first + (end - first) // 4 * k).tolist())
            kinds.append(kind)
    return {'read': prompts, 'kind': kinds}


def test_transformers_alone_gives_the_ids_of_the_run_greedily(b4_run, b4_config, config, reading, tmp_path,  # noqa: F811
                                                              run_here):
    """Reading as it is, writing with logits restricted to the range of each place, by the lines of the card. LoRA is
    merged there and not here: by its rounding logits differ, 5e-6 at most when this was written."""
    code, said = run_here('sample.py', b4_run[0], '--export', tmp_path / 'left')
    passed = json_of(b4_run[0] / 'gates.json')['passed']
    assert code == 0 and ('28 gates passed' if passed else 'FAILED') in said
    found = stock(tmp_path / 'left', reading)
    assert found['own'] == [] and set(os.listdir(tmp_path / 'left')) == {
        'README.md', 'config.json', 'generation_config.json', 'model.safetensors', 'token_space.json',
        'tokenizer.json', 'tokenizer_config.json', 'prompts.json'}
    # what sample.py's model says: the ids of a text are here, those of what it draws and sounds in its files
    space = TokenSpace.load(b4_run[0] / 'token_space.json')
    lm = load_token_lm(str(config.parent / 'llm'), space)
    lm.load_rows(checkpoint(b4_run[0], 'rows'))
    adapted = PeftModel.from_pretrained(lm.llm, b4_run[0] / 'adapter').eval()
    end, said = space.text_end, []
    for task, prompts in ('i2t', reading['read'][:4]), ('a2t', reading['read'][4:]):
        said += read_text(lm.eval(), Grammar(space), task, [p[1:-1] for p in prompts], 4)
    assert [ids[:ids.index(end)] if end in ids else ids for ids in found['read']] == said
    assert found['unrestricted'] == found['read']      # nothing here has to be shut off for reading
    code, _ = run_here('sample.py', b4_run[0], '--draw', ' red', ' blue', '--sound', ' red', ' blue', '--to', tmp_path,
                       '--temperature=0')
    codec = uti.UTI(space, None)                       # the stub, which loses nothing
    drawn = [codec.encode_image([read_image(tmp_path / f'draw_{k}_0.png', 4)])[0][0].tolist() for k in (0, 1)]
    drawn += [codec.encode_audio([read_audio(tmp_path / f'sound_{k}_0.wav', 8, 8)])[0][0].tolist() for k in (0, 1)]
    assert code == 0 and found['write'] == drawn and len({str(codes) for codes in drawn}) == 4
    files = {'img': tmp_path / 'draw_0_0.png', 'aud': tmp_path / 'sound_1_0.wav'}
    code, told = run_here('sample.py', b4_run[0], '--image', files['img'], '--audio', files['aud'],
                          '--max_new_tokens=4')
    assert [line.rsplit(': ')[-1] for line in told.splitlines()] == ['red', 'blue']
    assert found['words'] == 2 * ['red', 'blue', 'green', 'yellow']
    largest = 0
    with torch.no_grad():
        for prompt, logits in zip(reading['read'], found['logits']):
            hidden = lm.llm.model(inputs_embeds=lm.embed(torch.tensor([prompt])), use_cache=False).last_hidden_state
            largest = max(largest, (lm.all_logits(hidden)[0] - torch.tensor(logits)).abs().max().item())
    print(f'largest difference of a logit: {largest:.2e}')
    assert 0 < largest < 1e-4 and adapted is not None


def test_a_b3_run_leaves_as_its_own_export_and_a_wrong_base_does_not(b3_run, config, tmp_path, run_here):  # noqa: F811
    code, _ = run_here('sample.py', b3_run, '--export', tmp_path / 'left')
    assert code == 0 and same(*(load_file(f / 'model.safetensors') for f in (tmp_path / 'left', b3_run / 'export')))
    card = (tmp_path / 'left' / 'README.md').read_text()
    space = TokenSpace.load(b3_run / 'token_space.json')
    assert space.sha256 in card and '| audio_1 | 540 | 8 |' in card and 'and LoRA' not in card
    assert AutoTokenizer.from_pretrained(tmp_path / 'left').convert_tokens_to_ids('<|audio_1_7|>') == 547
    llm = AutoModelForCausalLM.from_pretrained(config.parent / 'llm')
    shutil.copytree(config.parent / 'llm', tmp_path / 'llm')
    llm.model.norm.weight.data[3] += 1
    llm.save_pretrained(tmp_path / 'llm')
    code, _ = run_here('sample.py', b3_run, '--export', tmp_path / 'other', '--llm', tmp_path / 'llm')
    assert 'was trained on other frozen weights' in code and not (tmp_path / 'other').exists()


def test_an_export_has_the_precision_of_its_base(b4_run, config, tmp_path, run_here):  # noqa: F811
    """The checkpoint of a run in bfloat16 on a base that is stored so: its masters in float32 round once."""
    AutoModelForCausalLM.from_pretrained(config.parent / 'llm', dtype=torch.bfloat16).save_pretrained(tmp_path / 'llm')
    AutoTokenizer.from_pretrained(config.parent / 'llm').save_pretrained(tmp_path / 'llm')
    shutil.copytree(b4_run[0], tmp_path / 'run')
    lm = load_token_lm(str(tmp_path / 'llm'), TokenSpace.load(b4_run[0] / 'token_space.json'), dtype='auto')
    frozen = sha256_tensors((n, p) for n, p in lm.named_parameters() if not p.requires_grad)
    meta, manifest = (json_of(tmp_path / 'run' / 'ckpt' / f'{name}.json') for name in ('meta', 'manifest'))
    (tmp_path / 'run' / 'ckpt' / 'meta.json').write_text(json.dumps({**meta, 'frozen_sha256': frozen}))
    (tmp_path / 'run' / 'ckpt' / 'manifest.json').write_text(json.dumps(
        {**manifest, 'meta.json': sha256_file(tmp_path / 'run' / 'ckpt' / 'meta.json')}))
    code, _ = run_here('sample.py', tmp_path / 'run', '--export', tmp_path / 'left', '--llm', tmp_path / 'llm')
    left = load_file(tmp_path / 'left' / 'model.safetensors')
    assert code == 0 and {tensor.dtype for tensor in left.values()} == {torch.bfloat16}
    assert torch.equal(left['lm_head.weight'][512:], checkpoint(b4_run[0], 'rows')['new_out'].bfloat16())
    tuned, name = checkpoint(b4_run[0], 'tuned'), 'base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight'
    a, b = (tuned[name.format(x)] for x in 'AB')
    base = lm.llm.model.layers[0].mlp.up_proj.weight.float()
    assert torch.equal(left['model.layers.0.mlp.up_proj.weight'], (base + 8 / 4 * (b @ a)).bfloat16())
