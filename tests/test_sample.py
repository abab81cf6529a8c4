"""sample.py: what a checkpoint says about a picture, from the command line."""
import json
import os
import pty
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import REPO, run_script
from test_train_a1 import config as a1_config  # noqa: F401
from test_train_a2 import aligned, config, straight  # noqa: F401  a tiny A1 and a tiny A2 run


def test_an_aligned_run_captions_as_its_own_predictions_say(aligned):  # noqa: F811
    wanted = [json.loads(line) for line in (aligned / 'predictions.jsonl').read_text().splitlines()][:2]
    done = run_script('sample.py', aligned, '--image', *(w['image'] for w in wanted), '--json', '--max_new_tokens=4')
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [s['text'] for s in said] == [w['prediction'] for w in wanted] and said[0]['image'] == wanted[0]['image']


def test_a_tuned_run_answers_a_prompt_as_its_own_predictions_say(straight):  # noqa: F811
    wanted = json.loads((straight[0] / 'predictions.jsonl').read_text().splitlines()[0])
    done = run_script('sample.py', straight[0], '--image', wanted['image'], '--prompt', wanted['question'],
                      '--max_new_tokens=4')
    assert done.stdout.strip() == f"{wanted['image']}: {wanted['prediction']}".strip(), done.stderr


def test_on_a_terminal_it_chats_until_an_empty_line(straight, tiny):  # noqa: F811
    ours, theirs = pty.openpty()
    command = [sys.executable, 'sample.py', straight[0], '--image', tiny / 'instruct/images/000000.png',
               '--max_new_tokens=4']
    process = subprocess.Popen(command, cwd=REPO, stdin=theirs, stdout=subprocess.PIPE, text=True)
    os.write(ours, b'How many shapes can you see?\nWhich colour does the circle have?\n\n')
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and said.count('> ') == 3 and 'ask about it' in said


def test_sampling_is_repeated_by_its_seed(aligned, tiny):  # noqa: F811
    args = (aligned, '--image', tiny / 'captions/images/000001.png', '--temperature=1.5', '--max_new_tokens=8')
    one, two, other = (run_script('sample.py', *args, f'--seed={seed}').stdout for seed in (1, 1, 2))
    assert one == two != other


@pytest.mark.parametrize('args, found', [
    (('--image', 'none.png'), 'none.png: no such image'),
    (('--image', 'README.md'), 'not a whole image'),
    (('--image', 'none.png', '--prompt', 'what?'), 'takes no --prompt'),
    (('--image', 'none.png', '--llm', 'nowhere'), 'nowhere: no Hugging Face model here'),
    (('--image', 'none.png', '--top_p', '2'), 'wanted --max_new_tokens')])
def test_bad_input_gets_one_line(aligned, args, found):  # noqa: F811
    done = run_script('sample.py', aligned, *args)
    assert done.returncode != 0 and found in done.stderr and 'Traceback' not in done.stderr


def test_a_folder_without_a_checkpoint_is_said(tmp_path):
    done = run_script('sample.py', tmp_path, '--image', 'none.png')
    assert done.returncode == 1 and 'no checkpoint here' in done.stderr and 'Traceback' not in done.stderr


# -----------------------------------------------------------------------------
# a run that leaves


@pytest.fixture(scope='module')
def left(aligned, straight, tmp_path_factory):  # noqa: F811
    """{stage: the folder that --export wrote}."""
    root = tmp_path_factory.mktemp('left')
    for stage, run in ('a1', aligned), ('a2', straight[0]):
        done = run_script('sample.py', run, '--export', root / stage)
        assert done.returncode == 0, done.stderr
    return {stage: root / stage for stage in ('a1', 'a2')}


def fresh(code, **how):
    """Run Python code in a process of its own, in the repository."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.run([sys.executable, '-c', code], cwd=REPO, env=env, capture_output=True, text=True, **how)


@pytest.mark.parametrize('stage', ['a1', 'a2'])
def test_what_its_card_shows_says_what_sample_py_says(stage, left, aligned, straight, tiny):  # noqa: F811
    """The card's own lines, in a fresh process; the run itself is not there any more."""
    picture, run = tiny / 'instruct/images/000003.png', {'a1': aligned, 'a2': straight[0]}[stage]
    said = run_script('sample.py', run, '--image', picture, '--json').stdout
    card = (left[stage] / 'README.md').read_text()
    code = re.search(r'```python\n(.*?)```', card, re.DOTALL)[1]
    done = fresh(code.replace('FOLDER', str(left[stage])).replace('picture.png', str(picture)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == json.loads(said)['text'] and len(done.stdout.strip()) > 3


def test_the_folder_holds_what_its_config_says_and_stock_peft_loads_the_adapter(left, straight, tiny):  # noqa: F811
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from common import sha256_file
    from data import Item, Template
    names = {'a1': {'config.json', 'connector.safetensors', 'README.md'}}
    names['a2'] = names['a1'] | {'adapter_config.json', 'adapter_model.safetensors'}
    item = Item('x', 'x.png', (('What?', 'red'),))
    tokenizer = AutoTokenizer.from_pretrained(tiny / 'llm')
    for stage, folder in left.items():
        said = json.loads((folder / 'config.json').read_text())
        assert {path.name for path in folder.iterdir()} == names[stage]
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
        assert {name: sha256_file(folder / name) for name in said['files']} == said['files']
        assert set(said['files']) == names[stage] - {'config.json', 'README.md'}
        template = Template(tokenizer, 4, said['max_seq_len'])
        image = f'<|vision_start|>{4 * "<|image_pad|>"}<|vision_end|>'
        text = said['template'].format(image=image, caption='red', question='What?', answer='red')
        row = template.caption(item) if stage == 'a1' else template.chat(item)
        assert tokenizer(text)['input_ids'] == row.ids.tolist()        # the template in words is the one that trained
    base, ids = AutoModelForCausalLM.from_pretrained(tiny / 'llm'), torch.arange(5, 25)[None]
    with torch.no_grad():
        plain = base(ids).logits
        found = PeftModel.from_pretrained(base, left['a2']).eval()(ids).logits
        wanted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny / 'llm'),
                                           straight[0] / 'adapter').eval()(ids).logits
    assert torch.equal(found, wanted) and not torch.allclose(found, plain)


def test_a_card_says_what_failed_and_what_was_never_judged(left, straight, aligned, tmp_path):  # noqa: F811
    failed = [g for g in json.loads((straight[0] / 'gates.json').read_text())['gates'] if not g['passed']]
    card = (left['a2'] / 'README.md').read_text()
    assert failed and f'# a2: FAILED {len(failed)} of 10 gates' in card and 'not what its stage wants' in card
    for gate in failed:
        assert f'| **FAIL** | {gate["name"]} | {gate["value"]:.4g} | {gate["bar"]} |' in card
    assert '# a1: 9 gates passed' in (left['a1'] / 'README.md').read_text() and 'before you share it' in card
    shutil.copytree(aligned, tmp_path / 'run', ignore=shutil.ignore_patterns('gates.json'))
    done = run_script('sample.py', tmp_path / 'run', '--export', tmp_path / 'out')
    assert 'out: NOT JUDGED; see README.md' in done.stdout
    assert '# out: NOT JUDGED' in (tmp_path / 'out' / 'README.md').read_text()


def test_a_folder_that_is_not_empty_is_refused_and_an_empty_one_is_taken(aligned, tmp_path):  # noqa: F811
    (tmp_path / 'there').mkdir()
    (tmp_path / 'there' / 'mine.txt').write_text('mine')
    for folder in tmp_path / 'there', tmp_path / 'there' / 'mine.txt', tmp_path / 'there' / 'mine.txt' / 'below':
        done = run_script('sample.py', aligned, '--export', folder)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
        assert ('there already and not empty' if folder.exists() else 'cannot write here') in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ['there']
    (tmp_path / 'empty').mkdir()
    assert run_script('sample.py', aligned, '--export', tmp_path / 'empty').returncode == 0
    assert (tmp_path / 'empty' / 'config.json').exists()


def test_a_full_disk_leaves_nothing_and_is_said_in_one_line(straight, tmp_path):  # noqa: F811
    """RLIMIT_FSIZE stands in for it: 50 kB are less than the connector."""
    code = ('import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); '
            'resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); '
            f'sys.argv = ["sample.py", "{straight[0]}", "--export", "{tmp_path}/out"]; '
            'runpy.run_path("sample.py", run_name="__main__")')
    done = fresh(code)
    assert done.returncode == 1 and 'is the disk full?' in done.stderr and 'Traceback' not in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_damaged_export_or_another_base_model_is_refused_in_one_line(left, tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    from model import load_exported
    shutil.copytree(left['a2'], tmp_path / 'a2')
    body = bytearray((tmp_path / 'a2' / 'adapter_model.safetensors').read_bytes())
    body[-8] ^= 1
    (tmp_path / 'a2' / 'adapter_model.safetensors').write_bytes(body)
    with pytest.raises(SystemExit, match='adapter_model.safetensors is not the file that config.json describes'):
        load_exported(tmp_path / 'a2')
    with pytest.raises(SystemExit, match='no exported run of Track A here'):
        load_exported(tmp_path)
    shutil.copytree(tiny / 'llm', tmp_path / 'llm')
    other = AutoModelForCausalLM.from_pretrained(tiny / 'llm')
    other.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    other.save_pretrained(tmp_path / 'llm')
    with pytest.raises(SystemExit, match='was trained on other frozen weights'):
        load_exported(left['a2'], llm=str(tmp_path / 'llm'))
    done = run_script('sample.py', tmp_path / 'a2', '--export', tmp_path / 'out')
    assert 'no checkpoint here' in done.stderr and not (tmp_path / 'out').exists()


def test_export_refuses_another_base_and_goes_alone(aligned, tiny, tmp_path):  # noqa: F811
    shutil.copytree(tiny / 'vision', tmp_path / 'vision')
    from transformers import SiglipModel
    torch.manual_seed(5)
    SiglipModel(SiglipModel.from_pretrained(tiny / 'vision').config).save_pretrained(tmp_path / 'vision')
    done = run_script('sample.py', aligned, '--export', tmp_path / 'out', '--vision', tmp_path / 'vision')
    assert done.returncode == 1 and 'was trained on other frozen weights' in done.stderr and not (
        tmp_path / 'out').exists()
    done = run_script('sample.py', aligned, '--export', tmp_path / 'out', '--image', 'x.png')
    assert done.returncode == 2 and 'or --export alone' in done.stderr
