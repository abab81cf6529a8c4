"""The pages of docs/ do what they say: their snippets and commands run, their tables are what the code gives."""
import json
import os
import re
import shlex
import socket
import subprocess
import sys

import conftest
import numpy as np
import pytest
import soundfile
import test_codec
import test_data
import test_decoders
import torch
from conftest import REPO, assert_close_run, read_log, run_here
from PIL import Image

import data
import gates
import lists
import media
import shards
import training
from decoders import load_llm
from examples import NO_IMAGES, Example
from media import BadSamples
from templates import ChatTemplate

OWN = (REPO / 'docs' / 'your_own_data.md').read_text()


def named_blocks(page):
    """{file name: content} of the code blocks that a page names: `name`: and the block below it."""
    return dict(re.findall(r'^`([\w./]+)`:\n\n```python\n(.*?)```$', page, re.DOTALL | re.MULTILINE))


def shown(page):
    """The `$` lines of a page, in order."""
    return re.findall(r'^    \$ (.+)$', page, re.MULTILINE)


# -----------------------------------------------------------------------------
# docs/your_own_data.md

TINY = ('--micro_batch_size=8 --global_batch_size=8 --epoch_samples=16 --epochs=1.0 --eval_every=2 --max_new_tokens=4 '
        '--dtype=float32')
TINY_A = f'{TINY} --n_eval=18 --n_golden=6 --n_predictions=4 --max_seq_len=200 --bucket_edges=(12,24)'
CODECS = '--image_codec=janus --image_prefix= --audio_codec=mimi'
INSTEAD = {                                            # what a real run has and this machine has not
    'train_a1.py': f'--llm={{llm}} --vision={{vision}} {TINY_A} --num_image_tokens=4 --connector_width=32 '
                   '--connector_depth=1 --connector_heads=2',
    'train_a2.py': f'{TINY_A} --allow_failed_gates=True',
    'uti.py': f'--llm={{llm}} {CODECS} --audio_codebooks=2 --clip_seconds=0.12 --n_items=32 --n_alone=2',
    'build_b2.py': f'--llm={{llm}} {CODECS} --n_golden=4 --n_eval=18 --n_checked=4 --allow_failed_gates=True',
    'train_b3.py': f'--llm={{llm}} {TINY} {CODECS} --n_golden=4 --max_seq_len=200 --allow_failed_gates=True',
    'train_b4.py': f'{TINY} {CODECS} --n_golden=4 --n_predictions=4 --max_seq_len=200 --guidance=(1.5,) --gate_items=8 '
                   '--allow_failed_gates=True',
    'sample.py': '--max_new_tokens=4'}


def make_mine(folder):
    """Pictures, sounds and texts as the page wants them, each with its captions."""
    rng = np.random.default_rng(0)
    for name in 'pictures/more', 'sounds', 'texts':
        (folder / name).mkdir(parents=True)
    for n in range(60):
        colour = ('red', 'blue', 'green')[n % 3]
        more = ' and a big one' * (n % 4)
        path = folder / 'pictures' / {0: 'cat', 2: 'cup'}.get(n, f'more/{n:02d}')
        picture = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        picture.save(f'{path}.png' if n % 2 == 0 else f'{path}.jpg')
        # as some editors write it, the lines of some word processors inside
        path.with_suffix('.txt').write_text(f'\ufeffa {colour} circle{more}\r\na\u2028{colour} shape\n')
        if n % 3 == 0:
            path.with_suffix('.chat.txt').write_text('What colour is it?\nred\nHow many are there?\none\n')
        path = folder / 'sounds' / ('bell' if n == 0 else f'{n:02d}')
        soundfile.write(f'{path}.wav' if n % 2 == 0 else f'{path}.flac', rng.uniform(-0.5, 0.5, 6_000), 22_050)
        path.with_suffix('.txt').write_text(f'a {("high", "low")[n % 2]} tone\n')
    notes = [f'There are {n} red boxes and a ball.' for n in range(40)]
    (folder / 'texts' / 'notes.txt').write_text('\n\n'.join(['\ufeffNotes', *notes]))


@pytest.fixture
def checkout(tiny, tmp_path, monkeypatch):
    """A folder with the scripts, the page's files and data/mine, which run_here runs in."""
    for path in REPO.glob('*.py'):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / 'configs').mkdir()
    for name, content in named_blocks(OWN).items():
        (tmp_path / name).write_text(content)
    make_mine(tmp_path / 'data' / 'mine')
    torch.manual_seed(0)
    test_codec.janus().save_pretrained(tmp_path / 'janus')
    test_codec.mimi().save_pretrained(tmp_path / 'mimi')
    monkeypatch.setattr(conftest, 'REPO', tmp_path)
    return tmp_path


@pytest.mark.stage
def test_every_command_of_the_page_on_your_own_data_runs_in_its_order(checkout, tiny):
    """From folders of files to exported models. A gate may fail, as after 2 steps it should; nothing else may."""
    def run(command, *more):
        python, script, *words = shlex.split(command)
        assert python == 'python', command
        instead = INSTEAD.get(script, '').format(llm=tiny / 'llm', vision=tiny / 'vision')
        return run_here(script, *words, *instead.split(), *more)

    commands = shown(OWN)
    assert len(commands) == 16 and len(named_blocks(OWN)) == 7
    for command in commands:
        status, printed = run(command)
        judged = status == 1 and ('FAILED at' in printed or command == 'python gates.py out')
        assert status == 0 or judged, f'{command}\n{status}\n{printed[-2000:]}'
    mine = checkout / 'data' / 'mine'
    out = checkout / 'out'
    captions = json.loads((mine / 'captions.json').read_text())
    chats = json.loads((mine / 'chats.json').read_text())
    assert {caption['conversations'][1]['value'][:1] for caption in captions} == {'a'}     # and no byte order mark
    assert (len(captions), len(chats)) == (120, 60) and len(lists.read_texts(mine / 'replay_text.jsonl')) == 36
    assert sum(len(chat['conversations']) == 4 for chat in chats) == 20
    for name in ('mine_a1/golden/step_000002.png', 'mine_a2_export/adapter_model.safetensors',
                 'mine_drawn/draw_0_0.png', 'mine_drawn/sound_0_0.wav', 'mine_b4_export/model.safetensors'):
        assert (out / name).exists(), name
    passed = set()
    for stage in 'a1', 'a2', 'b2', 'b3', 'b4':
        judged = json.loads((out / f'mine_{stage}' / 'gates.json').read_text())['gates']
        passed |= {gate['name'] for gate in judged if gate['passed']}
    assert passed >= {'frozen weights changed (sha256)', 'media in two splits, or twice in one'}
    status, _ = run('python build_b2.py configs/mine_b2.py', '--out_dir=out/two', '--n_eval=60')
    assert FAILS[-1] in status


def read_chat(folder, captions=False, max_images=4, **change):
    """read_llava of a list of one chat with something changed in it."""
    turns = [{'from': 'human', 'value': '<image>\nWhat?'}, {'from': 'gpt', 'value': 'red'}]
    chat = {'id': '1', 'image': 'a.png', 'conversations': turns, **change}
    (folder / 'chats.json').write_text(json.dumps([chat]))
    bad_samples = BadSamples(folder / 'bad.jsonl', 0)
    lists.read_llava(folder / 'chats.json', folder, bad_samples, captions=captions, max_images=max_images)


def read_line(folder, **change):
    """read_manifest of a line with something changed in it."""
    (folder / 'sounds.jsonl').write_text(json.dumps({'id': '1', 'source': 'mine', 'text': 'a bell', **change}))
    shards.read_manifest(folder / 'sounds.jsonl', BadSamples(folder / 'bad.jsonl', 0))


def read_row(folder):
    (folder / 'sounds.csv').write_text('file_name,caption_1\na.wav,a dog, barking\n')
    shards.read_sound_folder(folder, folder / 'sounds.csv', BadSamples(folder / 'bad.jsonl', 0))


def read_link(folder):
    (folder / 'elsewhere').mkdir()
    (folder / 'root').mkdir()
    (folder / 'root' / 'a.png').symlink_to(folder / 'elsewhere')
    lists.path_inside(folder / 'root', 'a.png', 'sample 0')


def read_cut_picture(folder):
    Image.new('RGB', (64, 64), 'red').save(folder / 'a.png')
    (folder / 'a.png').write_bytes((folder / 'a.png').read_bytes()[:100])
    media.read_image(folder / 'a.png', 8)


def read_sound(folder, wave, n_bytes=None):
    soundfile.write(folder / 'a.wav', wave, 16_000)
    (folder / 'a.wav').write_bytes((folder / 'a.wav').read_bytes()[:n_bytes])
    media.read_audio(folder / 'a.wav', 16_000, 16_000)


def split_too_few(folder):
    examples = [Example(lists.Item('1', (), ()), np.arange(4), np.arange(2), NO_IMAGES, False)]
    data.choose_split(examples, 8, 8, bucket_edges=(10, 20), path=folder / 'split.json', bad_samples=None, read=None)
    data.load_split(examples, folder / 'split.json', 8)


def read_text(folder, text):
    (folder / 'text.jsonl').write_text(json.dumps({'text': text}))
    [(where, text)] = lists.text_lines(folder / 'text.jsonl')
    ChatTemplate(test_data.Letters(), 2, 64).text(text, where)


def change_a_caption(folder):
    examples = test_data.make_examples(folder, 60)
    test_data.split(examples, folder)
    test_data.split(test_data.changed(examples, 7, turns=(('', 'another'),)), folder)


def load_doge(folder):
    """Its attention adds a mask of its own to the scores."""
    load_llm(test_decoders.make(folder, 'Doge', keep_window_size=2))


QUESTION = {'from': 'human', 'value': 'What?'}
SHOWN = {'from': 'human', 'value': '<image>\nWhat?'}
ANSWER = {'from': 'gpt', 'value': 'red'}
NO_ANSWER = {'from': 'gpt', 'value': ' '}
PROVOKE = {
    'cannot read this image': lambda folder: data.media_key(lists.Item('1', (str(folder / 'none.png'),), ())),
    'not a whole image': read_cut_picture,
    'leaves the image root': lambda folder: read_chat(folder, image='../a.png'),
    'is a link out of the image root': read_link,
    'is not a list of human and gpt turns in pairs': lambda folder: read_chat(folder, conversations=[QUESTION]),
    'an empty answer': lambda folder: read_chat(folder, conversations=[QUESTION, NO_ANSWER]),
    'wanted one each': lambda folder: read_chat(folder, conversations=[QUESTION, ANSWER]),
    'wanted at most max_images': lambda folder: read_chat(folder, image=5 * ['a.png']),
    'wanted it in the first': lambda folder: read_chat(folder, captions=True, conversations=[
        QUESTION, ANSWER, SHOWN, ANSWER]),
    'to evaluate on: add data or lower n_eval and n_golden': split_too_few,
    'this run would fail at its end': lambda folder: gates.end_doomed(gates.label_gates(8, 2, 0, 0.01)),
    'silent in its first': lambda folder: read_sound(folder, np.zeros(8000)),
    'truncated': lambda folder: read_sound(folder, np.full(8000, 0.5), n_bytes=5000),
    'not a whole sound': lambda folder: read_sound(folder, np.zeros(0), n_bytes=3),
    'a text with commas stands in quotes': read_row,
    'neither image nor audio': read_line,
    'wanted some': lambda folder: read_line(folder, audio='a.wav', text=''),
    'which is not Unicode': lambda folder: read_text(folder, 'x \ud83d'),
    'one token': lambda folder: read_text(folder, 'a'),
    'cannot be trained here': lambda folder: load_llm(test_decoders.make(folder, 'StableLm')),
    'comes out otherwise here than in transformers': load_doge,
    'was chosen from other data': change_a_caption,
    'was trained on other data': lambda folder: training.check_same_data({'data': {'text_jsonl': 'a'}}, {}, folder)}
FAILS = re.findall(r'^\| `(.+?)` \|', OWN[OWN.index('## What fails'):], re.MULTILINE)


def test_the_page_names_every_failure_that_is_provoked_here():
    assert FAILS == [*PROVOKE, 'add data or change n_eval and n_golden']   # the last: at the end of the run above


@pytest.mark.parametrize('words', PROVOKE)
def test_what_fails_does_so_in_the_words_of_the_page(words, tmp_path):
    with pytest.raises(SystemExit) as e:
        PROVOKE[words](tmp_path)
    assert words in str(e.value) and '\n' not in str(e.value)


# -----------------------------------------------------------------------------
# docs/bigger.md


@pytest.mark.stage
def test_several_machines_are_one_run_by_the_command_of_the_page(a1_config, a1_run, tmp_path):
    """Two torchruns that meet on this machine, one process each: the losses of the run in one process."""
    page = (REPO / 'docs' / 'bigger.md').read_text()
    command = next(line for line in shown(page) if '--nnodes' in line)
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    for had, now in (('--nnodes=4', '--nnodes=2'), ('--nproc_per_node=8', '--nproc_per_node=1'),
                     ('node0:29500', f'localhost:{port}'), ('configs/a1_qwen3_8b.py', str(a1_config))):
        assert had in command
        command = command.replace(had, now)
    words = [sys.executable, '-m', 'torch.distributed.run', *shlex.split(command)[1:], '--micro_batch_size=4',
             f'--out_dir={tmp_path}/out']
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    nodes = []
    for _ in range(2):
        nodes.append(subprocess.Popen(words, cwd=REPO, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                      text=True))
    errors = [node.communicate(timeout=300)[1] for node in nodes]
    assert (tmp_path / 'out' / 'gates.json').exists(), errors
    assert read_log(tmp_path / 'out', 'run')[0]['world_size'] == 2
    assert_close_run(tmp_path / 'out', a1_run.out, ('loss', 'grad_norm'))
