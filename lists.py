"""
Lists of samples as people's programs write them, JSON, JSONL and CSV, and what is in them: ids, texts, chats, image
paths.
"""
import codecs
import csv
import io
import json
import os
import re
import stat
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from media import BadSample

# -----------------------------------------------------------------------------
# lists: JSON, JSONL and CSV as people's programs write them


def parse_json(text):
    """json.loads that refuses duplicate keys with a ValueError. NaN is taken: it is a wrong value where it is used."""
    return json.loads(text, object_pairs_hook=unique_keys)


def unique_keys(pairs):
    found = dict(pairs)                                # Python's own parser keeps the last and says nothing
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f'key {max(keys, key=keys.count)!r} stands twice in one object')
    return found


def json_values(file, block=1 << 22):
    """The values of a JSON list in a file of text, one after the other: no more than a block of it is in memory. Raises
    a ValueError or a RecursionError, after some values or before, when it is not a whole list."""
    decoder = json.JSONDecoder(object_pairs_hook=unique_keys)
    space = re.compile(r'[ \t\n\r]*')
    text = ''
    at = 0
    mark = '['                                         # what comes before a value: '[', then ','
    while True:
        at = space.match(text, at).end()
        if text[at:at + 1] == ']' and mark == ',':
            break
        try:
            if text[at:at + 1] != mark:
                raise ValueError(f'no {mark}')
            start = space.match(text, at + 1).end()
            if text[start:start + 1] == ']' and mark == '[':
                at = start
                break
            value, end = decoder.raw_decode(text, start)
            end = space.match(text, end).end()
            if text[end:end + 1] not in (',', ']'):    # '' too: a number may go on in the next block
                raise ValueError('no , and no ]')
        except ValueError:
            more = file.read(block)
            if not more:
                raise
            text = text[at:] + more
            at = 0
            continue
        yield value
        at = end
        mark = ','
    if text[at + 1:].strip(' \t\n\r') or file.read().strip(' \t\n\r'):
        raise ValueError('something follows')


def read_list(path, kind):
    """A list as an open file of bytes, after its byte order mark. kind: what it is called in the line when it cannot
    be read."""
    try:
        file = open(path, 'rb')
        if file.read(3) != codecs.BOM_UTF8:
            file.seek(0)
    except OSError as e:
        raise SystemExit(f'{path}: cannot read this {kind} ({e.strerror}); is the path right?')
    return file


def json_list(file, path):
    """(where, value) of each value of a JSON list, of read_list; exits with one line when it is not one."""
    with file:
        text = io.TextIOWrapper(file, encoding='utf-8', newline='')
        try:
            for n, value in enumerate(json_values(text)):
                yield f'{path}, sample {n}', value
            return
        except (ValueError, RecursionError):
            pass                                       # what is wrong, in the words of Python's parser
    try:
        values = parse_json(Path(path).read_text(encoding='utf-8-sig'))
    except (ValueError, RecursionError) as e:
        raise SystemExit(f'{path}: not valid JSON: {e}')
    raise SystemExit(f'{path}: found {shown(values)}, wanted a list of samples or a sample on each line')


def json_lines(file, path):
    """(where, value) of each line of JSONL that is not blank, of read_list; the value of one that is not JSON is a
    BadSample."""
    with file:
        for n, line in enumerate(file, 1):             # at nothing but line feeds: U+2028 may stand inside a text
            if not line.strip():
                continue
            where = f'{path}:{n}'
            try:
                value = parse_json(line.decode('utf-8-sig'))   # lists joined by cat have a mark in the middle
            except (ValueError, RecursionError) as e:
                value = BadSample(f'{where}: not valid JSON: {e}')
            yield where, value


def read_csv(path, wanted):
    """(its columns, [(where, {column: cell})] of its rows) of a CSV whose first line names the columns; a row with more
    or fewer cells is a BadSample. wanted: the columns in words, for the line when it is no CSV of them."""
    records = []
    n = 1                                              # a quoted cell may have line feeds: n is a row's first line
    try:
        with open(path, newline='', encoding='utf-8-sig') as f:
            rows = csv.reader(f, strict=True)
            columns = [name.strip() for name in next(rows, [])]
            while columns and not columns[-1]:         # some programs end lines with commas
                columns.pop()
            n = rows.line_num + 1
            for cells in rows:
                if cells:
                    records.append((f'{path}:{n}', csv_record(columns, cells, f'{path}:{n}')))
                n = rows.line_num + 1
    except OSError as e:
        raise SystemExit(f'{path}: cannot read these captions ({e.strerror}); is the path right?')
    except (csv.Error, ValueError) as e:               # a quote that nothing closes would swallow what follows
        raise SystemExit(f'{path}:{n}: not a CSV of {wanted} ({e})')
    if len(columns) == 1 and re.search('[\t;|]', columns[0]):
        raise SystemExit(f'{path}: its first line is {columns[0]!r}, wanted {wanted} with commas between them')
    twice = [name for name, times in Counter(columns).items() if times > 1]
    if twice:
        raise SystemExit(f'{path}: column {twice[0]!r} stands twice in its first line')
    return columns, records


def csv_record(columns, cells, where):
    """{column: cell}, or the BadSample of a row that has other cells than the columns."""
    n_filled = max((n for n, cell in enumerate(cells, 1) if cell.strip()), default=0)
    if len(cells) < len(columns) or n_filled > len(columns):
        return BadSample(f'{where}: {len(cells)} cells for {len(columns)} columns; a text with commas stands in quotes')
    return dict(zip(columns, cells))


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


class Root:
    """A folder that the paths of a list stay inside. Where it is, and where the folders in it are, is looked up once:
    links may lead elsewhere."""
    def __init__(self, folder):
        self.folder = Path(folder)
        self.real = os.path.realpath(folder)
        self.inside = {}                               # {folder: whether it is in the root}
        self.links_out = []                            # paths that were found to lead out

    def holds(self, path):
        """Whether a path, links followed, is in the root. Raises ValueError for one that no file can have."""
        folder = os.path.dirname(path)
        if folder not in self.inside:
            self.inside[folder] = self.is_real_path_inside(folder)
        try:
            is_link = stat.S_ISLNK(os.lstat(path).st_mode)
        except OSError:                                # not there: whoever opens it will say so
            is_link = False
        return self.is_real_path_inside(path) if is_link else self.inside[folder]

    def is_real_path_inside(self, path):
        real = os.path.realpath(path)
        return real == self.real or real.startswith(self.real.rstrip('/') + '/')

    def path(self, name, where, kind='image'):
        """The path of this name, which stays inside; else BadSample. where: the sample, for the line."""
        if not isinstance(name, str) or not name:
            raise BadSample(f'{where}: {kind} is {shown(name)}, wanted a path relative to the {kind} root')
        if '://' in name or os.path.isabs(name) or '..' in name.split('/'):
            raise BadSample(f'{where}: {kind} {name!r} leaves the {kind} root, wanted a relative path without ..')
        path = str(self.folder / name)
        try:
            is_inside = self.holds(path)
        except ValueError as e:
            raise BadSample(f'{where}: {kind} {name!r} is no file name ({e})')
        if not is_inside:
            self.links_out.append(path)
            raise BadSample(f'{where}: {kind} {name!r} is a link out of the {kind} root')
        return path


def path_inside(root, name, where, kind='image'):
    """root / name as a path that stays inside root; else BadSample. where: the sample, for the line."""
    return Root(root).path(name, where, kind)


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


def good_records(records, read, bad_samples):
    """read(record, its unique id, where) of records, [(where, record)], one after the other; those that are wrong go to
    bad_samples, which says when it is too much."""
    unique = UniqueIds()
    for n, (where, record) in enumerate(records):
        id = str(n)
        try:
            if isinstance(record, BadSample):
                raise record
            id = unique(id_of(record, n, where))
            item = read(record, id, f'{where} (id {id!r})')
        except BadSample as e:
            bad_samples.add(id, e, key=where)
            continue
        yield item


# -----------------------------------------------------------------------------
# samples and texts


@dataclass(frozen=True)
class Item:
    """One sample: the paths of its images and its turns, [(question, answer)]; captions have one turn that asks
    nothing."""
    id: str
    images: tuple
    turns: tuple
    system: str = ''                   # the system turn of a chat; '' for none
    image_places: tuple = ()           # (turn, characters of its question before it) of each image; () for all first

    def __post_init__(self):
        if not self.image_places:
            object.__setattr__(self, 'image_places', len(self.images) * ((0, 0),))


def read_llava(path, image_root, bad_samples, captions=False, max_images=1):
    """[Item] of a list: see llava_items."""
    return list(llava_items(path, Root(image_root), bad_samples, captions=captions, max_images=max_images))


def llava_items(path, root, bad_samples, captions=False, max_images=1):
    """LLaVA's JSON or JSONL -> one Item after the other. root: a Root, for its images. captions: the human turn of
    LLaVA-Pretrain is a prompt that is not used. "image" is a path or a list of up to max_images, in the order of their
    <image> marks, which stand in any human turn.

    [{"id"?, "image"?, "conversations": [{"from": "system", "value": "..."}?,
                                         {"from": "human", "value": "<image>\\n..."},
                                         {"from": "gpt", "value": "..."}, ...]}]
    A sample that is wrong goes to bad_samples.
    """
    def read(record, id, where):
        return read_llava_item(record, id, where, root=root, captions=captions, max_images=max_images)

    file = read_list(path, 'data set')
    records = json_lines(file, path) if is_json_lines(file) else json_list(file, path)
    n_items = 0
    for item in good_records(records, read, bad_samples):
        n_items += 1
        yield item
    if not n_items:
        raise SystemExit(f'{path}: no usable sample in it')


def is_json_lines(file):
    """Whether one of the first lines is an object, and they are not those of a list; the ending of the name does not
    tell, and a line may be damaged. Reads nothing."""
    start = file.tell()
    lines = iter(lambda: file.readline(1 << 26), b'')  # a list without a line feed is a line too
    first_lines = list(islice(filter(None, map(bytes.strip, lines)), 4))
    file.seek(start)
    is_list = bool(first_lines) and first_lines[0].startswith(b'[')
    return not is_list and any(line[:1] == b'{' and line[-1:] == b'}' for line in first_lines)


def read_llava_item(record, id, where, root, captions, max_images):
    images = record.get('image')
    if not isinstance(images, list):
        images = [] if images is None else [images]
    if len(images) > max_images:
        most = 'one' if max_images == 1 else f'at most max_images = {max_images}'
        raise BadSample(f'{where}: {len(images)} images, wanted {most}')
    if record.get('video'):
        raise BadSample(f'{where}: a video, wanted an image')
    images = tuple(root.path(image, where) for image in images)
    system, turns = read_turns(record.get('conversations'), where)
    turns, places = place_images(turns, len(images), where)
    if not captions:
        return Item(id, images, turns, system, places)
    if not images:
        raise BadSample(f'{where}: a caption without an image')
    if places[0][0]:                                   # the caption is the first answer
        raise BadSample(f'{where}: <image> in question {places[0][0] + 1} of a caption, wanted it in the first')
    caption = turns[0][1]
    return Item(id, images, (('', caption),))


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


def place_images(turns, n_images, where):
    """(the turns without the <image> marks of their questions, the place of each image: (turn, characters of its
    question before it))."""
    unmarked = []
    places = []
    for n, (question, answer) in enumerate(turns):
        if '<video>' in question:
            raise BadSample(f'{where}: <video> in question {n + 1}, wanted an image')
        text, *rest = question.split('<image>')
        offsets = []
        for part in rest:
            offsets.append(len(text))
            text += part
        if rest:                                       # the template puts a newline beside an image at an end
            n_stripped = len(text) - len(text.lstrip())
            text = text.strip()
            places += [(n, min(max(offset - n_stripped, 0), len(text))) for offset in offsets]
        unmarked.append((text, answer))
    if len(places) != n_images:
        raise BadSample(f'{where}: {len(places)} <image> marks for {n_images} images, wanted one each')
    return tuple(unmarked), tuple(places)


def text_lines(path):
    """JSONL with one {"text": ...} a line -> one (where, text) after the other; exits with one line at the first that
    has none."""
    is_empty = True
    for where, record in json_lines(read_list(path, 'text file'), path):
        if isinstance(record, BadSample):
            raise record
        if not isinstance(record, dict) or 'text' not in record:
            raise SystemExit(f'{where}: found no "text", wanted lines of {{"text": ...}}')
        is_empty = False
        yield where, require_text(record['text'], where)
    if is_empty:
        raise SystemExit(f'{path}: holds no text')


def read_texts(path):
    return [text for _, text in text_lines(path)]
