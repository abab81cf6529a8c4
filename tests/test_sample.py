"""sample.py: what a checkpoint says about a picture, from the command line."""
import json
import os
import pty
import subprocess
import sys

import pytest
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
    assert done.returncode == 1 and 'no whole checkpoint' in done.stderr and 'Traceback' not in done.stderr
