"""
Stage 0: the small world. Data whose truth is known and base models trained on the spot, so that every stage runs on two
CPU cores without a network and its results can be checked.

reads   nothing
writes  data/small/{captions,instruct,pairs,sounds,text,llm,vision,image_codec,audio_codec}/, seed.json
        formats: LLaVA JSON + images/, JSONL + audio/, JSONL, Hugging Face folders
done    when every part that was asked for is in place; a finished part is left alone

$ python -m small.make                                # every part
$ python -m small.make --parts="('captions','llm')"   # only these
$ python -m small.make --seed=2                       # another world: other scenes, sounds, texts and weights

A config builds what it names by ensure(). What scenes and sounds are: world.py; the text: corpus.py; the models:
models.py, codecs.py. No scene is in two of `captions`, `instruct` and `pairs`; each part draws from a seed of its own.
"""
# torch, transformers and common.py are imported where something is made: configs import this file at every start
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image

from small import corpus
from small.corpus import in_random_order
from small.pairs import pair_chat, second_scene
from small.world import (
    RATE, as_scene, caption, chat, draw, part_seed, play, random_scene, random_sound, sound_caption)

REPO = Path(__file__).resolve().parent.parent
ROOT = REPO / 'data' / 'small'

# -----------------------------------------------------------------------------
# the data. seed: of the world, see world.part_seed


def make_captions(folder, n=14_000, seed=1, kind='captions', taken=()):
    """LLaVA-Pretrain JSON, images/, and truth.json, {id: scene}. No scene twice, and none of `taken`."""
    from common import progress
    rng = np.random.default_rng(part_seed(kind, seed))
    (folder / 'images').mkdir(parents=True)
    used = set(taken)
    records = []
    truth = {}
    for k in progress(range(n), kind):
        scene = new_scene(rng, used)
        record = {'id': f'{kind}-{k:06d}', 'image': f'{k:06d}.png'}
        Image.fromarray(draw(scene, rng)).save(folder / 'images' / record['image'])
        if kind == 'captions':
            turns = [('Describe the image briefly.\n<image>', caption(scene, rng))]
        else:
            kinds, questions, answers = zip(*chat(scene, rng))
            record['kinds'] = kinds                    # not LLaVA's: what the scores are listed by
            turns = zip(('<image>\n' + questions[0], *questions[1:]), answers)
        record['conversations'] = []
        for ask, answer in turns:
            record['conversations'] += [{'from': 'human', 'value': ask}, {'from': 'gpt', 'value': answer}]
        records.append(record)
        truth[record['id']] = scene
    (folder / 'data.json').write_text(json.dumps(records))
    (folder / 'truth.json').write_text(json.dumps(truth))


def new_scene(rng, used):
    """A random scene that is not in the set `used`; then it is."""
    scene = random_scene(rng)
    while scene in used:                               # only 768 scenes have one object: the later ones have more
        scene = random_scene(rng)
    used.add(scene)
    return scene


def make_instruct(folder, n=6000, seed=1):
    """LLaVA-Instruct JSON of chats, with the kinds of their questions, over scenes that `captions` does not have."""
    make_captions(folder, n, seed, kind='instruct', taken=scenes_of(folder.parent / 'captions'))


def make_pairs(folder, n=4000, n_single=500, seed=1):
    """n chats about two pictures each, over scenes that neither `captions` nor `instruct` has, and n_single about one:
    without them A2 forgets how to answer those. In truth.json the scenes of a chat about two are ID/0 and ID/1."""
    from common import progress
    taken = {*scenes_of(folder.parent / 'captions'), *scenes_of(folder.parent / 'instruct')}
    make_captions(folder, n_single, seed, kind='pairs', taken=taken)
    rng = np.random.default_rng((part_seed('pairs', seed), 2))
    records = json.loads((folder / 'data.json').read_text())
    truth = json.loads((folder / 'truth.json').read_text())
    used = {*taken, *scenes_of(folder)}
    for k in progress(range(n), 'two pictures'):
        first = new_scene(rng, used)
        second = first
        while second in used:
            second = second_scene(first, rng)
        used.add(second)
        first, second = in_random_order((first, second), rng)   # the second one has more things
        id = f'two-{k:06d}'
        record = {'id': id, 'image': [f'two_{k:06d}_0.png', f'two_{k:06d}_1.png'], 'kinds': [], 'conversations': []}
        for scene, name in zip((first, second), record['image']):
            Image.fromarray(draw(scene, rng)).save(folder / 'images' / name)
            truth[f'{id}/{name[-5]}'] = scene
        for kind, ask, answer in pair_chat(first, second, rng):
            record['kinds'].append(kind)
            record['conversations'] += [{'from': 'human', 'value': ask}, {'from': 'gpt', 'value': answer}]
        records.append(record)
    (folder / 'data.json').write_text(json.dumps(records))
    (folder / 'truth.json').write_text(json.dumps(truth))


def scenes_of(folder):
    """[Scene]: what the truth.json of a part says."""
    return [as_scene(fields) for fields in json.loads((folder / 'truth.json').read_text()).values()]


def make_sounds(folder, n=2400, seed=1):
    """manifest.jsonl: {"id", "source", "audio", "text"} a line, two a clip; audio/; truth.json: {id: sound}."""
    import soundfile

    from common import progress
    rng = np.random.default_rng(part_seed('sounds', seed))
    (folder / 'audio').mkdir(parents=True)
    truth = {}
    with open(folder / 'manifest.jsonl', 'w') as f:
        for k in progress(range(n), 'sounds'):
            sound = random_sound(rng)
            audio = f'audio/{k:06d}.wav'
            soundfile.write(folder / audio, play(sound, rng), RATE, subtype='PCM_16')
            texts = []
            while len(texts) < 2:                      # two different phrasings
                text = sound_caption(sound, rng)
                if text not in texts:
                    texts.append(text)
            for n_text, text in enumerate(texts):
                id = f'sounds-{k:06d}-{n_text}'
                f.write(json.dumps({'id': id, 'source': 'sounds', 'audio': audio, 'text': text}) + '\n')
                truth[id] = sound
    (folder / 'truth.json').write_text(json.dumps(truth))


def make_text(folder, n_train=64_000, n_eval=1_000, n_replay=6_000, seed=1):
    """train, eval and replay JSONL, one {"text", "n_context"} a line.

    n_context: its first characters that cannot be predicted, see corpus.py. train.jsonl is to be read in its order;
    the other two are as varied as its end.
    """
    from common import progress
    rng = np.random.default_rng(part_seed('text', seed))
    folder.mkdir(parents=True, exist_ok=True)
    for name, n in (('train', n_train), ('eval', n_eval), ('replay', n_replay)):
        with open(folder / f'{name}.jsonl', 'w') as f:
            for k in progress(range(n), f'text/{name}'):
                context, answer = corpus.document(rng, k / n if name == 'train' else 1.0)
                f.write(json.dumps({'text': context + answer, 'n_context': len(context)}) + '\n')


# -----------------------------------------------------------------------------
# the parts, on demand

DATA = {'captions': make_captions, 'instruct': make_instruct, 'pairs': make_pairs, 'text': make_text,
        'sounds': make_sounds}
MODELS = ('llm', 'vision', 'image_codec', 'audio_codec')
PARTS = (*DATA, *MODELS)
NEEDS = {'instruct': ('captions',), 'pairs': ('captions', 'instruct'), 'llm': ('text',)}


def make_part(part, folder, seed, position):
    if part in DATA:
        DATA[part](folder, seed=seed)
        return
    from small import codecs, models                   # and torch and transformers with them
    makers = {'llm': models.make_llm, 'vision': models.make_vision,
              'image_codec': codecs.make_image_codec, 'audio_codec': codecs.make_audio_codec}
    makers[part](folder, seed=seed, position=position)


def ensure(*parts, root=ROOT):
    """Build those of these parts that are missing, and what they need, with the folder's seed (1 in a new folder).

    Returns the small world's folder, relative to the current one. Several processes may ask at the same time: one
    builds, the others wait.
    """
    for part in parts:
        if part not in PARTS:
            raise SystemExit(f'no part is called {part!r}: wanted some of {", ".join(PARTS)}')
    missing = missing_parts(parts, root)
    if missing:
        there = next(folder for folder in (root, *root.parents) if folder.exists())
        if not os.access(there, os.W_OK):              # a checkout that is read-only
            raise SystemExit(f'{root}: {", ".join(missing)} of the small world cannot be made, {there} cannot be '
                             'written; copy the repository to where you can write, or set the paths in a config of '
                             'your own')
        seed = world_seed(root)
        for part in missing:
            if part in DATA:
                build(part, root, seed)
        build_models([part for part in missing if part in MODELS], root, seed)
    return Path(os.path.relpath(root))


def missing_parts(parts, root):
    """The parts that are missing, each after what it needs."""
    missing = []
    for part in parts:
        if not (root / part).exists() and part not in missing:
            missing += [need for need in missing_parts(NEEDS.get(part, ()), root) if need not in missing]
            missing.append(part)
    return missing


def world_seed(root, wanted=None):
    """The seed that all parts of this folder are made with; a new folder gets the wanted one, by default 1."""
    path = root / 'seed.json'
    if path.exists():
        try:
            seed = int(json.loads(path.read_text())['seed'])
        except (ValueError, KeyError, TypeError) as e:
            raise SystemExit(f'{path}: wanted {{"seed": a number}} ({type(e).__name__}: {e}); restore it')
    elif any((root / part).exists() for part in PARTS):
        seed = 1                                       # made before there was a choice
    else:
        seed = 1 if wanted is None else wanted
    if not path.exists():
        from common import write_atomic
        write_atomic(path, json.dumps({'seed': seed}))
    if wanted not in (None, seed):
        raise SystemExit(f'{root} was made with seed {seed}, not {wanted}: '
                         f'set --seed={seed}, remove it, or use another clone')
    return seed


def build(part, root, seed, position=0):
    """Make one part in a folder beside its place and rename it when it is whole; others that want it wait."""
    from common import one_line_io_errors
    with one_line_io_errors(root / part):
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f'.{part}.lock'):
            if not (root / part).exists():             # else another process has made it meanwhile
                beside = root / f'.{part}.tmp'
                shutil.rmtree(beside, ignore_errors=True)   # what a killed build left: we hold the lock
                make_part(part, beside, seed, position)
                os.replace(beside, root / part)


def build_models(models, root, seed):
    """Make base models side by side, each in a process with one thread and with a line of the terminal of its own."""
    if not models:
        return
    # not multiprocessing: a spawned process would run the stage's script, which has no `if __name__` around it
    code = 'import sys; from small import make; make.build_model(*sys.argv[1:])'
    quiet = {'HF_HUB_DISABLE_PROGRESS_BARS': '1', 'TRANSFORMERS_VERBOSITY': 'error'}
    children = []
    for position, model in enumerate(models, 1):       # line 0 is this process's: a bar that ends there would move all
        command = [sys.executable, '-c', code, model, str(root.resolve()), str(seed), str(position)]
        children.append(subprocess.Popen(command, cwd=REPO, env={**os.environ, 'OMP_NUM_THREADS': '1', **quiet}))
    failed = [child for child in children if child.wait() != 0]
    for model in models:                               # now that the terminal is free
        if (root / model).exists():
            print(f'{model}: {(root / model / "report.json").read_text()}')
    if failed:
        raise SystemExit(f'{root}: a base model could not be made, its own message is above; run again to go on')


def build_model(part, root, seed, position):
    """What each process of build_models() runs."""
    from tqdm import tqdm
    # several processes draw on one terminal: one at a time, or they write into each other's lines
    tqdm.set_lock(FileLock(Path(root) / '.bars.lock', poll_interval=0.01))
    build(part, Path(root), int(seed), int(position))
    if sys.stderr.isatty():
        sys.stderr.write('\r')                         # a bar that was cleared leaves the cursor at the line's end


if __name__ == '__main__':
    from configure import configure

    parts = PARTS                  # what to build: any of the folders named above
    seed = 1                       # of everything; a folder keeps the seed that it was made with
    config = configure(globals())
    if seed < 0:
        raise SystemExit(f'seed = {seed}: wanted 0 or more')
    world_seed(ROOT, seed)
    print(f'the small world is in {ensure(*parts)}')
