"""
Data sets of other formats, made once into the lists that the stages read: parquet with pictures inside, webdataset
tars, AudioCaps.

reads   source: a folder of *.parquet (LLaVA-OneVision: id, image, conversations; or image and caption; needs the
        package datasets, pip install '.[datasets]'), or of *.tar (000000.jpg beside 000000.txt or 000000.json), or a
        CSV of audiocap_id, youtube_id, start_time, caption, with the clips in a folder
writes  out_dir/{data.json,images/,parts/,bad_samples.jsonl}, data.json as LLaVA's; of AudioCaps out_dir/manifest.jsonl
done    when every shard is in; started again it goes on with the first shard that is not

$ python -m tools.convert --source=data/onevision_parquet --out_dir=data/onevision
$ python -m tools.convert --source=data/AudioCaps/train.csv --clips=data/AudioCaps/clips --out_dir=data/AudioCaps

Pictures keep their bytes, a file each, and are decoded to their end here. A shard's records are in memory, no more.
"""
import io
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from PIL import Image

from common import flush_files, lock_run, one_line_io_errors, progress, read_sealed, write_atomic, write_sealed
from configure import configure
from lists import id_of, parse_json, place_images, read_csv, read_turns, require_text, shown
from media import IMAGE_FORMATS, BadSample, BadSamples, read_image

IMAGE_COLUMNS = ('image', 'images', 'jpg', 'jpeg', 'png', 'webp')
TEXT_COLUMNS = ('conversations', 'texts', 'caption', 'captions', 'text', 'txt')   # the first that is there
ENDINGS = {'PNG': '.png', 'JPEG': '.jpg', 'MPO': '.jpg', 'WEBP': '.webp', 'GIF': '.gif', 'BMP': '.bmp', 'TIFF': '.tif'}
SOUND_ENDINGS = ('.wav', '.flac', '.ogg')
QUESTION = 'Describe this picture.'                    # before a caption: A1 does not read it, a chat has one
AT_ONCE = 64                                           # rows whose pictures are in memory

# -----------------------------------------------------------------------------
# rows, {column: value}


def parquet_rows(path):
    try:
        from datasets import load_dataset
    except ImportError:
        raise SystemExit(f"{path}: reading parquet needs the package datasets: pip install '.[datasets]'")
    try:
        rows = load_dataset('parquet', data_files=[str(path)], split='train', streaming=True)
        yield from rows.decode(False)                  # pictures stay bytes
    except Exception as e:                             # of pyarrow, of datasets, of the file system
        raise SystemExit(f'{path}: cannot read this parquet file ({str(e).splitlines()[0]}); get it again')


def tar_rows(path):
    """The samples of a webdataset shard: neighbours of one name up to its first dot, {'id': name, ending: content}."""
    row = {}
    try:
        with tarfile.open(path, 'r:') as tar:
            for member in tar:
                folder, _, name = member.name.rpartition('/')
                stem, _, ending = name.partition('.')
                if not member.isfile() or not stem:    # a folder, a link, a hidden file
                    continue
                key = f'{folder}/{stem}'.strip('./')
                if row and row['id'] != key:
                    yield row
                    row = {}
                row['id'] = key
                row[ending.lower()] = tar.extractfile(member).read()
            tar.fileobj.seek(tar.offset)               # a tar that was cut between two files reads like a whole one
            if not tar.fileobj.read(512):
                raise tarfile.ReadError('its end is missing')
    except (tarfile.TarError, OSError) as e:
        raise SystemExit(f'{path}: cannot read this tar ({e}); get it again')
    if row:
        yield row


def open_json(row):
    """A tar's row with what its .json says in the place of the file. Raises BadSample."""
    content = row.pop('json', None)
    if isinstance(content, bytes):
        try:
            fields = parse_json(content.decode())
        except (ValueError, RecursionError) as e:
            raise BadSample(f'its .json is not valid JSON ({e})')
        if not isinstance(fields, dict):
            raise BadSample(f'its .json is {shown(fields)}, wanted an object')
        pictures = {key: value for key, value in row.items() if key in IMAGE_COLUMNS}
        named = {key: value for key, value in fields.items() if key not in IMAGE_COLUMNS}   # there a path, if anything
        row = {**row, **named, **pictures}
    return row


# -----------------------------------------------------------------------------
# a row as LLaVA's records


def pictures_of(row):
    """[bytes] of a row's pictures."""
    values = next((row[name] for name in IMAGE_COLUMNS if row.get(name) is not None), [])
    found = []
    for value in values if isinstance(values, list) else [values]:
        if isinstance(value, dict):
            if value.get('bytes') is None and value.get('path'):
                raise BadSample(f'image {value["path"]!r} is named and not inside')
            value = value.get('bytes')
        if value is not None and not isinstance(value, bytes):
            raise BadSample(f'image is {type(value).__name__}, wanted the bytes of a file')
        found.append(value)
    if None in found and len(found) > 1:
        raise BadSample(f'{found.count(None)} of {len(found)} images are empty')
    return [content for content in found if content is not None]


def chats_of(row, n_pictures):
    """[LLaVA's conversations] of a row: one chat, or one for each caption."""
    name = next((name for name in TEXT_COLUMNS if row.get(name) is not None), None)
    if name is None:
        raise BadSample(f'no text: its columns are {", ".join(row)}; wanted one of {", ".join(TEXT_COLUMNS)}')
    value = row[name]
    if isinstance(value, bytes):
        value = value.decode(errors='surrogateescape')         # what is not UTF-8 is refused below
    if name == 'conversations':
        chats = [value]
    elif name == 'texts' and isinstance(value, list) and all(isinstance(turn, dict) for turn in value):   # FineVision
        chats = [[]]
        for turn in value:
            chats[0].append({'from': 'human', 'value': turn.get('user')})
            chats[0].append({'from': 'gpt', 'value': turn.get('assistant')})
    else:
        captions = value if isinstance(value, list) else [value]
        chats = []
        for caption in captions:
            answer = {'from': 'gpt', 'value': require_text(caption, name).strip()}
            chats.append([{'from': 'human', 'value': QUESTION}, answer])
    for chat in chats:
        _, turns = read_turns(chat, name)
        if n_pictures and not any('<image>' in question for question, _ in turns):
            first = next(turn for turn in chat if turn['from'] == 'human')
            first['value'] = n_pictures * '<image>\n' + first['value']    # their own column says that they are there
            _, turns = read_turns(chat, name)
        place_images(turns, n_pictures, name)
    if not chats:
        raise BadSample(f'{name} is empty')
    return chats


def write_picture(content, stem):
    """Keep a picture's bytes as stem.jpg, .png, ..., by its format; returns the path."""
    try:
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            ending = ENDINGS[image.format]
    except Exception as e:                             # decoders fail in as many ways as files are damaged
        raise BadSample(f'not a whole image ({e})')
    path = stem.with_name(stem.name + ending)
    path.write_bytes(content)
    try:
        read_image(path, 8)                            # to its end, as the stages do
    except BadSample:
        path.unlink()
        raise
    return path


def records_of(row, n, stem, images):
    """LLaVA's records of a row, whose picture is written to stem, several to stem_0 and so on; or BadSample. images:
    the root of their paths."""
    try:
        row = open_json(row)
        record = {'id': id_of({'id': row.get('id')}, n, 'row')}
        pictures = pictures_of(row)
        chats = chats_of(row, len(pictures))
        paths = []
        for k, content in enumerate(pictures):
            place = stem if len(pictures) == 1 else stem.with_name(f'{stem.name}_{k}')
            paths.append(write_picture(content, place).relative_to(images).as_posix())
        if paths:
            record['image'] = paths if len(paths) > 1 else paths[0]
        return [{**record, 'conversations': chat} for chat in chats]
    except BadSample as e:
        return e


# -----------------------------------------------------------------------------
# shards


def convert_shard(path, name, out, bad_samples):
    """Write the pictures of a shard and then out/parts/name.json, with its records and with what was wrong."""
    images = out / 'images'
    rows = iter(parquet_rows(path) if path.suffix == '.parquet' else tar_rows(path))
    records = []
    bad = []
    n = 0
    (images / name).mkdir(parents=True, exist_ok=True)

    def convert(numbered):
        n, row = numbered
        return records_of(row, f'{name}/{n:06d}', images / name / f'{n:06d}', images)

    with ThreadPoolExecutor() as threads:
        while part := list(islice(rows, AT_ONCE)):
            numbered = [(n + k, row) for k, row in enumerate(part)]
            for (k, row), found in zip(numbered, threads.map(convert, numbered)):
                if isinstance(found, BadSample):
                    reason = f'{path}, row {k} (id {shown(row.get("id"))}): {found}'
                    bad.append([f'{name}/{k:06d}', reason])
                    bad_samples.add(bad[-1][0], BadSample(reason))
                else:
                    records += found
            n += len(part)
    flush_files(images / name)                         # before the part says that they are whole
    write_sealed(out / 'parts' / f'{name}.json', {'bytes': path.stat().st_size, 'records': records, 'bad': bad})


def convert(source, out, max_bad_samples):
    """The shards of a folder -> out/data.json; returns how many records it has."""
    paths = sorted([*source.rglob('*.parquet'), *source.rglob('*.tar')])
    if not paths:
        raise SystemExit(f'{source}: no *.parquet and no *.tar in it')
    names = [path.relative_to(source).with_suffix('').as_posix() for path in paths]
    if len(set(names)) < len(names):
        raise SystemExit(f'{source}: {max(names, key=names.count)} is there as .parquet and as .tar')
    (out / 'bad_samples.jsonl').unlink(missing_ok=True)        # every start enters all of them
    bad_samples = BadSamples(out / 'bad_samples.jsonl', max_bad_samples)
    n_records = 0
    beside = out / '.data.json.tmp'
    with open(beside, 'w') as f:
        for name, path in zip(progress(names, 'shards'), paths):
            part = out / 'parts' / f'{name}.json'
            if not part.exists() or read_sealed(part, 'tools/convert.py')['bytes'] != path.stat().st_size:
                convert_shard(path, name, out, bad_samples)
            side = read_sealed(part, 'tools/convert.py')
            for id, reason in side['bad']:             # once: a new shard's are entered already
                bad_samples.add(id, BadSample(reason))
            for record in side['records']:
                f.write((',\n' if n_records else '[\n') + json.dumps(record))
                n_records += 1
        f.write('\n]\n' if n_records else '[]\n')
        f.flush()
        os.fsync(f.fileno())
    os.replace(beside, out / 'data.json')
    return n_records


def convert_audiocaps(path, clips, out, max_bad_samples):
    """AudioCaps' captions and a folder of clips named by youtube_id -> out/manifest.jsonl; returns its lines."""
    if not clips.is_dir() or not clips.resolve().is_relative_to(out.resolve()):
        raise SystemExit(f'clips = {str(clips)!r}: wanted a folder inside {out}, which the manifest\'s paths begin at')
    found = {file.stem: file for file in sorted(clips.rglob('*')) if file.suffix.lower() in SOUND_ENDINGS}
    (out / 'bad_samples.jsonl').unlink(missing_ok=True)
    bad_samples = BadSamples(out / 'bad_samples.jsonl', max_bad_samples)
    lines = []
    columns, rows = read_csv(path, wanted='columns youtube_id and caption')
    if not {'youtube_id', 'caption'} <= set(columns):
        raise SystemExit(f'{path}: wanted columns youtube_id and caption, found {", ".join(columns) or "nothing"}')
    for n, (where, row) in enumerate(rows, 2):         # the first line names the columns
        if isinstance(row, BadSample):
            bad_samples.add(where, row)
            continue
        id = row.get('audiocap_id') or str(n)
        youtube = row['youtube_id']
        names = (youtube, f'Y{youtube}', f'{youtube}_{row.get("start_time")}')         # as downloaders call them
        file = next((found[name] for name in names if name in found), None)
        try:
            if file is None:
                raise BadSample(f'{where}: no clip {youtube} in {clips}')
            text = require_text(row['caption'], where).strip()
            audio = file.resolve().relative_to(out.resolve()).as_posix()
            lines.append({'id': id, 'source': 'AudioCaps', 'audio': audio, 'text': text})
        except BadSample as e:
            bad_samples.add(id, e)
    write_atomic(out / 'manifest.jsonl', ''.join(json.dumps(line) + '\n' for line in lines))
    return len(lines)


if __name__ == '__main__':
    # -----------------------------------------------------------------------------
    # settings; override any with a config file or --key=value
    source = ''                    # a folder of parquet files or of tars, or AudioCaps' CSV
    clips = ''                     # AudioCaps: the folder of its sounds, <youtube_id>.wav, .flac or .ogg, in out_dir
    out_dir = ''
    max_bad_samples = 0            # more unusable rows than this end the run; up to it they go to bad_samples.jsonl
    config = configure(globals(), required=('source', 'out_dir'))
    # -----------------------------------------------------------------------------
    if not Path(source).exists():
        raise SystemExit(f'source = {source!r}: not there; wanted a folder of parquet files or tars, or a CSV')
    lock = lock_run(out_dir)
    with one_line_io_errors(out_dir):
        if Path(source).is_dir():
            n = convert(Path(source), Path(out_dir), max_bad_samples)
        else:
            n = convert_audiocaps(Path(source), Path(clips or out_dir), Path(out_dir), max_bad_samples)
    print(f'{out_dir}: {n} records')
