import io
import json
import random
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from codec import load_audio_codec, load_image_codec
from conftest import read_json
from emoji import codecs, pictures, score, speech, tower
from lists import read_llava
from media import BadSamples, read_image
from model import load_tower
from shards import read_manifest

KINDS = {'animal-mammal': ('cat', 'dog', 'fox', 'cow', 'pig', 'bat'), 'food-fruit': ('pear', 'fig', 'apple', 'lime')}


def drawn(n, size):
    """A PNG of a square in a colour of its own on nothing."""
    picture = Image.new('RGBA', (size, size))
    picture.paste((20 * n + 20, 255 - 20 * n, 128, 255), (size // 4, size // 4, size // 2, size // 2))
    encoded = io.BytesIO()
    picture.save(encoded, 'PNG')
    return encoded.getvalue()


def pack(folder, package, files):
    with tarfile.open(folder / f'{package}.tgz', 'w:gz') as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(f'package/{name}')
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Three small packages of ten things in a folder of their own, one of them with the names."""
    monkeypatch.setattr(pictures, 'ROOT', tmp_path)
    monkeypatch.setattr(tower, 'ROOT', tmp_path)
    monkeypatch.setattr(score, 'ROOT', tmp_path)
    monkeypatch.setattr(speech, 'ROOT', tmp_path)
    monkeypatch.setattr(codecs, 'ROOT', tmp_path)
    monkeypatch.setattr(pictures, 'N_KNOWN', 3)
    monkeypatch.setattr(pictures, 'N_NEW', 2)
    monkeypatch.setattr(pictures, 'SETS', {
        'one': ('first', 'one-1.0', 'img/*.png'), 'two': ('second', 'two-1.0', 'big/*.png'),
        'three': ('third', 'openmoji-17.0.0', 'color/*.png'), 'three_flat': ('third', 'openmoji-17.0.0', 'flat/*.png')})
    records = []
    codes = []
    for kind, names in KINDS.items():
        for name in names:
            codes.append(f'1F{400 + len(codes)}')
            records.append({'hexcode': codes[-1], 'annotation': name, 'tags': f'{name}, tail, <3',
                            'group': 'food-drink', 'subgroups': kind, 'skintone': ''})
    records.append({**records[0], 'hexcode': '1F500', 'group': 'flags'})
    (tmp_path / 'packages').mkdir()

    def files(pattern, size=64):
        return {pattern.format(code): drawn(n, size) for n, code in enumerate(codes)}

    pack(tmp_path / 'packages', 'openmoji-17.0.0', {
        'data/openmoji.json': json.dumps(records).encode(), **files('color/{}.png'), **files('flat/{}.png'),
        'color/1F500.png': drawn(1, 64)})
    codes = [code.lower() for code in codes]
    pack(tmp_path / 'packages', 'one-1.0', files('img/{}-fe0f.png'))
    pack(tmp_path / 'packages', 'two-1.0', files('big/{}.png', size=128))
    return tmp_path


def write_all():
    [(_, records)] = pictures.read_package('openmoji-17.0.0', 'data/openmoji.json')
    things = pictures.read_things(json.loads(records))
    pictures.write_lists(things, pictures.write_pictures(things))


def test_what_is_held_out_is_in_no_list_to_learn_from(packages):
    write_all()
    lists = {name: read_json(packages / f'{name}.json') for name in ('captions', 'chats', 'eval_known', 'eval_new')}
    paths = {name: {record['image'] for record in records} for name, records in lists.items()}
    assert paths['captions'] == paths['chats'] and sum(map(len, paths.values())) - len(paths['chats']) == 40
    assert not paths['captions'] & (paths['eval_known'] | paths['eval_new'])
    names = {name: {record['thing']['name'] for record in records} for name, records in lists.items()}
    assert len(names['eval_new']) == 2 and not names['eval_new'] & names['captions']
    assert len(names['eval_known']) == 3 and names['eval_known'] <= names['captions']
    said = json.dumps(lists['chats'])
    assert not any(f' {name}' in said for name in names['eval_new'])
    for path in paths['eval_known']:                   # nor does another picture of the same artist show it
        artist = {name: artist for name, (artist, _, _) in pictures.SETS.items()}
        code = path.split('/')[-1]
        assert not any(other.endswith(code) and artist[other.split('/')[1]] == artist[path.split('/')[1]]
                       for other in paths['captions'])


def test_the_lists_are_what_the_trainers_read(packages):
    write_all()
    bad = BadSamples(packages / 'bad.jsonl', 0)
    captions = read_llava(packages / 'captions.json', packages, bad, captions=True)
    chats = read_llava(packages / 'chats.json', packages, bad)
    assert len(captions) == len(chats) and all(2 <= len(chat.turns) <= 3 for chat in chats)
    assert {caption.turns[0][1] for caption in captions} >= {'a pear (food, fruit)'}
    pixels = read_image(captions[0].images[0], 64)
    assert (pixels[:, 0, 0] == 255).all() and (pixels[:, 24, 24] != 255).any()      # white where nothing is drawn


def test_a_package_that_is_missing_is_named_with_the_command_that_gets_it(packages):
    (packages / 'packages' / 'one-1.0.tgz').unlink()
    with pytest.raises(SystemExit, match='get it with: npm pack one@1.0 --pack-destination='):
        write_all()
    with pytest.raises(SystemExit, match='npm pack @lobehub/fluent-emoji-3d@1.1.0'):
        list(pictures.read_package('lobehub-fluent-emoji-3d-1.1.0', '*.webp'))


@pytest.mark.parametrize('break_it', [
    lambda whole: whole[:len(whole) // 2], lambda whole: b'', lambda whole: b'<html>not found</html>'])
def test_a_package_that_is_damaged_is_named(packages, break_it):
    path = packages / 'packages' / 'two-1.0.tgz'
    path.write_bytes(break_it(path.read_bytes()))
    with pytest.raises(SystemExit, match='two-1.0.tgz is damaged.*npm pack two@1.0'):
        write_all()


def test_a_package_without_pictures_and_lists_that_were_not_made_are_named(packages):
    pack(packages / 'packages', 'one-1.0', {'README.md': b'moved'})
    with pytest.raises(SystemExit, match=r'one-1.0.tgz has no img/\*.png; remove it and get it with'):
        write_all()
    with pytest.raises(SystemExit, match='captions.json is missing; python -m emoji.pictures writes it'):
        tower.make_tower()


@pytest.mark.parametrize('name, noun, said', [
    ('hedgehog', 'hedgehog', 'a hedgehog'), ('red apple', 'apple', 'a red apple'),
    ('bottle with popping cork', 'bottle', 'a bottle with popping cork'), ('owl', 'owl', 'an owl'),
    ('person in suit levitating', 'person', 'a person in suit levitating'), ('scissors', 'scissors', 'scissors'),
    ('face with tears of joy', 'face', 'a face with tears of joy'), ('flower playing cards', 'cards',
                                                                    'flower playing cards'),
    ('globe showing americas', 'globe', 'a globe showing americas'), ('bus', 'bus', 'a bus')])
def test_names(name, noun, said):
    assert pictures.head_noun(name) == noun
    assert pictures.with_article(name) == said


@pytest.mark.parametrize('stem', ['1F431', '1f431', '1f431-fe0f', '01f431'])
def test_a_code_is_the_same_in_every_set(stem):
    assert pictures.code_of(stem) == '1f431'


def test_texts_are_different_ones(packages):
    pictures.write_texts(n_eval=50)
    parts = [set((packages / f'{name}.jsonl').read_text().splitlines()) for name in ('text', 'replay')]
    assert len(parts[0]) == 50 and len(parts[1]) > 100 and not parts[0] & parts[1]


def test_svg_is_drawn(packages):
    pytest.importorskip('resvg_py')
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 2"><rect width="1" height="2" fill="#f00"/></svg>'
    picture = np.asarray(pictures.as_picture(svg, 'svg'))
    assert picture[32, 8].tolist() == [255, 0, 0, 255] and picture[32, 60, 3] == 0


def test_a_tower_is_trained_and_loads(packages):
    write_all()
    tower.make_tower(rounds=[(2, 1e-3, 1.0), (1, 1e-3, 0.5)], batch=4, n_others=3)
    report = read_json(packages / 'vision' / 'report.json')
    assert report['names'] == 8 and report['pictures'] == len(read_json(packages / 'captions.json'))
    features = load_tower(str(packages / 'vision'))(tower.torch.zeros(1, 3, 64, 64, dtype=tower.torch.uint8))
    assert features.shape == (1, 64, 192)


def test_a_run_is_scored(packages, a1_run, a2_run):
    write_all()
    for run, has_kind in (a1_run, True), (a2_run, False):
        scores = score.score_run(run.out)
        for of_set in scores.values():
            assert 0 <= of_set['noun'] <= 1 and ('kind' in of_set) == has_kind
        assert len((run.out / 'emoji' / 'new.jsonl').read_text().splitlines()) == scores['new']['pictures'] == 8


def test_scores_count_words_and_not_letters():
    things = {'a': {'name': 'red apple', 'kind': 'food, fruit'}, 'b': {'name': 'cat', 'kind': 'animal, mammal'},
              'c': {'name': 'pineapple', 'kind': 'food, fruit'}}
    texts = {'a': 'a green apple (food, fruit)', 'b': 'A CAT.', 'c': 'an apple (food)'}
    assert score.score(things, texts, 'a1') == {
        'named': 0.333, 'noun': 0.667, 'kind': 0.667, 'commonest noun': 'apple, 0.333', 'pictures': 3}


def test_chats_answer_about_their_own_thing(packages):
    write_all()
    things = {record['thing']['name'] for record in read_json(packages / 'captions.json')}
    assert len(things) == 8
    named = {code: pictures.Thing(name, 'animal', ('tail',)) for code, name in enumerate(sorted(things))}
    for code in named:
        for ask, answer in pictures.chat(code, named, random.Random(code)):
            if 'Is this' in ask or 'What is' in ask:
                assert answer.rstrip('.').endswith(pictures.with_article(named[code].name)[1:])


# -----------------------------------------------------------------------------
# Track B's sounds and codecs


class Humming:
    """In the place of espeak-ng: each letter is a tenth of a second of its own tone."""
    def say(self, text, voice, speed):
        tones = [np.sin(np.arange(20 * speed // 5) * (100 + 7 * ord(letter)) / 8000) for letter in text]
        return (0.5 * np.concatenate(tones)).astype(np.float32)


def test_names_are_said_in_all_voices_and_long_ones_left_out(packages):
    write_all()
    names = ['cat', 'dog', 'a name that is much too long to be said']
    assert speech.write_speech(Humming(), names, 'manifest.jsonl') == 2 * len(speech.VOICES) * len(speech.SPEEDS)
    bad = BadSamples(packages / 'bad.jsonl', 0)
    sounds = list(read_manifest(packages / 'speech' / 'manifest.jsonl', bad))
    assert {sound.text for sound in sounds} == {'a cat', 'a dog'} and len({sound.id for sound in sounds}) == 16
    assert all(Path(sound.path).is_file() for sound in sounds)
    new, known = speech.names_of('eval_new'), speech.names_of('captions')
    assert len(new) == 2 and not set(new) & set(known)


@pytest.mark.parametrize('make, name', [
    (lambda folder: codecs.make_image_codec(folder, n_codes=16, n_plain=2), 'Patches'),
    (lambda folder: codecs.make_janus(folder, n_steps=5, batch=2, n_codes=16), 'JanusVQVAE')])
def test_a_picture_codec_is_made_and_loads(packages, make, name):
    write_all()
    make(packages / 'codec')
    codec = load_image_codec(packages / 'codec')
    assert (codec.describe()['class'], codec.side, codec.size, codec.codes) == (name, 8, 64, 16)
    report = read_json(packages / 'codec' / 'report.json')
    assert report['eval_new']['pictures'] == 8 and report['eval_known']['psnr'] > (20 if name == 'Patches' else 0)


def test_a_sound_codec_is_made_and_loads(packages):
    speech.write_speech(Humming(), ['cat', 'dog', 'fox', 'cow'], 'manifest.jsonl')
    speech.write_speech(Humming(), ['bat', 'pig'], 'new.jsonl')
    codecs.make_audio_codec(packages / 'audio_codec', n_codes=64)
    audio_codec = load_audio_codec(packages / 'audio_codec', clip_seconds=speech.SECONDS)
    assert (audio_codec.rate, audio_codec.frames, audio_codec.codebooks) == (8000, 26, 2)
    report = read_json(packages / 'audio_codec' / 'report.json')
    assert report['sounds'] == 2 and report['recognised'] == 1


def test_espeak_says_a_name_at_one_pitch():
    pytest.importorskip('espeakng_loader')
    speaker = speech.Speaker()
    said = {voice: speaker.say('hedgehog', voice, 200) for voice in speech.VOICES}
    for wave in said.values():
        assert wave.dtype == np.float32 and 0.3 * speech.RATE < len(wave) < speech.SECONDS * speech.RATE
        assert 0.1 < np.abs(wave).max() <= 1
    assert not np.array_equal(said['en-us'][:3000], said['en-gb-scotland'][:3000])
    vowel = speaker.say('oooooh', 'en-us', 200)[1000:3000]
    echo = np.correlate(vowel, vowel, 'full')[len(vowel) - 1:]
    assert abs(40 + echo[40:130].argmax() - 80) <= 2   # a period of 10 ms
    with pytest.raises(SystemExit, match="has no voice 'nobody'"):
        speaker.say('cat', 'nobody', 200)


def test_without_espeak_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'espeakng_loader', None)
    with pytest.raises(SystemExit, match=r"pip install '\.\[emoji\]'"):
        speech.Speaker()
