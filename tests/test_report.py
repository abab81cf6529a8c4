"""report.py: the page of a whole out folder, of half-finished and damaged ones, and what a browser makes of it."""
import html
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import soundfile
from conftest import REPO, run_script
from PIL import Image
from test_train_a1 import config  # noqa: F401  the tiny A1 config

from tools import report
from common import sha256_file
from gates import at_least, at_most, conclude

EVIL = '<script>alert("x")</script>'
STAGES = ('A1 ', 'A1.1 ', 'A2 ', 'B1 ', 'B2 ', 'B3 ', 'B4 ')
RUN = {'commit': 'abc1234', 'dirty': True, 'python': '3.11', 'torch': '2.13', 'transformers': '5.20',
       'device': 'a machine of 2 cores', 'date': '2026-11-24'}
SPACE = {'base': {'name': 'tiny', 'text_rows': 320, 'tokenizer_sha256': 'ab', 'end_of_text': 299},
         'image': {'class': 'Stub', 'settings': {}, 'sha256': 'cd', 'size': 8, 'grid': [2, 2], 'codes': 16},
         'audio': {'class': 'Stub', 'settings': {}, 'sha256': 'ef', 'sample_rate': 16000, 'samples': 4000,
                   'frames': 4, 'codebooks': 1, 'codes': 8},
         'special': {}, 'ranges': [['text', 0, 320], ['special', 320, 4], ['image', 324, 16], ['audio_0', 340, 8]],
         'sha256': 'f' * 64}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def write_lines(path, records):
    write(path, ''.join(json.dumps(r) + '\n' for r in records))


def picture(path, n, size=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(n).integers(0, 255, (size // 4, size // 4, 3), np.uint8)
    Image.fromarray(pixels.repeat(4, 0).repeat(4, 1)).save(path)


def sound(path, n):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * (300 + 40 * n) * np.arange(4000) / 16000), 16000)


def log_of(folder, stage, losses, **settings):
    """log.jsonl and status.json of a finished run of 20 steps that was evaluated at 0, 10 and 20."""
    records = [{'kind': 'run', 'stage': stage, 'settings': {'rows_per_step': 8, **settings}, **RUN, 'world_size': 1,
                'n_steps': 20, 'epoch_samples': 160, 'trainable': 4321}]
    for step in 0, 10, 20:
        records += [{'kind': 'step', 'step': step, 'window_loss': 4 - step / 10, 'samples_per_s': 2.0,
                     'peak_memory_mb': 1234}] * (step > 0)
        records += [{'kind': 'eval', 'step': step, **{k: v - step / 100 for k, v in losses.items()}}]
    write_lines(folder / 'log.jsonl', records)
    write(folder / 'status.json', {'state': 'finished', 'step': 20, 'n_steps': 20})


def tokens_run(folder, stage, out, n=4):
    """A B3 or B4 run: n golden items a task, drawn and sounded at three checkpoints."""
    losses = {f'{t}_{c}': 2.0 + k for t in ('i2t', 'a2t') for k, c in enumerate(('correct', 'swapped', 'random'))}
    losses.update({f'{t}_{c}': 2.0 for t in ('t2i', 't2a') for c in ('correct', 'swapped', 'empty', 'win_swapped')})
    log_of(folder, stage, {**losses, 'text': 3.0}, shards_dir=str(out / 'b2_small'))
    write(folder / 'token_space.json', SPACE)
    for step in 0, 10, 20:
        golden = folder / 'golden' / f'step_{step:06d}'
        for task in 'i2t', 'a2t', 't2i', 't2a':
            ids = [f'captions-{k:06d}' if 'i' in task else f's{k}' for k in range(n)]
            made = {'prediction': f' said at {step}'} if task[1:] == '2t' else {'codes': [330, 331]}
            shas = [sha256_file(out.parent / 'media' / (f'{k}.png' if 'i' in task else f'{k}.wav')) for k in range(n)]
            write_lines(golden / f'{task}.jsonl', [
                {'id': id, 'media_sha256': sha, 'truth': f' {task} {k} {EVIL}', **made}
                for k, (id, sha) in enumerate(zip(ids, shas))])
        for k in range(n):
            picture(golden / 't2i' / f'{k:03d}.png', 100 * step + k)
            sound(golden / 't2a' / f'{k:03d}.wav', step + k)
    conclude(folder, [at_least('text loss', 1, 0), at_least('share drawn', 0.5, 0.85)], ablations={'t2i': {'d': 0.1}})


def write_small(out, a1):
    """The out folder of a whole run: A1 as train_a1.py left it, the other stages in the formats that theirs write."""
    shutil.copytree(a1, out / 'a1_small')
    write(out / 'a1_small' / 'truth.json', {'one object': [9, 10], EVIL: [0, 0]})
    first = json.loads(next((out / 'a1_small' / 'golden').glob('*.jsonl')).read_text().splitlines()[0])

    runs = []
    for k, (rate, ln) in enumerate([(1e-3, False), (1e-3, True), (2e-3, False), (2e-3, True)]):
        folder = out / 'a11_small' / f'learning_rate={rate},vision_ln={ln}'
        log_of(folder, 'a1', {'correct': 1.0, 'shuffled': 2.0})
        conclude(folder, [at_most('loss', k, 2)])
        runs.append({'learning_rate': rate, 'vision_ln': ln, 'score': 0.5 + k, 'loss': 1.0, 'd_shuffle': 0.25,
                     'd_zero': 2.0, 'gates_passed': k < 3, 'folder': f'out/a11_small/{folder.name}'})
    write(out / 'a11_small' / 'sweep.json', {'settings': {'grid': {
        'learning_rate': [1e-3, 2e-3], 'vision_ln': [False, True]}}, 'runs': runs, 'best': runs[0]})

    log_of(out / 'a2_small', 'a2', {'correct': 1.0, 'shuffled': 2.0, 'zero': 3.0, 'noise': 3.5, 'win_zero': 1.0,
                                    'short': 1.0, 'long': 2.0, 'text': 2.5}, secret=EVIL)
    write(out / 'a2_small' / 'split.json', {'eval': ['a', 'b'], 'golden': ['c']})
    for step in 0, 5, 10, 15, 20:
        write_lines(out / 'a2_small' / 'golden' / f'step_{step:06d}.jsonl', [
            {'id': f'chat {k}', 'image': first['image'], 'image_sha256': '', 'turn': 0, 'question': f'What? {EVIL}',
             'truth': 'a red circle', 'prediction': 'a red circle' if step == 20 else EVIL} for k in range(20)])
    conclude(out / 'a2_small', [at_least(f'right {EVIL}', 0.9, 0.5)], losses={'correct': 0.8})

    for k in range(4):
        picture(out.parent / 'media' / f'{k}.png', k)
        sound(out.parent / 'media' / f'{k}.wav', k)
        sound(out / 'b1_small' / 'sounds' / f'{k:02d}_original.wav', k)
        sound(out / 'b1_small' / 'sounds' / f'{k:02d}_decoded.wav', k)
    write(out / 'b1_small' / 'token_space.json', SPACE)
    pairs = [Image.new('RGB', (256, 128), (40 * k, 90, 120)) for k in range(3)]
    (out / 'b1_small' / 'pictures').mkdir()
    Image.fromarray(np.concatenate(pairs)).save(out / 'b1_small' / 'pictures' / 'original_decoded.png')
    write(out / 'b1_small' / 'report.json', {'psnr': 29.5, 'si_snr': 6.5, 'settings': {'n_items': 512}, **RUN})
    write(out / 'b1_small' / 'baseline.json', {'psnr': 29.0})
    conclude(out / 'b1_small', [at_least('psnr', 29.5, 28)])

    write(out.parent / 'media' / 'data.json', [{'id': f'captions-{k:06d}', 'image': f'{k}.png'} for k in range(4)])
    write_lines(out.parent / 'media' / 'manifest.jsonl', [{'id': f's{k}', 'audio': f'{k}.wav'} for k in range(4)])
    write(out / 'b2_small' / 'token_space.json', SPACE)
    write(out / 'b2_small' / 'index.json', {
        'splits': {s: {'media': 4, 'items': 6, 'shards': [{'ids': 1234, 'bytes': 999}]} for s in ('train', 'eval')},
        'provenance': {'commit': 'abc1234', 'settings': {'data_json': f'{out.parent}/media/data.json',
                                           'image_root': f'{out.parent}/media',
                                           'manifests': [f'{out.parent}/media/manifest.jsonl']}}})
    write(out / 'b2_small' / 'report.json', {
        'lengths': {'i2t': {'items': 4, 'mean': 18.5, 'p0': 17, 'p100': 20}}, 'skipped': [['x', 'y']],
        'wrong_shards': [], 'this_start': {
            'shards': 2, 'items': 12, 'seconds': 3.25, 'device': 'cpu', 'world_size': 1}})
    conclude(out / 'b2_small', [at_least('share of shards', 1, 1)])
    tokens_run(out / 'b3_small', 'b3', out)
    tokens_run(out / 'b4_small', 'b4', out)


@pytest.fixture(scope='module')
def small(config, tmp_path_factory):  # noqa: F811
    """out/small, whole; the A1 run in it is a real one."""
    root = tmp_path_factory.mktemp('report')
    done = run_script('train_a1.py', config, f'--out_dir={root}/a1')
    assert 'Traceback' not in done.stderr, done.stderr
    write_small(root / 'out' / 'small', root / 'a1')
    return root / 'out' / 'small'


@pytest.fixture(scope='module')
def whole(small):
    """Its page."""
    return report.page(small)[0]


@pytest.fixture
def copy(small, tmp_path):
    shutil.copytree(small.parents[1], tmp_path / 'copy', ignore=shutil.ignore_patterns('ckpt*', 'a1', 'report.html'))
    return tmp_path / 'copy' / 'out' / 'small'


def gates_py(monkeypatch, folder):
    """The exit status, or message, of python gates.py FOLDER, and the page that it wrote, '' for none."""
    monkeypatch.setattr(sys, 'argv', ['gates.py', str(folder)])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(str(REPO / 'gates.py'), run_name='__main__')
    return e.value.code, (folder / 'report.html').read_text() if (folder / 'report.html').is_file() else ''


def headings(page):
    return re.findall('<h2>(.*?)</h2>', page)


def section(page, stage):
    """One stage's part of a page."""
    return next(part for part in page.split('<section')[1:] if f'<h2>{stage} ' in part)


def notes(page):
    return [html.unescape(line) for line in re.findall('<p class="note">(.*?)</p>', page)]


def test_the_page_needs_nothing_but_itself(whole):
    targets = re.findall(r'\b(?:src|href|data|action|poster|srcset)="([^"]*)"', whole)
    assert len(targets) > 50 and all(t.startswith(('data:', '#')) for t in targets)
    assert not re.search(r'https?://|<script|<link|<iframe|url\(|@import|javascript:', whole)
    assert set(re.findall('href="#(.*?)"', whole)) == set(re.findall('<section id="(.*?)"', whole))


def test_a_whole_run_shows_every_stage_with_its_verdict(small, whole):
    assert [h.split('·')[0] for h in headings(whole)] == list(STAGES) and notes(whole) == []
    a1 = json.loads((small / 'a1_small' / 'gates.json').read_text())
    passed = sum(g['passed'] for g in a1['gates'])
    assert f'<strong>{5 + passed} of {7 + len(a1["gates"])} gates passed</strong>; 7 of 7 stages judged' in whole
    nav = dict(zip(re.findall('href="#.*?">(.*?)</a>', whole), re.findall('<span class="verdict (.*?)"', whole)))
    assert nav == {'A1 a1_small': 'passed' if a1['passed'] else 'failed', 'A1.1 a11_small': 'passed',
                   'A2 a2_small': 'passed', 'B1 b1_small': 'passed', 'B2 b2_small': 'passed', 'B3 b3_small': 'failed',
                   'B4 b4_small': 'failed'}
    for gate in a1['gates']:
        assert f'<td>{html.escape(gate["name"])}</td>' in whole and f'<td>{html.escape(gate["bar"])}</td>' in whole
    b3 = section(whole, 'B3')
    assert ('<span class="failed">FAIL</span></td><td>share drawn</td><td class="number">0.5</td><td>&gt;= 0.85</td>'
            in b3)


def test_a_stage_says_commit_hardware_time_settings_and_sizes(whole):
    a2, b1, b2 = (section(whole, stage) for stage in ('A2', 'B1', 'B2'))
    for what, value in {'commit': 'abc1234, dirty', 'hardware': 'a machine of 2 cores', 'steps': '20',
                        'parameters trained': '4,321', 'peak memory': '1,234 MB',
                        'time of the training steps': '1 min 20 s, without evaluations'}.items():
        assert f'<dt>{what}</dt><dd>{value}</dd>' in a2            # 20 steps of 8 rows at 2 rows a second
    assert '<td>rows_per_step</td><td>8</td>' in a2
    assert '<td>n_items</td>' in b1 and '2 shards, 12 items in 3.2 s' in b2
    assert '<td>psnr</td><td class="number">29.5</td><td>29</td>' in b1
    assert '<td>train</td><td class="number">1</td><td class="number">4</td><td class="number">6</td>' in b2
    assert '<td>i2t</td><td class="number">4</td><td class="number">18.5</td>' in b2 and '1 samples skipped' in b2
    for part in b1, b2, section(whole, 'B4'):
        assert '<td>image</td><td class="number">324</td><td class="number">340</td><td class="number">16</td>' in part


def test_curves_say_where_they_begin_and_end(whole):
    a2, b3 = section(whole, 'A2'), section(whole, 'B3')
    assert 'held-out loss by what the model sees by step: correct from 1 to 0.8; shuffled from 2 to 1.8' in a2
    assert 'loss by step: training from 3 to 2; held out from 1 to 0.8' in a2
    assert 'i2t: pictures described by step: correct from 2 to 1.8; swapped from 3 to 2.8; random from 4' in b3
    assert 'win_swapped' not in b3
    assert 'by learning_rate: vision_ln False from 0.5 to 2.5; vision_ln True from 1.5 to 3.5' in section(whole, 'A1.1')


def test_golden_items_stand_beside_their_truth_at_three_checkpoints(whole):
    a2, b1, b4 = (section(whole, stage) for stage in ('A2', 'B1', 'B4'))
    assert 'Checkpoints 0, 10, 20 of the 5 that were saved; 12 of 20 items' in a2
    assert a2.count('<figure class="card"><img') == 12 and a2.count('<span class="same">a red circle</span>') == 12
    assert '3 of 3 that were kept' in b1 and b1.count('<audio controls') == 8
    assert b1.count('<figure class="card"><img') == 3
    i2t, a2t, t2i, t2a = re.split('<h4>', b4)[1:]
    assert (i2t.count('<img'), a2t.count('<audio'), t2i.count('<img'), t2a.count('<audio')) == (4, 4, 16, 16)
    assert 'alt="captions-000002: i2t 2 ' in i2t and i2t.count('said at 10') == 4
    assert '<small>step 20</small>' in t2i and 'alt="step 10, asked for: t2i 3 ' in t2i


def test_an_original_of_other_bytes_is_not_shown_for_the_one_that_was_tokenized(copy):
    index = json.loads((copy / 'b2_small' / 'index.json').read_text())
    index['provenance']['settings'] = {
        'data_json': f'{copy.parent}/media/data.json', 'image_root': f'{copy.parent}/media', 'manifests': []}
    write(copy / 'b2_small' / 'index.json', index)
    log = copy / 'b3_small' / 'log.jsonl'
    log.write_text(re.sub('"shards_dir": ".*?"', '"shards_dir": "out/b2_small"', log.read_text()))
    picture(copy.parent / 'media' / '1.png', 77)
    i2t, a2t, *_ = re.split('<h4>', section(report.page(copy)[0], 'B3'))[1:]
    assert (i2t.count('<img'), a2t.count('<audio')) == (3, 0)
    assert i2t.count('the original is not at hand') == 1 and a2t.count('the original is not at hand') == 4


def test_a_long_sound_is_cut_and_the_page_says_so(tmp_path):
    soundfile.write(tmp_path / 'long.wav', np.zeros(48000), 8000)
    sound(tmp_path / 'short.wav', 1)
    assert report.show_sound(tmp_path / 'long.wav', 'x').endswith('</audio><small>first 4 s</small>')
    assert report.show_sound(tmp_path / 'short.wav', 'x').endswith('</audio>')


def test_text_of_the_data_stays_text(copy):
    (copy / 'a1_small').rename(copy / 'a1_"><img src=x onerror=alert(1)>')
    page, _ = report.page(copy)
    assert EVIL not in page and '<script' not in page and '<img src=x' not in page
    assert page.count(html.escape(EVIL)) > 50
    for part in 'A1', 'A2', 'B4':                      # a key of truth.json, a gate, a setting, a question, a truth
        assert html.escape(EVIL) in section(page, part)
    assert f'<td>right {html.escape(EVIL)}</td>' in page and f'<td>secret</td><td>{html.escape(EVIL)}</td>' in page
    assert '<h1>nanoGraft report: small</h1>' in page


def test_the_exit_status_is_that_of_the_gates(copy, monkeypatch, capsys):
    for stage in 'a1_small', 'b3_small', 'b4_small':
        conclude(copy / stage, [at_least('text loss', 1, 0)])
    capsys.readouterr()
    status, page = gates_py(monkeypatch, copy)
    said = capsys.readouterr()
    assert status == 0 and '6 of 6 gates passed' in page and said.err == f'{copy}/report.html\n'
    assert said.out.count('pass  ') == 6
    conclude(copy / 'b4_small', [at_least('text loss', -1, 0)])
    assert gates_py(monkeypatch, copy)[0] == 1


def test_a_page_that_cannot_be_written_leaves_the_exit_status_as_it_is(copy, monkeypatch, capsys):
    (copy / 'a2_small' / 'report.html').mkdir()
    assert gates_py(monkeypatch, copy / 'a2_small') == (0, '')
    assert 'report.html: cannot write here' in capsys.readouterr().err


def test_one_stage_has_a_page_of_its_own(copy, monkeypatch):
    status, page = gates_py(monkeypatch, copy / 'a2_small')
    assert status == 0 and headings(page) == ['A2 · visual instruction tuning']
    assert 'Not in this folder: A1, A1.1, B1, B2, B3, B4.' in page
    _, page = gates_py(monkeypatch, copy / 'a11_small')            # its four runs are its own, no stages beside it
    assert [h.split('·')[0] for h in headings(page)] == ['A1.1 '] and '3 of 4 gates passed' in page


def test_a_run_that_has_just_begun_has_a_page_too(copy, tmp_path, monkeypatch):
    out = tmp_path / 'begun'
    write_lines(out / 'a1' / 'log.jsonl', [{'kind': 'run', 'stage': 'a1', 'settings': {}, **RUN}])
    write(out / 'a1' / 'status.json', {'state': 'running', 'step': 0, 'n_steps': 600})
    shutil.copytree(copy / 'a11_small', out / 'sweep', ignore=shutil.ignore_patterns('sweep.json'))
    status, page = gates_py(monkeypatch, out)
    assert status.endswith('no gates.json here or one level below; run a stage first')
    assert '0 of 0 gates passed' in page and 'running, saved at step 0 of 600' in section(page, 'A1')
    assert 'no step and no evaluation yet' in page and '4 runs finished, not ranked yet' in section(page, 'A1.1')
    assert [h.split('·')[0] for h in headings(page)] == list(STAGES)
    assert page.count('Not run yet') == 5 and 'split.json is missing.' in notes(page)


def test_a_folder_without_a_stage_gets_no_page(tmp_path, monkeypatch):
    (tmp_path / 'a1').mkdir()
    assert gates_py(monkeypatch, tmp_path)[1] == '' and not (tmp_path / 'report.html').exists()


def test_what_is_damaged_or_missing_is_a_line_of_the_page(copy, monkeypatch):
    log = copy / 'a2_small' / 'log.jsonl'
    log.write_text(log.read_text()[:-20])
    write(copy / 'a1_small' / 'gates.json', '{"passed": true, "gates": [{"na')
    write(copy / 'b2_small' / 'report.json', '[]')
    (copy / 'b1_small' / 'report.json').unlink()
    (copy / 'b3_small' / 'golden' / 'step_000010' / 't2i' / '001.png').write_bytes(b'\x89PNG\r\n')
    (copy / 'b3_small' / 'golden' / 'step_000010' / 't2a' / '001.wav').write_bytes(b'RIFF')
    (copy / 'b4_small' / 'golden' / 'step_000010' / 't2a' / '001.wav').unlink()
    status, page = gates_py(monkeypatch, copy)
    assert status == 1 and [h.split('·')[0] for h in headings(page)] == list(STAGES)
    for line in ('log.jsonl: 1 of 6 lines are damaged.', 'report.json is damaged: no JSON object',
                 'report.json is missing.'):
        assert line in notes(page)
    assert '<td>gates.json is whole</td><td class="number">nan</td>' in section(page, 'A1')
    assert '001.png: no picture to show' in section(page, 'B3') and '001.wav: no sound to play' in section(page, 'B3')
    assert section(page, 'B4').count('not decoded') == 1


def leaves_as(value, other):
    """JSON of the same shape with every number, text and truth value replaced."""
    if isinstance(value, dict):
        return {k: v if k in ('kind', 'stage') else leaves_as(v, other) for k, v in value.items()}
    return [leaves_as(v, other) for v in value] if isinstance(value, list) else other


@pytest.mark.parametrize('damage', ['nothing', 'zeros', 'half', 'list', 'object', None, EVIL, -1, {'x': []}], ids=repr)
def test_no_content_of_the_files_keeps_the_page_from_being_made(copy, damage):
    contents = {'nothing': b'', 'zeros': b'\0\xff' * 99, 'list': b'[[]]', 'object': b'{"gates": 3, "passed": {}}'}
    for path in [p for p in copy.rglob('*') if p.is_file()]:
        content = path.read_bytes()
        if damage in ('nothing', 'zeros', 'list', 'object'):
            path.write_bytes(contents[damage])
        elif damage == 'half':
            path.write_bytes(content[:len(content) // 2])
        elif path.suffix in ('.json', '.jsonl'):
            lines = [content] if path.suffix == '.json' else content.splitlines()
            path.write_text('\n'.join(json.dumps(leaves_as(json.loads(line), damage)) for line in lines))
    page, _ = report.page(copy)
    assert [h.split('·')[0] for h in headings(page)] == list(STAGES) and len(notes(page)) > 5
    assert EVIL not in page


# -----------------------------------------------------------------------------
# in a browser

CHROMIUM = shutil.which('chromium')
CHECK = """(async () => {
  const broken = [...document.images].filter(image => !(image.naturalWidth > 0)).map(image => 'image ' + image.alt);
  for (const sound of document.querySelectorAll('audio')) {
    await new Promise(done => { sound.onloadedmetadata = sound.onerror = done; sound.load(); });
    if (!(sound.readyState > 0 && sound.duration > 0)) broken.push('sound ' + sound.ariaLabel);
  }
  for (const folded of document.querySelectorAll('details')) folded.open = true;
  return {broken, images: document.images.length, sounds: document.querySelectorAll('audio').length,
          width: innerWidth, wide: document.documentElement.scrollWidth};
})()"""


def in_browser(page, width, folder):
    """What CHECK finds in a page that is shown `width` wide, and all that the browser's console said.

    Chromium is asked over a pair of pipes, by its DevTools protocol: the page itself stays as it is."""
    (folder / 'page.html').write_text(page)
    (its_in, our_out), (our_in, its_out) = os.pipe(), os.pipe()
    process = subprocess.Popen(
        ['bash', '-c', f'exec "$@" 3<&{its_in} 4>&{its_out}', '-', CHROMIUM, '--headless', '--no-sandbox',
         '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync', f'--user-data-dir={folder}/profile',
         '--remote-debugging-pipe', 'about:blank'],
        pass_fds=(its_in, its_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(its_in)
    os.close(its_out)
    patience = threading.Timer(120, process.kill)      # the pipe then ends, and with it the waiting
    patience.start()
    said, session = [], {}
    with open(our_in, 'rb') as answers, open(our_out, 'wb', buffering=0) as questions:
        def until(wanted):
            """The next message that is wanted; what the console says before it is kept."""
            while True:
                message = bytearray()
                while (byte := answers.read(1)) != b'\0':
                    assert byte, 'Chromium has ended, or took too long'
                    message += byte
                message = json.loads(message)
                if message.get('method') in ('Runtime.consoleAPICalled', 'Runtime.exceptionThrown', 'Log.entryAdded'):
                    said.append(json.dumps(message['params']))
                if wanted(message):
                    return message

        def ask(method, **parameters):
            questions.write(json.dumps({'id': 1, 'method': method, 'params': parameters, **session}).encode() + b'\0')
            return until(lambda message: message.get('id') == 1)['result']
        target = next(t for t in ask('Target.getTargets')['targetInfos'] if t['type'] == 'page')
        session['sessionId'] = ask('Target.attachToTarget', targetId=target['targetId'], flatten=True)['sessionId']
        for domain in 'Page', 'Runtime', 'Log':
            ask(f'{domain}.enable')
        ask('Emulation.setDeviceMetricsOverride', width=width, height=900, deviceScaleFactor=1, mobile=False)
        ask('Page.navigate', url=f'file://{folder}/page.html')
        until(lambda message: message.get('method') == 'Page.loadEventFired')
        found = ask('Runtime.evaluate', expression=CHECK, awaitPromise=True, returnByValue=True)['result']['value']
        ask('Browser.close')
    process.wait()
    patience.cancel()
    return found, said


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason='needs a `chromium` on the path, as the Debian package of that name puts it')
class TestInABrowser:
    @pytest.mark.parametrize('width', [1280, 400])
    def test_everything_loads_and_fits(self, small, whole, tmp_path, width):
        found, said = in_browser(whole, width, tmp_path)
        assert said == [] and found['broken'] == [] and found['width'] == width and found['wide'] <= width
        assert found['images'] == whole.count('<img ') > 60 and found['sounds'] == whole.count('<audio ') == 48

    @pytest.mark.parametrize('broken, expected', [
        ('<img src="data:image/png;base64,AAAA" alt="x">', 'image x'),
        ('<audio src="data:audio/wav;base64,AAAA" aria-label="y"></audio>', 'sound y')])
    def test_this_check_notices_what_does_not_load(self, tmp_path, broken, expected):
        found, _ = in_browser(PLAIN.format(broken), 400, tmp_path)
        assert found['broken'] == [expected]

    def test_this_check_notices_what_is_too_wide_or_comes_from_elsewhere(self, tmp_path):
        page = PLAIN.format('<p style="width: 900px"><img src="elsewhere.png" alt="z">')
        found, said = in_browser(page, 400, tmp_path)
        assert found['wide'] > 400 and found['broken'] == ['image z'] and 'Content Security Policy' in ''.join(said)


PLAIN = f'<!doctype html><meta http-equiv="Content-Security-Policy" content="{report.POLICY}"><body>{{}}</body>'


def test_a_model_that_has_left_is_no_stage(tmp_path):
    left = tmp_path / 'b4_small_qwen3'
    left.mkdir()
    (left / 'token_space.json').write_text('{}')
    assert [run.stage for run in report.runs_of(tmp_path)] == ['b4']
    (left / 'config.json').write_text('{}')
    assert report.runs_of(tmp_path) == []
