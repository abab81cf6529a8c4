"""
Real pictures and their names, for a run on a real language model: emoji as five artists drew them.

reads   data/emoji/packages/*.tgz, as `npm pack` leaves them:

        emoji-datasource-google@16.0.0     Noto Emoji, Apache 2.0, 64 pixels
        emoji-datasource-twitter@16.0.0    Twemoji, CC BY 4.0, 64 pixels
        emojione@2.2.7                     EmojiOne 2, CC BY 4.0, 128 pixels
        openmoji@17.0.0                    OpenMoji, CC BY-SA 4.0, drawings in colour and in black; and names and kinds
        @lobehub/fluent-emoji-3d@1.1.0     Fluent Emoji, MIT, 256 pixels
        @lobehub/fluent-emoji-flat@1.1.0   the same in flat colours, MIT, drawings

writes  data/emoji/pictures/SET/CODE.png, 64 pixels, transparent where nothing is drawn; captions.json, chats.json,
        eval_known.json, eval_new.json, LLaVA JSON; text.jsonl, replay.jsonl, plain text

$ npm pack emoji-datasource-google@16.0.0 --pack-destination=data/emoji/packages   # and so on
$ python -m emoji.pictures

Some pictures are in neither captions nor chats. eval_known: 300 things as one artist drew them, known from others.
eval_new: 150 things that nobody's picture shows. The trainers hold out more of their own.
"""
import io
import json
import random
import re
import tarfile
import zlib
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from pydoc_data.topics import topics

from common import first_line, write_atomic

ROOT = Path(__file__).resolve().parent.parent / 'data' / 'emoji'
PIXELS = 64
N_KNOWN = 300                  # things of which one artist's pictures are held out
N_NEW = 150                    # things of which all pictures are
SETS = {                       # {set: (artist, package, where its pictures are)}
    'noto': ('google', 'emoji-datasource-google-16.0.0', 'img/google/64/*.png'),
    'twemoji': ('twitter', 'emoji-datasource-twitter-16.0.0', 'img/twitter/64/*.png'),
    'emojione': ('emojione', 'emojione-2.2.7', 'assets/png_128x128/*.png'),
    'openmoji': ('openmoji', 'openmoji-17.0.0', 'color/svg/*.svg'),
    'openmoji_black': ('openmoji', 'openmoji-17.0.0', 'black/svg/*.svg'),
    'fluent': ('microsoft', 'lobehub-fluent-emoji-3d-1.1.0', 'assets/*.webp'),
    'fluent_flat': ('microsoft', 'lobehub-fluent-emoji-flat-1.1.0', 'assets/*.svg')}
GROUPS = ('smileys-emotion', 'people-body', 'animals-nature', 'food-drink', 'travel-places', 'activities', 'objects')
PLURALS = ('glasses', 'scissors', 'people', 'men', 'women', 'hands', 'children')


class Thing(NamedTuple):
    """What an emoji shows."""
    name: str                  # 'grinning face with smiling eyes'
    kind: str                  # 'face, smiling'
    tags: tuple                # other words that go with it


# -----------------------------------------------------------------------------
# things


def read_things(records):
    """OpenMoji's records -> {code: Thing}: what a picture of 64 pixels can show, each name once."""
    named = {}
    for record in records:
        name = record['annotation'].lower().translate({0x201c: '', 0x201d: '', 0x2019: "'"})
        if record['group'] in GROUPS and not record['skintone'] and not ENDLESS.match(name):
            named.setdefault(name, record)
    things = {}
    for name, record in named.items():
        tags = (tag.strip() for tag in record['tags'].split(','))
        words = [word for word in record['subgroups'].split('-') if word != 'other']
        if not gendered(name, named):
            own = [tag for tag in tags if tag not in name and tag.isalpha()]
            things[code_of(record['hexcode'])] = Thing(name, ', '.join(words), tuple(own))
    return things


# families of all makings, the hours of a clock, and people who differ by hair and by where they look
ENDLESS = re.compile(r"family|kiss:|couple with heart|.*o'clock|.*-thirty|.*: .*hair|.*facing right|.*: bald")


def gendered(name, names):
    """Whether a name is that of another one with a man or a woman in it."""
    match = re.match(r'(man|woman|men|women)[: ]+(?:in |with )?(.*)', name)
    if not match:
        return False
    rest = match[2]
    return any(other in names for other in (rest, f'person {rest}', f'person in {rest}', f'person with {rest}'))


def code_of(stem):
    """The code points of a file's name, as all sets have them: 1F63A, 00a9-fe0f -> 1f63a, a9."""
    parts = [part.lstrip('0') for part in stem.lower().split('-')]
    return '-'.join(part for part in parts if part not in ('fe0f', '200d'))


def with_article(name):
    """hedgehog -> a hedgehog."""
    first = name.split()[0]
    last = head_noun(name)
    if first in PLURALS or last in PLURALS or (last.endswith('s') and not last.endswith(('ss', 'us', 'is'))):
        return name
    return f'{"an" if first[0] in "aeiou" else "a"} {name}'


def head_noun(name):
    """What a thing is, without what it has or does: 'red apple' -> 'apple', 'person in suit levitating' -> 'person'."""
    until = re.split(r' (?:with|of|in|on|over|behind|without|from|and|showing) |[:,]', name)[0]
    words = re.sub(r'\(.*?\)', '', until).split()
    return words[0] if words[0] in ('person', 'people', 'man', 'woman') else words[-1]


# -----------------------------------------------------------------------------
# pictures


def read_package(package, pattern):
    """(path, bytes) of the files of a package that match the pattern; exits with one line when there are none."""
    path = ROOT / 'packages' / f'{package}.tgz'
    name, _, version = re.sub(r'^lobehub-', '@lobehub/', package).rpartition('-')
    get = f'get it with: npm pack {name}@{version} --pack-destination={path.parent}'
    if not path.exists():
        raise SystemExit(f'{path} is missing; {get}')
    n_found = 0
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                inside = Path(member.name)
                if inside.match(f'package/{pattern}'):
                    n_found += 1
                    yield inside, tar.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as e:
        raise SystemExit(f'{path} is damaged ({first_line(e)}); remove it and {get}')
    if not n_found:
        raise SystemExit(f'{path} has no {pattern}; remove it and {get}')


def as_picture(data, suffix):
    """The bytes of a picture or of a drawing -> RGBA of PIXELS x PIXELS."""
    if suffix == '.svg':
        try:
            import resvg_py
        except ImportError:
            raise SystemExit("drawings need the package resvg_py: pip install '.[emoji]'")
        data = bytes(resvg_py.svg_to_bytes(svg_string=data.decode(), width=PIXELS, height=PIXELS))
    picture = Image.open(io.BytesIO(data)).convert('RGBA')
    return picture.resize((PIXELS, PIXELS), Image.Resampling.LANCZOS)


def write_pictures(things):
    """{code: {set: path from ROOT}} of the pictures of these things, written where they are missing."""
    found = defaultdict(dict)
    for name, (_, package, pattern) in SETS.items():
        folder = ROOT / 'pictures' / name
        folder.mkdir(parents=True, exist_ok=True)
        for inside, data in read_package(package, pattern):
            code = code_of(inside.stem)
            if code in things:
                path = folder / f'{code}.png'
                if not path.exists():
                    encoded = io.BytesIO()
                    as_picture(data, inside.suffix).save(encoded, 'PNG')
                    write_atomic(path, encoded.getvalue())
                found[code][name] = str(path.relative_to(ROOT))
        print(f'{name}: {sum(name in sets for sets in found.values())} pictures', flush=True)
    return dict(sorted(found.items()))


# -----------------------------------------------------------------------------
# lists


def read_list(name):
    """The records of captions, chats, eval_known or eval_new."""
    path = ROOT / f'{name}.json'
    if not path.exists():
        raise SystemExit(f'{path} is missing; python -m emoji.pictures writes it')
    return json.loads(path.read_text())


def hold_out(pictures, rng):
    """(train, known, new): [(code, set)] of the pictures to learn from, and of those to be judged with."""
    codes = sorted(pictures)
    artists_of = {code: sorted({SETS[name][0] for name in pictures[code]}) for code in codes}
    several = [code for code in codes if len(artists_of[code]) > 2]
    chosen = rng.sample(several, N_KNOWN + N_NEW)
    artist_of = {}
    for code in chosen[:N_KNOWN]:
        artist_of[code] = rng.choice(artists_of[code])
    new_codes = set(chosen[N_KNOWN:])
    train = []
    known = []
    new = []
    for code in codes:
        for name in pictures[code]:
            if code in new_codes:
                new.append((code, name))
            elif SETS[name][0] == artist_of.get(code):
                known.append((code, name))
            else:
                train.append((code, name))
    return train, known, new


def caption(thing):
    """The name first, then what kind of thing it is."""
    return f'{with_article(thing.name)} ({thing.kind})'


def chat(code, things, rng):
    """[(question, answer)] of two or three turns about a picture of a thing."""
    thing = things[code]
    alike = [other for other in things.values() if other.kind == thing.kind and other != thing]
    other = rng.choice(alike if alike and rng.random() < 0.5 else list(things.values()))
    name = with_article(thing.name)
    another = with_article(other.name)
    asked = rng.choice((name, another))
    turns = [
        (rng.choice(('What is this?', 'What do you see?', 'Name what is shown.')), f'{name[0].upper()}{name[1:]}.'),
        ('What kind of thing is it?', f'{thing.kind[0].upper()}{thing.kind[1:]}.'),
        (f'Is this {" or ".join(rng.sample((name, another), 2))}?', f'It is {name}.'),
        (f'Is this {asked}?', f'Yes, it is {name}.' if asked == name else f'No, it is {name}.')]
    if thing.tags:
        turns.append(('Which words go with it?', ', '.join(rng.sample(thing.tags, min(3, len(thing.tags)))) + '.'))
    return rng.sample(turns, rng.randint(2, 3))


def llava(code, name, pictures, turns):
    """A record of LLaVA JSON."""
    conversations = []
    for ask, answer in turns:
        mark = '' if conversations else '<image>\n'
        conversations += [{'from': 'human', 'value': mark + ask}, {'from': 'gpt', 'value': answer}]
    return {'id': f'{name}-{code}', 'image': pictures[code][name], 'conversations': conversations}


def write_lists(things, pictures, seed=1):
    rng = random.Random(seed)
    train, known, new = hold_out(pictures, rng)
    shown = {code: things[code] for code, _ in train}  # a chat names nothing that is held out for good
    describe = lambda code: [('Describe the image.', caption(things[code]))]
    lists = {
        'captions': [llava(code, name, pictures, describe(code)) for code, name in train],
        'chats': [llava(code, name, pictures, chat(code, shown, rng)) for code, name in train],
        'eval_known': [llava(code, name, pictures, describe(code)) for code, name in known],
        'eval_new': [llava(code, name, pictures, describe(code)) for code, name in new]}
    for name, records in lists.items():
        for record in records:
            record['thing'] = things[record['id'].partition('-')[2]]._asdict()
        write_atomic(ROOT / f'{name}.json', json.dumps(records, indent=1))
        print(f'{name}.json: {len(records)} records')


def write_texts(n_eval=200, seed=1):
    """Plain text that is on every machine: paragraphs of Python's own documentation, each once."""
    paragraphs = set()
    for topic in topics.values():
        for paragraph in topic.split('\n\n'):
            text = ' '.join(paragraph.split())
            if 200 <= len(text) <= 800 and '--' not in text and '|' not in text:
                paragraphs.add(text)
    paragraphs = sorted(paragraphs)
    random.Random(seed).shuffle(paragraphs)
    for name, texts in ('text', paragraphs[:n_eval]), ('replay', paragraphs[n_eval:]):
        lines = [json.dumps({'text': text}) for text in texts]
        write_atomic(ROOT / f'{name}.jsonl', '\n'.join(lines) + '\n')
        print(f'{name}.jsonl: {len(texts)} texts')


if __name__ == '__main__':
    [(_, records)] = read_package('openmoji-17.0.0', 'data/openmoji.json')
    things = read_things(json.loads(records))
    write_lists(things, write_pictures(things))
    write_texts()
