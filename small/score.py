"""
Scores of a run over the small world, by the truth: what its captions, answers, pictures and sounds get right.

reads   data/small/{captions,instruct,pairs,sounds}/truth.json, and from the run's folder
        A1, A2: predictions.jsonl    B1: report.json, token_space.json    B4: predictions/ and golden/
writes  truth.json in the run's folder, {what: [right, asked]}
done    when everything is right as often as its bar asks for; exits 1 when it is not

$ python -m small.score out/a1_small
$ python -m small.score out/b4_small --bar=0.95
"""
import json
import re
import sys
from pathlib import Path

from PIL import Image

from small.make import ROOT
from small.world import (
    BACKGROUND, NUMBERS, RELATION, SOUND_OPTIONS, THING, agreement, as_scene, as_sound, hear, relation, see)

# -----------------------------------------------------------------------------
# one text: (right, asked), the attributes that it gets right, of those that it was asked for


def score_caption(text, scene):
    """(right, asked): of the attributes of the scene and of whatever the text adds to it.

    An object counts four (size, colour, shape, place) and is matched by its place; the background and a stated relation
    count one each. Missed objects and invented ones have all four wrong.
    """
    named = {thing[3]: thing for thing in THING.findall(text)}         # tuples as Thing has them
    true = {thing.place: thing for thing in scene.things}
    asked = 1 + 4 * len(true.keys() | named.keys())
    right = 0
    for place in true.keys() & named.keys():
        right += sum(a == b for a, b in zip(named[place], true[place]))
    background = BACKGROUND.search(text)
    if background and scene.background in background.groups():
        right += 1
    for groups in RELATION.findall(text):
        first = groups[:4]
        stated = groups[4]
        second = groups[5:]
        asked += 1                                     # right when both objects are there and it holds between them
        if first in scene.things and second in scene.things and stated == relation(first[3], second[3]):
            right += 1
    return right, asked


def score_sound_caption(text, sound):
    """(right, asked): of the five attributes of a sound. One that is named in two different ways is wrong."""
    words = set(re.findall('[a-z]+', text.lower()))
    right = 0
    for attribute, options in SOUND_OPTIONS.items():   # no word is an option of two attributes
        right += words & set(options) == {getattr(sound, attribute)}
    return right, len(SOUND_OPTIONS)


# -----------------------------------------------------------------------------
# one run: {what: (right, asked)}


def read_lines(path):
    try:
        return [json.loads(line) for line in Path(path).read_text().splitlines()]
    except OSError as e:
        raise SystemExit(f'{path}: cannot read the predictions ({e.strerror}); run the stage to its end first')
    except ValueError as e:
        raise SystemExit(f'{path}: a line is not JSON ({e}); run the stage again')


def read_truth(folder, what):
    """truth.json of a part of the small world: {id: what(fields)}, a Scene or a Sound each."""
    try:
        return {id: what(fields) for id, fields in json.loads((folder / 'truth.json').read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise SystemExit(f'{folder}: cannot read its truth.json ({e}); python -m small.make makes it')


def share(right, asked):
    return right / max(asked, 1)                       # nothing asked: nothing right


def add_up(tally, what, right, asked):
    before_right, before_asked = tally.get(what, (0, 0))
    tally[what] = (before_right + right, before_asked + asked)


def score_captions(predictions, root=ROOT):
    """An A1 run: the attributes that its captions get right, by the number of objects in the picture."""
    scenes = read_truth(root / 'captions', as_scene)
    tally = {}
    for line in predictions:
        scene = scenes[line['id']]
        plural = 's' if len(scene.things) > 1 else ''
        what = f'{NUMBERS[len(scene.things)]} object{plural}'
        add_up(tally, what, *score_caption(line['prediction'], scene))
    return with_all(tally)


def score_answers(predictions, root=ROOT):
    """An A2 run, by the kind of question and by how many pictures the chat is about: an answer is right to the letter,
    a description by its attributes."""
    folders = [root / part for part in ('instruct', 'pairs') if (root / part).exists()]
    scenes = {id: scene for folder in folders for id, scene in read_truth(folder, as_scene).items()}
    records = {}
    for folder in folders:
        records |= {record['id']: record for record in json.loads((folder / 'data.json').read_text())}
    tally = {}
    pictures = {}
    for line in predictions:
        record = records[line['id']]
        kind = record['kinds'][line['turn']]
        score = float(line['prediction'] == line['truth'])
        if kind == 'describe':
            score = share(*score_caption(line['prediction'], scenes[line['id']]))
        add_up(tally, kind, score, 1)
        add_up(pictures, 'two pictures' if isinstance(record['image'], list) else 'one picture', score, 1)
    return {**with_all(tally), **pictures}


def with_all(tally):
    right = sum(right for right, _ in tally.values())
    asked = sum(asked for _, asked in tally.values())
    return {**tally, 'all': (right, asked)}


def score_codecs(out, root=ROOT):
    """A B1 run: the attributes that its codecs keep, of the pictures and sounds that it measured."""
    from media import read_audio, read_image
    from uti import UTI, TokenSpace

    settings = json.loads((out / 'report.json').read_text())['settings']
    sources = {name: settings[name] for name in ('llm', 'image_codec', 'audio_codec', 'image_prefix', 'audio_prefix')}
    where = out / 'token_space.json'
    uti = UTI.of_space(TokenSpace.load(where), where, **sources)
    n = settings['n_items']                            # B1 takes the first ones of the list, every file once
    tally = {}
    if uti.image_codec:
        records = json.loads((root / 'captions' / 'data.json').read_text())[:n]
        files = {record['image']: record['id'] for record in records}
        scenes = read_truth(root / 'captions', as_scene)
        pictures = [read_image(root / 'captions' / 'images' / file, uti.image_codec.size) for file in files]
        decoded = uti.decode_image(*uti.encode_image(pictures))        # [(3, H, W)]
        for id, picture in zip(files.values(), decoded):
            add_up(tally, 'image', *agreement(see(picture.transpose(1, 2, 0)), scenes[id]))
    if uti.audio_codec:
        # two captions, so two records, a file; either id names its sound
        files = {record['audio']: record['id'] for record in read_lines(root / 'sounds' / 'manifest.jsonl')}
        sounds = read_truth(root / 'sounds', as_sound)
        codec = uti.audio_codec
        waves = [read_audio(root / 'sounds' / file, codec.rate, codec.samples) for file in list(files)[:n]]
        decoded = uti.decode_audio(*uti.encode_audio(waves))           # [(samples,)]
        for id, wave in zip(files.values(), decoded):
            add_up(tally, 'audio', *agreement(hear(wave), sounds[id]))
    return tally


def score_tasks(out, root=ROOT):
    """A B4 run: its predictions by task, and its texts of the golden set at its first and at its last checkpoint."""
    files = {path.stem: path for path in sorted((out / 'predictions').glob('*.jsonl'))}
    checkpoints = sorted((out / 'golden').glob('step_*'))
    for task in ('i2t', 'a2t'):
        if task in files:
            files[f'{task} first'] = checkpoints[0] / f'{task}.jsonl'
            files[f'{task} last'] = checkpoints[-1] / f'{task}.jsonl'
    scenes = read_truth(root / 'captions', as_scene)
    sounds = read_truth(root / 'sounds', as_sound)
    tally = {}
    for what, path in files.items():
        task = what[:3]                                # also of 't2i_guidance_1.5'
        truth = scenes if task in ('i2t', 't2i') else sounds
        for n, line in enumerate(read_lines(path)):
            add_up(tally, what, *score_prediction(task, line, path.with_suffix('') / f'{n:03d}', truth[line['id']]))
    return tally


def score_prediction(task, line, media, truth):
    """(right, asked) of one prediction. media: the path, without suffix, of the picture or sound that was generated."""
    if task == 'i2t':
        return score_caption(line['prediction'], truth)
    if task == 'a2t':
        return score_sound_caption(line['prediction'], truth)
    if task == 't2i':
        return agreement(see(Image.open(f'{media}.png', formats=['PNG'])), truth)
    import soundfile
    return agreement(hear(soundfile.read(f'{media}.wav')[0]), truth)


# -----------------------------------------------------------------------------
# the verdict


def require_bars(run, tally, bars):
    """Exit with one line unless all that has a bar, {what: share}, is right so often."""
    if not bars:
        raise SystemExit(f'{run}: no predictions to score; run the stage to its end first')
    for what, bar in bars.items():
        right, asked = tally[what]
        if not asked or share(right, asked) < bar:
            raise SystemExit(f'{run}: {what} {share(right, asked):.2%} right, wanted {bar:.0%}')


if __name__ == '__main__':
    from common import write_atomic
    from configure import configure

    run = ''                       # the folder of an A1, A2, B1 or B4 run; the argument that has no name
    bar = 0.90                     # share of captions, answers and descriptions that has to be right
    bar_written = 0.85             # the same for the pictures and sounds that a B4 run generates
    bar_surviving = 0.97           # the same for what comes back from B1's codecs
    points_lost = 0.02             # a B4 run may describe so much worse at its end than at its start
    # the run needs no --run= before it
    config = configure(globals(), [word if word[0] == '-' else f'--run={word}' for word in sys.argv[1:]])
    if not run:
        raise SystemExit('which run? python -m small.score out/a1_small')

    out = Path(run)
    bars = {}
    if (out / 'predictions').is_dir():
        tally = score_tasks(out)
        for task in {'i2t', 'a2t'} & tally.keys():
            bars[task] = bar
            # learning to generate may cost little of what B3 had taught
            bars[f'{task} last'] = share(*tally[f'{task} first']) - points_lost
        for task in {'t2i', 't2a'} & tally.keys():     # with the first guidance: the others are there to compare
            bars[task] = bar_written
    elif (out / 'report.json').exists():
        tally = score_codecs(out)
        bars = dict.fromkeys(tally, bar_surviving)
    else:
        predictions = read_lines(out / 'predictions.jsonl')
        is_chat = predictions and 'turn' in predictions[0]
        tally = score_answers(predictions) if is_chat else score_captions(predictions)
        bars = {what: bar for what in ('all', 'one picture', 'two pictures') if what in tally}
    for what, (right, asked) in sorted(tally.items()):
        print(f'{what:<13} {share(right, asked):7.2%}  {right:.4g} of {asked}')
    write_atomic(out / 'truth.json', json.dumps(tally))
    require_bars(run, tally, bars)
