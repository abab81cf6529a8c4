"""sample.py on runs of Track A, from the command line, and what it exports. Track B: test_train_b4.py."""
import builtins
import json
import os
import re
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import damage, failed_gates, read_gates, read_json, read_lines, run_here
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, SiglipModel

from common import sha256_file
from templates import ChatTemplate
from lists import Item
from gates import conclude, exactly
from tools.export import escaped, load_exported, write_card


def sample(*args):
    return run_here('sample.py', *args)


def test_an_aligned_run_captions_as_its_own_predictions_say(a1_run):
    wanted = read_lines(a1_run.out / 'predictions.jsonl')[:2]
    code, printed = sample(a1_run.out, '--image', *(p['image'] for p in wanted), '--json', '--max_new_tokens=4')
    found = [json.loads(line) for line in printed.splitlines()]
    assert code == 0 and [(f['image'], f['text']) for f in found] == [(w['image'], w['prediction']) for w in wanted]


def test_a_tuned_run_answers_a_prompt_as_its_own_predictions_say(a2_run):
    wanted = read_lines(a2_run.out / 'predictions.jsonl')[0]
    _, printed = sample(a2_run.out, '--image', wanted['image'], '--prompt', wanted['question'], '--max_new_tokens=4')
    assert printed.strip() == f'{wanted["image"]}: {wanted["prediction"]}'.strip()


def test_a_prompt_is_about_all_its_pictures_in_their_order_and_its_marks_place_them(a2_run, exported, tiny):
    pictures = [str(tiny / f'instruct/images/00000{n}.png') for n in range(3)]
    chat = load_exported(exported['a2'])
    assert chat.max_images == 4
    for files in pictures[:2], pictures[1::-1], pictures:
        for prompt in 'What differs?', 'Is ' + ' like '.join(len(files) * ['<image>']) + '?':
            args = (a2_run.out, '--image', *files, '--prompt', prompt, '--max_new_tokens=6', '--json')
            found = json.loads(sample(*args)[1])
            tokens = chat.encode_image(*files)
            assert tokens.shape[0] == len(files) == len(found['image'])
            assert (found['image'], found['text']) == (files, chat.reply(tokens, [(prompt, None)], max_new_tokens=6))
    first = '\n'.join([*2 * ['<image>'], 'What differs?'])    # as the lists have it
    tokens = chat.encode_image(*pictures[:2])
    assert chat.reply(tokens, [(first, None)]) == chat.reply(tokens, [('What differs?', None)])


@pytest.mark.parametrize('n, prompt, says', [
    (2, 'Is <image> red?', '1 <image> marks for 2 images'), (5, 'What?', '5 images in one text'),
    (1, '<image> and <image>', '2 <image> marks for 1 images')])
def test_other_numbers_of_pictures_than_the_prompt_or_the_run_has_are_one_line(a2_run, tiny, n, prompt, says):
    code, _ = sample(a2_run.out, '--image', *n * [tiny / 'instruct/images/000000.png'], '--prompt', prompt)
    assert says in code and '\n' not in code


def test_on_a_terminal_it_chats_until_an_empty_line(a2_run, tiny, monkeypatch):
    questions = ['How many shapes can you see?', 'Which colour does the circle have?', '', 'not reached']
    monkeypatch.setattr(sys.stdin, 'isatty', lambda: True, raising=False)
    monkeypatch.setattr(builtins, 'input', lambda prompt: questions.pop(0))
    picture = tiny / 'instruct/images/000000.png'
    code, printed = sample(a2_run.out, '--image', picture, '--max_new_tokens=4')
    assert code == 0 and questions == ['not reached'] and len(printed.splitlines()) == 3, printed
    questions[:] = ['Do they differ?', 'Is <image> like <image>?', '']   # two marks in a later question are too many
    code, printed = sample(a2_run.out, '--image', picture, picture, '--max_new_tokens=4')
    assert code == 0 and not questions and '4 <image> marks for 2 images' in printed, printed


def test_sampling_is_repeated_by_its_seed_and_zero_is_greedy(a1_run, tiny):
    args = (a1_run.out, '--image', tiny / 'captions/images/000001.png', '--max_new_tokens=8')
    one, two, other = (sample(*args, '--temperature=1.5', f'--seed={seed}')[1] for seed in (1, 1, 2))
    assert one == two != other
    assert sample(*args, '--temperature=0', '--seed=1') == sample(*args)


def test_there_are_n_answers_one_for_each_seed(a1_run, a2_run, tiny):
    picture = str(tiny / 'captions/images/000000.png')
    for run, *prompt in (a1_run,), (a2_run, '--prompt', 'What?'):
        args = (run.out, '--image', picture, *prompt, '--max_new_tokens=6', '--temperature=2', '--json')
        three = [json.loads(line) for line in sample(*args, '--seed=4', '--n=3')[1].splitlines()]
        assert [found['seed'] for found in three] == [4, 5, 6] and len({found['text'] for found in three}) > 1
        assert json.loads(sample(*args, '--seed=5')[1]) == three[1]


@pytest.mark.parametrize('args, found', [
    (('--image', 'none.png', '--guidance', '2'), 'no use for --guidance'),
    (('--image', 'none.png', '--audio_codec', 'x'), 'no use for --audio_codec'),
    (('--image', 'none.png'), 'none.png: no such image'),
    (('--image', 'none.png', '--prompt', ''), 'takes no --prompt'),
    (('--draw', 'a circle'), 'which sees pictures only'),
    (('--draw', 'caf\udce9'), 'is not UTF-8'),        # of a terminal in Latin-1
    (('--image', 'none.png', '--llm', '/no/where'), '/no/where: no Hugging Face model here'),
    (('--image', 'none.png', '--top_p', '2'), 'wanted a --top_p'),
    (('--image', 'none.png', '--guidance', 'nan'), 'wanted a --guidance that is a number'),
    (('--export', 'folder', '--image', 'x.png'), '--export goes alone'),
    ((), 'nothing to do')])
def test_bad_input_gets_one_line(a1_run, args, found, tmp_path, capsys):
    code, _ = sample(a1_run.out, *args, '--to', tmp_path)
    assert code != 0 and found in f'{code} {capsys.readouterr().err}'


def test_a_folder_without_a_checkpoint_is_one_line(tmp_path):
    assert 'no checkpoint here' in sample(tmp_path, '--image', 'none.png')[0]


# -----------------------------------------------------------------------------
# export


@pytest.fixture(scope='module')
def exported(a1_run, a2_run, tmp_path_factory):
    """{stage: the folder that --export wrote}."""
    root = tmp_path_factory.mktemp('exported')
    for stage, run in ('a1', a1_run), ('a2', a2_run):
        code, _ = sample(run.out, '--export', root / stage)
        assert code == 0
    return {stage: root / stage for stage in ('a1', 'a2')}


@pytest.mark.parametrize('stage', ['a1', 'a2'])
def test_what_its_card_shows_says_what_sample_py_says(stage, exported, a1_run, a2_run, tiny, capsys):
    """The card's own lines."""
    picture = tiny / 'instruct/images/000003.png'
    run = {'a1': a1_run, 'a2': a2_run}[stage]
    wanted = json.loads(sample(run.out, '--image', picture, '--json')[1])['text']
    card = (exported[stage] / 'README.md').read_text()
    code = re.search(r'```python\n(.*?)```', card, re.DOTALL)[1]
    exec(code.replace('FOLDER', str(exported[stage])).replace('picture.png', str(picture)), {})
    assert capsys.readouterr().out.strip() == wanted and len(wanted) > 3


def test_the_folder_holds_what_its_config_says_and_its_template_is_the_one_that_trained(exported, tiny):
    names = {'a1': {'config.json', 'connector.safetensors', 'README.md'}}
    names['a2'] = names['a1'] | {'adapter_config.json', 'adapter_model.safetensors'}
    item = Item('x', ('x.png',), (('What?', 'red'),))
    tokenizer = AutoTokenizer.from_pretrained(tiny / 'llm')
    image = f'<|vision_start|>{4 * "<|image_pad|>"}<|vision_end|>'
    for stage, folder in exported.items():
        described = read_json(folder / 'config.json')
        assert {path.name for path in folder.iterdir()} == names[stage]
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
        assert {name: sha256_file(folder / name) for name in described['files']} == described['files']
        assert set(described['files']) == names[stage] - {'config.json', 'README.md'}
        template = ChatTemplate(tokenizer, 4, described['max_seq_len'])
        example = template.caption(item) if stage == 'a1' else template.chat(item)
        text = described['template'].format(image=image, caption='red', question='What?', answer='red')
        assert tokenizer(text)['input_ids'] == example.ids.tolist()


def test_stock_peft_loads_the_adapter(exported, a2_run, tiny):
    ids = torch.arange(5, 25)[None]

    def logits(adapter=None):
        model = AutoModelForCausalLM.from_pretrained(tiny / 'llm')
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter).eval()
        with torch.no_grad():
            return model(ids).logits

    found = logits(exported['a2'])
    assert torch.equal(found, logits(a2_run.out / 'adapter')) and not torch.allclose(found, logits())


def test_a_card_says_what_failed_and_what_was_never_judged(exported, a2_run, a1_run, tmp_path):
    failed = failed_gates(a2_run.out)
    card = (exported['a2'] / 'README.md').read_text()
    assert failed and f'# a2: FAILED {len(failed)} of {len(read_gates(a2_run.out))} gates' in card
    assert 'not what its stage wants' in card
    for name in failed:
        gate = read_gates(a2_run.out)[name]
        assert f'| **FAIL** | {name} | {gate["value"]:.4g} | {escaped(gate["bar"])} |' in card
    card = (exported['a1'] / 'README.md').read_text()
    assert re.search(r'^# a1: \d+ gates passed$', card, re.MULTILINE) and 'before you share it' in card
    shutil.copytree(a1_run.out, tmp_path / 'run', ignore=shutil.ignore_patterns('gates.json'))
    _, printed = sample(tmp_path / 'run', '--export', tmp_path / 'out')
    assert 'out: NOT JUDGED; see README.md' in printed
    assert '# out: NOT JUDGED' in (tmp_path / 'out' / 'README.md').read_text()


@pytest.mark.parametrize('name, safe', [
    ('a | b\n| <script> \\| [x](http://y) `', r'a \| b \| \<script> \\\| [x]\(http://y) \`'),
    ('*b* _i_ a_b ~~s~~ &lt;b&gt; $x$ [x][y] [x]: z', r'\*b\* \_i\_ a_b \~\~s\~\~ \&lt;b\&gt; \$x\$ [x]\[y] [x]\: z'),
    ('# a\u2028- b\r\n\r\n```caf\udce9', r'# a - b \`\`\`caf?')])
def test_no_name_breaks_out_of_a_card(tmp_path, name, safe):
    """The second part of a case: its letters as Markdown shows them, on one line."""
    conclude(tmp_path, [exactly(name, 1, 0)])
    model = {'llm': 'org/na_me', 'tower_layer': -1}
    meta = {'stage': 'a1', 'step': 1, 'n_steps': 1, 'model': model, 'frozen_sha256': ''}
    write_card('card_graft.md', tmp_path, tmp_path, meta, library='nanograft', name=name, llm=name, vision=name,
               template='{image}', image_markers=None, num_image_tokens=4, connector='1', frozen_dtype='float32',
               max_images=1)
    card = (tmp_path / 'README.md').read_text()
    assert f'| **FAIL** | {safe} | 1 | = 0 |\n' in card and f'| language model | {safe} |\n' in card
    assert f'# {safe}: FAILED 1 of 1 gates\n' in card and 'base_model: org/na_me\n' in card


def test_a_folder_that_is_not_empty_is_refused_and_an_empty_one_is_taken(a1_run, tmp_path):
    file = tmp_path / 'there' / 'mine.txt'
    file.parent.mkdir()
    file.write_text('here first')
    wanted = {file.parent: 'there already and not empty', file: 'there already and not empty',
              file / 'below': 'cannot write here'}
    for folder, line in wanted.items():
        code, _ = sample(a1_run.out, '--export', folder)
        assert line in code and len(code.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [file.parent] and list(file.parent.iterdir()) == [file]
    (tmp_path / 'empty').mkdir()
    assert sample(a1_run.out, '--export', tmp_path / 'empty')[0] == 0 and (tmp_path / 'empty' / 'config.json').exists()


def test_a_full_disk_leaves_nothing_and_is_one_line(a2_run, tmp_path):
    """RLIMIT_FSIZE stands in for it: 50 kB are less than the connector."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        code, _ = sample(a2_run.out, '--export', tmp_path / 'out')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 'is the disk full?' in code and len(code.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_an_export_leaves_a_users_own_files_beside_it_alone(a1_run, tmp_path):
    for name in 'out.tmp', 'out.prev', '.out':
        (tmp_path / name).mkdir()
        (tmp_path / name / 'mine.txt').write_text('mine')
    assert sample(a1_run.out, '--export', tmp_path / 'out')[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {'out', 'out.tmp', 'out.prev', '.out'}
    assert len(list(tmp_path.glob('*/mine.txt'))) == 3


def test_a_name_that_is_no_text_is_printed_and_exported_all_the_same(a1_run, tiny, tmp_path):
    """Bytes that are not UTF-8, as a file from a Latin-1 disk has in its name."""
    picture = os.fsdecode(bytes(tmp_path) + b'/caf\xe9.png')
    shutil.copy(tiny / 'captions/images/000001.png', picture)
    code, printed = sample(a1_run.out, '--image', picture, '--max_new_tokens=2')
    assert code == 0 and 'caf\\udce9.png: ' in printed
    folder = os.fsdecode(bytes(tmp_path) + b'/caf\xe9')
    code, printed = sample(a1_run.out, '--export', folder)
    assert code == 0 and '# caf?: ' in Path(folder, 'README.md').read_text()


def test_a_damaged_export_is_refused_in_one_line(exported, tmp_path):
    shutil.copytree(exported['a2'], tmp_path / 'a2')
    damage(tmp_path / 'a2' / 'adapter_model.safetensors')
    with pytest.raises(SystemExit, match='adapter_model.safetensors is not the file that config.json describes'):
        load_exported(tmp_path / 'a2')
    with pytest.raises(SystemExit, match='no exported run of Track A here'):
        load_exported(tmp_path)
    described = read_json(exported['a1'] / 'config.json')
    shutil.copytree(exported['a1'], tmp_path / 'a1')
    (tmp_path / 'a1' / 'config.json').write_text(json.dumps({**described, 'files': {}}))   # which vouch for nothing
    with pytest.raises(SystemExit, match='connector.safetensors is not the file that config.json describes'):
        load_exported(tmp_path / 'a1')


def test_another_base_model_is_refused_when_it_is_exported_and_when_it_is_loaded(exported, a1_run, tiny,
                                                                                 tmp_path):
    shutil.copytree(tiny / 'llm', tmp_path / 'llm')
    other = AutoModelForCausalLM.from_pretrained(tiny / 'llm')
    other.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    other.save_pretrained(tmp_path / 'llm')
    with pytest.raises(SystemExit, match='was trained on other frozen weights'):
        load_exported(exported['a2'], llm=str(tmp_path / 'llm'))
    shutil.copytree(tiny / 'vision', tmp_path / 'vision')
    torch.manual_seed(5)
    SiglipModel(SiglipModel.from_pretrained(tiny / 'vision').config).save_pretrained(tmp_path / 'vision')
    code, _ = sample(a1_run.out, '--export', tmp_path / 'out', '--vision', tmp_path / 'vision')
    assert 'was trained on other frozen weights' in code and not (tmp_path / 'out').exists()
