"""
Lists of samples as people's programs write them, JSON and JSONL, and what is in them: ids, texts, chats, image paths.
"""
import codecs
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from media import BadSample

# -----------------------------------------------------------------------------
# lists: JSON and JSONL as people's programs write them


def parse_json(text):
    """json.loads that refuses duplicate keys with a ValueError. NaN is taken: it is a wrong value where it is used."""
    def unique(pairs):
        keys = [key for key, _ in pairs]               # Python's own parser keeps the last and says nothing
        if len(set(keys)) < len(keys):
            raise ValueError(f'key {max(keys, key=keys.count)!r} stands twice in one object')
        return dict(pairs)
    return json.loads(text, object_pairs_hook=unique)


def read_list(path, kind):
    """The bytes of a list without a byte order mark. kind: what it is called in the line when it cannot be read."""
    try:
        return Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as e:
        raise SystemExit(f'{path}: cannot read this {kind} ({e.strerror}); is the path right?')


def json_list(content, path):
    """[(where, value)] of the values of a JSON list; exits with one line when it is not one."""
    try:
        values = parse_json(content.decode())
    except (ValueError, RecursionError) as e:
        raise SystemExit(f'{path}: not valid JSON: {e}')
    if not isinstance(values, list):
        raise SystemExit(f'{path}: found {shown(values)}, wanted a list of samples or a sample on each line')
    return [(f'{path}, sample {n}', value) for n, value in enumerate(values)]


def json_lines(content, path):
    """[(where, value)] of the lines of JSONL that are not blank; the value of one that is not JSON is a BadSample."""
    found = []
    for n, line in enumerate(content.split(b'\n'), 1):    # at nothing else: U+2028 may stand inside a text
        if not line.strip():
            continue
        where = f'{path}:{n}'
        try:
            value = parse_json(line.decode('utf-8-sig'))   # lists joined by cat have a mark in the middle
        except (ValueError, RecursionError) as e:
            value = BadSample(f'{where}: not valid JSON: {e}')
        found.append((where, value))
    return found


def shown(value):
    """A JSON value as it stands in its file, cut to 60 characters, for a line about it."""
    if isinstance(value, list | dict):
        return f'a {type(value).__name__}'
    return json.dumps(value)[:60]


def text_is_unicode(text):
    """Whether a text can be written as UTF-8. JSON may hold half a character, and so may bytes that are not UTF-8 on a
    command line: no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def require_text(text, where):
    """The text itself, when it has something in it and is Unicode; else BadSample."""
    if not isinstance(text, str) or not text.strip():
        raise BadSample(f'{where}: text is {shown(text)}, wanted some')
    if not text_is_unicode(text):
        raise BadSample(f'{where}: text is {shown(text)}, which is not Unicode')
    return text


def path_inside(root, name, where, kind='image'):
    """root / name as a path that stays inside root; else BadSample. where: the sample, for the line."""
    if not isinstance(name, str) or not name:
        raise BadSample(f'{where}: {kind} is {shown(name)}, wanted a path relative to the {kind} root')
    if '://' in name or Path(name).is_absolute() or '..' in Path(name).parts:
        raise BadSample(f'{where}: {kind} {name!r} leaves the {kind} root, wanted a relative path without ..')
    path = Path(root) / name
    try:
        is_inside = path.resolve().is_relative_to(Path(root).resolve())   # links followed
    except ValueError as e:
        raise BadSample(f'{where}: {kind} {name!r} is no file name ({e})')
    if not is_inside:
        raise BadSample(f'{where}: {kind} {name!r} is a link out of the {kind} root')
    return str(path)


class UniqueIds:
    """Ids as lists have them, made keys: LLaVA's are numbers of pictures, and a picture has several chats. One that
    comes again gets a number: 33471, 33471#2, 33471#3."""
    def __init__(self):
        self.times = Counter()                         # that each has come
        self.taken = set()

    def __call__(self, id):
        self.times[id] += 1
        unique = id if self.times[id] == 1 else f'{id}#{self.times[id]}'
        while unique in self.taken:                    # a list may have a 33471#2 of its own
            self.times[id] += 1
            unique = f'{id}#{self.times[id]}'
        self.taken.add(unique)
        return unique


def id_of(record, n, where):
    """The id of record number n as text; that number where it has none."""
    if not isinstance(record, dict):
        raise BadSample(f'{where}: found {shown(record)}, wanted an object')
    id = record.get('id')
    if id is None or id == '':
        return str(n)
    if isinstance(id, bool) or not isinstance(id, str | int) or not text_is_unicode(str(id)):
        raise BadSample(f'{where}: id is {shown(id)}, wanted text or a whole number')
    return str(id)


def read_records(records, read, bad_samples):
    """[read(record, its unique id, where)] of records, [(where, record)]; those that are wrong go to bad_samples, which
    says when it is too much."""
    unique = UniqueIds()
    items = []
    for n, (where, record) in enumerate(records):
        id = str(n)
        try:
            if isinstance(record, BadSample):
                raise record
            id = unique(id_of(record, n, where))
            items.append(read(record, id, f'{where} (id {id!r})'))
        except BadSample as e:
            bad_samples.add(id, e, key=where)
    return items


# -----------------------------------------------------------------------------
# samples and texts


@dataclass(frozen=True)
class Item:
    """One sample: an image path (or None) and its turns, [(question, answer)]; captions have one turn that asks
    nothing."""
    id: str
    image: str | None
    turns: tuple
    system: str = ''                   # the system turn of a chat; '' for none
    image_offset: int = 0              # characters of the first question that stand before the image


def read_llava(path, image_root, bad_samples, captions=False):
    """LLaVA's JSON or JSONL -> [Item]. captions: the human turn of LLaVA-Pretrain is a prompt that is not used.

    [{"id"?, "image"?, "conversations": [{"from": "system", "value": "..."}?,
                                         {"from": "human", "value": "<image>\\n..."},
                                         {"from": "gpt", "value": "..."}, ...]}]
    A sample that is wrong goes to bad_samples.
    """
    def read(record, id, where):
        return read_llava_item(record, id, where, image_root=image_root, captions=captions)

    content = read_list(path, 'data set')
    first_line = content.lstrip().split(b'\n', 1)[0].strip()
    is_lines = first_line[:1] == b'{' and first_line[-1:] == b'}'      # both endings of names are used for both
    records = json_lines(content, path) if is_lines else json_list(content, path)
    items = read_records(records, read, bad_samples)
    if not items:
        raise SystemExit(f'{path}: no usable sample in it')
    return items


def read_llava_item(record, id, where, image_root, captions):
    image = record.get('image')
    if isinstance(image, list):
        if len(image) > 1:
            raise BadSample(f'{where}: {len(image)} images, wanted one')
        image = image[0] if image else None
    if record.get('video'):
        raise BadSample(f'{where}: a video, wanted an image')
    if image is not None:
        image = path_inside(image_root, image, where)
    system, turns = read_turns(record.get('conversations'), where)
    turns[0], image_offset = place_image(turns, image, where)
    if not captions:
        return Item(id, image, tuple(turns), system, image_offset)
    if image is None:
        raise BadSample(f'{where}: a caption without an image')
    caption = turns[0][1]
    return Item(id, image, (('', caption),))


def read_turns(turns, where):
    """LLaVA's list of turns -> (the system turn or '', [(question, answer)])."""
    texts = []
    speakers = []
    for turn in turns if isinstance(turns, list) else []:
        if not isinstance(turn, dict) or not isinstance(turn.get('value'), str):
            raise BadSample(f'{where}: turns must alternate human and gpt, each with a "value"')
        if not text_is_unicode(turn['value']):
            raise BadSample(f'{where}: a turn is {shown(turn["value"])}, which is not Unicode')
        speakers.append(turn.get('from'))
        texts.append(turn['value'].strip())
    system = ''
    if speakers[:1] == ['system']:
        system = texts[0]
        speakers = speakers[1:]
        texts = texts[1:]
    questions = texts[::2]
    answers = texts[1::2]
    if not answers or len(questions) != len(answers):
        raise BadSample(f'{where}: conversations is not a list of human and gpt turns in pairs')
    if speakers != ['human', 'gpt'] * len(answers):
        raise BadSample(f'{where}: turns must alternate human and gpt, each with a "value"')
    if '' in answers:
        raise BadSample(f'{where}: an empty answer')
    return system, list(zip(questions, answers))


def place_image(turns, image, where):
    """The first turn without the <image> mark of its question, and how many characters stand before the image."""
    for n, (question, _) in enumerate(turns, 1):
        if '<video>' in question:
            raise BadSample(f'{where}: <video> in question {n}, wanted an image')
        if '<image>' in question and n > 1:
            raise BadSample(f'{where}: <image> in question {n}, wanted it in the first')
    question, answer = turns[0]
    n_marks = question.count('<image>')
    n_images = int(image is not None)
    if n_marks != n_images:
        raise BadSample(f'{where}: {n_marks} <image> marks for {n_images} images, wanted one each')
    if image is None:
        return turns[0], 0
    before, _, after = question.partition('<image>')
    question = (before + after).strip()                # the template puts a newline beside an image at an end
    return (question, answer), min(len(before), len(question))


def read_text_lines(path):
    """JSONL with one {"text": ...} a line -> [(where, text)]; exits with one line at the first that has none."""
    found = []
    for where, record in json_lines(read_list(path, 'text file'), path):
        if isinstance(record, BadSample):
            raise record
        if not isinstance(record, dict) or 'text' not in record:
            raise SystemExit(f'{where}: found no "text", wanted lines of {{"text": ...}}')
        found.append((where, require_text(record['text'], where)))
    if not found:
        raise SystemExit(f'{path}: holds no text')
    return found


def read_texts(path):
    return [text for _, text in read_text_lines(path)]
