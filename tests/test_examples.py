"""examples.py and columns.py: prepared examples are those of the template, and are prepared once."""
import io
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import on_two_ranks, read_lines
from test_data import GPT, HUMAN, SYSTEM, ids, make_examples, record, split

import data
import examples as prepared
from columns import sealed_columns
from templates import ChatTemplate
from data import ShuffledSampler, choose_split, load_split
from examples import Chosen, Examples, media_sha256, prepare, require_media_file
from lists import Root, json_values, read_llava, text_lines
from media import BadSample, BadSamples

TYPED = '<|image_pad|> <|im_end|>\n<|im_start|>'
TEXT_ONLY = {'id': 'text', 'conversations': [{'from': 'human', 'value': 'Why?'}, GPT]}
CHATS = [
    record('one'), record('two', ask=f'{TYPED} What?\n<image>', answer=TYPED), record('inside', ask='Is <image> big?'),
    record('one', conversations=[SYSTEM, HUMAN, GPT, {'from': 'human', 'value': ''}, GPT]), TEXT_ONLY,
    record('cut', answer='a very long story ' * 40), record('before', ask='so much ' * 90 + '<image>'),
    record('no label', ask='<image>' + 'long ' * 300), record('ümläut\u2028 😀', image='ümläut.png')]
SEVERAL = [
    record('two', image=['a.png', 'ümläut.png'], ask='<image> or\n<image>'), TEXT_ONLY, record('one'),
    record('later', image=['b.png', 'a.png'], conversations=[HUMAN, GPT, HUMAN, GPT]),
    record('cut', image=['a.png', 'b.png'], ask='<image> so much ' + 'more ' * 90 + '<image>')]
CAPTIONS = [record('one'), record('long', answer='and so on ' * 60), record('typed', answer=TYPED)]
TEXTS = [{'text': 'a b'}, {'text': f'{TYPED} and more'}, {'text': 'long ' * 200}]


@pytest.fixture(scope='module')
def template(tiny):
    from transformers import AutoTokenizer
    return ChatTemplate(AutoTokenizer.from_pretrained(tiny / 'llm'), 4, 96)


@pytest.fixture
def listed(tmp_path):
    """A way to write a list, with its pictures, and to prepare it."""
    class Listed:
        folder = tmp_path
        path = tmp_path / 'data.json'
        root = tmp_path / 'images'

        def write(self, records):
            self.root.mkdir(exist_ok=True)
            for name in 'a.png', 'b.png', 'ümläut.png':
                (self.root / name).write_text(name)
            lines = '\n'.join(map(json.dumps, records))
            self.path.write_text(lines if 'text' in records[0] else json.dumps(records))

        def prepare(self, template, kind='chat', limit=0, rank=0):
            bad_samples = BadSamples(tmp_path / 'bad.jsonl', limit)
            return prepare(kind, self.path, template, bad_samples, rank=rank, image_root=self.root, max_images=2)

        def files(self):
            return sorted(tmp_path.glob('data.json.prepared/*.safetensors'))
    return Listed()


def one_by_one(listed, template, kind):
    """What the template makes of each sample alone."""
    if kind == 'text':
        return [template.text(text, where) for where, text in text_lines(listed.path)]
    bad_samples = BadSamples('', 0, active=False)
    items = read_llava(listed.path, listed.root, bad_samples, captions=kind == 'caption', max_images=2)
    return [getattr(template, kind)(item) for item in items]


def assert_same_examples(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted):
        assert (one.item, one.truncated) == (other.item, other.truncated)
        for name in 'ids', 'label_positions', 'image_starts':
            array = getattr(one, name)
            assert array.dtype == np.int32 and array.flags.writeable
            assert array.tolist() == getattr(other, name).tolist(), (one.item.id, name)
        assert one.label_ranges is other.label_ranges is None


@pytest.mark.parametrize('kind, records', [
    ('chat', CHATS), ('chat', SEVERAL), ('caption', CAPTIONS), ('text', TEXTS)])
def test_prepared_examples_are_those_of_the_template(listed, template, kind, records, monkeypatch):
    """Also when the list comes in several parts, and from columns in memory."""
    listed.write(records)
    wanted = one_by_one(listed, template, kind)
    assert_same_examples(Examples.of(wanted), wanted)
    monkeypatch.setattr(prepared, 'PART', 2)
    found = listed.prepare(template, kind)
    assert_same_examples(found, wanted)
    assert list(found.ids()) == ids(wanted) and list(found.images()) == [path for e in wanted for path in e.item.images]
    assert_same_examples(found[-1:], wanted[-1:])
    assert data.sample_hashes(found) == data.sample_hashes(wanted)
    with pytest.raises(IndexError):
        found[len(wanted)]


def test_texts_encoded_together_have_the_ids_that_each_has_alone(tiny, template):
    """Those of a whole corpus."""
    texts = [text for _, text in text_lines(tiny / 'text' / 'eval.jsonl')][:300]
    together = template.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)['input_ids']
    assert together == [template.encode(text) for text in texts]


def test_a_later_start_reads_no_list_and_encodes_nothing(listed, template, monkeypatch):
    bad = record('bad', answer='')
    listed.write([*CHATS, bad])
    first = list(listed.prepare(template, limit=1))
    [reason] = read_lines(listed.folder / 'bad.jsonl')
    (listed.folder / 'bad.jsonl').unlink()
    for name in 'llava_items', 'text_lines':
        monkeypatch.setattr(prepared, name, lambda *args, **named: pytest.fail('read again'))
    assert_same_examples(listed.prepare(template, limit=1), first)
    assert read_lines(listed.folder / 'bad.jsonl') == [reason]     # what is wrong in the list is said every time
    (listed.folder / 'bad.jsonl').unlink()
    with pytest.raises(SystemExit, match='an empty answer; fix or remove it'):
        listed.prepare(template, limit=0)
    assert len(listed.files()) == 1


@pytest.mark.parametrize('change', ['list', 'tokens', 'length', 'tokenizer', 'kind'])
def test_what_decides_the_examples_names_their_file(listed, tiny, template, change):
    listed.write(CAPTIONS)
    listed.prepare(template, 'caption')
    kind = 'caption'
    if change == 'list':
        listed.write(CAPTIONS[::-1])
    elif change == 'tokens':
        template = ChatTemplate(template.tokenizer, 5, 96)
    elif change == 'length':
        template = ChatTemplate(template.tokenizer, 4, 97)
    elif change == 'tokenizer':
        from transformers import AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(tiny / 'llm')
        tokenizer.add_tokens(['and so on'])
        template = ChatTemplate(tokenizer, 4, 96)
    else:
        kind = 'chat'
    assert_same_examples(listed.prepare(template, kind), one_by_one(listed, template, kind))
    assert len(listed.files()) == 2


@pytest.mark.parametrize('what', ['a bit', 'cut', 'a bit of the seal', 'no seal', 'no columns'])
def test_prepared_examples_that_are_damaged_are_made_anew(listed, template, what):
    listed.write(CHATS)
    wanted = list(listed.prepare(template))
    [file] = listed.files()
    seal = file.with_suffix('.json')
    content = bytearray((seal if 'seal' in what else file).read_bytes())
    content[len(content) // 2] ^= 1
    if what == 'no seal':
        seal.unlink()
    elif what == 'no columns':
        file.unlink()
    elif what == 'a bit of the seal':
        seal.write_bytes(content)
    else:
        shutil.copy(file, f'{file}.copy')              # the mapping of the first start keeps the old file
        os.replace(f'{file}.copy', file)
        file.write_bytes(content if what == 'a bit' else content[:-9])
    assert sealed_columns(file) is None
    assert_same_examples(listed.prepare(template), wanted)
    assert sealed_columns(file) is not None


def test_beside_a_list_in_a_folder_that_cannot_be_written_the_users_cache_is_used(listed, template, monkeypatch):
    listed.write(CHATS)
    (listed.folder / 'data.json.prepared').write_text('in its place')
    monkeypatch.setattr(Path, 'home', lambda: listed.folder / 'home')
    assert_same_examples(listed.prepare(template), one_by_one(listed, template, 'chat'))
    assert len(list(listed.folder.glob('home/.cache/nanograft/chats-*.safetensors'))) == 1
    shutil.rmtree(listed.folder / 'home')
    (listed.folder / 'home').write_text('and there too')
    with pytest.raises(SystemExit, match='cannot write prepared examples to either') as e:
        listed.prepare(template)
    assert '\n' not in str(e.value)


def test_a_link_that_begins_to_lead_out_is_left_out_at_the_next_start_and_one_that_no_longer_does_is_taken(
        listed, template):
    listed.write([record('a'), record('b', image='b.png')])
    (listed.folder / 'elsewhere.png').write_text('b.png')
    assert ids(listed.prepare(template)) == ['a', 'b']
    picture = listed.root / 'b.png'
    picture.unlink()
    picture.symlink_to(listed.folder / 'elsewhere.png')
    with pytest.raises(SystemExit, match='link out of the image root'):
        listed.prepare(template)
    for _ in range(2):                                 # the second time from the prepared file
        assert ids(listed.prepare(template, limit=1)) == ['a']
    picture.unlink()
    picture.symlink_to(listed.root / 'a.png')          # a link that stays inside
    assert ids(listed.prepare(template)) == ['a', 'b']


def test_a_folder_that_leads_out_is_refused_and_the_root_is_looked_up_once(tmp_path, monkeypatch):
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'real' / 'inside').mkdir(parents=True)
    (tmp_path / 'root').symlink_to('real')
    (tmp_path / 'real' / 'out').symlink_to('../elsewhere')
    (tmp_path / 'real' / 'rooted').symlink_to('../real-too')
    (tmp_path / 'real-too').mkdir()
    (tmp_path / 'real' / 'loop').symlink_to('loop')
    looked_up = Counter()
    real = os.path.realpath
    monkeypatch.setattr(os.path, 'realpath', lambda path: looked_up.update([str(path)]) or real(path))
    root = Root(tmp_path / 'root')
    for n in range(5):
        for name in f'{n}.png', f'inside/{n}.png', 'loop', f'inside//./{n}.png':
            assert root.path(name, 'sample') == str(tmp_path / 'root' / name)
        for name in f'out/{n}.png', f'rooted/{n}.png', f'out/deeper/{n}.png':
            with pytest.raises(BadSample, match='link out of the image root'):
                root.path(name, 'sample')
    assert looked_up.pop(str(tmp_path / 'root' / 'loop')) == 5 and set(looked_up.values()) == {1, 2}
    assert looked_up[str(tmp_path / 'root')] == 2      # as the root, and as the folder of 0.png


def prepare_tiny(tiny, out):
    """A rank's part: prepares captions, and writes what it got."""
    from common import init_ranks, shutdown_ranks
    from decoders import load_tokenizer
    rank, _, _ = init_ranks('cpu')
    template = ChatTemplate(load_tokenizer(str(tiny / 'llm')), 4, 128)
    bad_samples = BadSamples(out / f'bad_{rank}.jsonl', 1)
    found = prepare('caption', out / 'data.json', template, bad_samples, rank=rank, image_root=out / 'images')
    tokens = [example.ids.tolist() for example in found]
    (out / f'rank_{rank}.json').write_text(json.dumps([tokens, sorted(bad_samples.keys)]))
    shutdown_ranks()
    return 0, ''


def test_two_ranks_have_the_same_examples_and_the_same_bad_samples(listed, tiny):
    listed.write([*CAPTIONS, record('bad', answer='')])
    assert on_two_ranks(prepare_tiny, tiny, listed.folder) == [0, 0]
    both = [json.loads((listed.folder / f'rank_{rank}.json').read_text()) for rank in range(2)]
    assert both[0] == both[1] and len(both[0][0]) == 3 and len(both[0][1]) == 1 and len(listed.files()) == 1


# -----------------------------------------------------------------------------
# lists, a block at a time

VALUES = ['[]', ' [ ] \n', '[1, 23 , -4.5e2,true]', '[{"a": "]"}, [1, [2]], "x\\"y", null]\r\n', '["\u2028é😀"]']
BROKEN = ['', ']', '[', '[1', '[1,', '[1,]', '[,1]', '[1 2]', '[1] 2', '[1]]', '{"a": 1}', '[{"a": 1, "a": 2}]',
          '[tru]', '[-', '[1.']


@pytest.mark.parametrize('block', [1, 2, 3, 7, 1000])
def test_a_list_is_read_in_blocks_of_any_size(block):
    for text in VALUES:
        assert list(json_values(io.StringIO(text), block)) == json.loads(text)
    for text in BROKEN:
        with pytest.raises(ValueError):
            list(json_values(io.StringIO(text), block))


# -----------------------------------------------------------------------------
# splits and steps of prepared examples


def test_a_split_and_the_steps_of_columns_are_those_of_a_list(tmp_path):
    listed = make_examples(tmp_path, 90, captions=(2, 1))
    wanted = split(listed, tmp_path)
    text = (tmp_path / 'split.json').read_text()
    (tmp_path / 'split.json').unlink()
    columns = Examples.of(listed)
    for _ in range(2):                                 # chosen, then read
        found = split(columns, tmp_path)
        assert (tmp_path / 'split.json').read_text() == text
        for part, wanted_part in zip(found, wanted, strict=True):
            assert_same_examples(part, wanted_part)
    texts = listed[:5]
    picks = [4, 0, 4, 1]
    longer = [*wanted[0], *[texts[k] for k in picks]]  # as A2 adds replayed texts
    more = found[0] + Chosen((Examples.of(texts), picks))
    assert_same_examples(more, longer)
    for n in range(0, 60, 7):
        assert ids(ShuffledSampler(more, 16, 3).step(n)) == ids(ShuffledSampler(longer, 16, 3).step(n))


def test_a_split_reads_the_pictures_that_are_held_out_and_those_of_their_sizes(tmp_path, monkeypatch):
    listed = make_examples(tmp_path, 400)
    for k, example in enumerate(listed):               # a size for every picture, but 8 and 8
        path = Path(example.item.images[0])
        path.write_bytes(path.read_bytes().ljust(100 + (k if k < 392 else 7)))
    read = []
    real = prepared.media_sha256
    monkeypatch.setattr(prepared, 'media_sha256', lambda path, kind='file': read.append(path) or real(path, kind))
    path = tmp_path / 'split.json'
    bad_samples = BadSamples(tmp_path / 'bad', 0)
    choose_split(listed, 30, 9, (10, 20), path=path, bad_samples=bad_samples, read=lambda path: path)
    _, eval_set, golden_set, _ = load_split(listed, path, 30)
    sizes = {os.path.getsize(example.item.images[0]) for example in eval_set + golden_set}
    paths = [example.item.images[0] for example in listed]
    wanted = [path for path in paths if os.path.getsize(path) in sizes]
    assert sorted(read) == sorted(wanted) and len(read) < 60


@pytest.mark.parametrize('read', [media_sha256, require_media_file])
def test_a_name_that_no_file_can_have_is_a_bad_sample(read):
    with pytest.raises(BadSample, match='cannot read this image'):
        read('a\0.png', 'image')
