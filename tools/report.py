"""
The report card as a page: what the stages in a folder have measured, written and generated so far.

reads   the out dirs in DIR, and the pictures and sounds that they name
writes  DIR/report.html, from the template tools/report.html: one file, with pictures, sounds and charts inside
done    when it is written; what is absent, unfinished or damaged is a line of it

$ python -m tools.report out
"""
import base64
import io
import json
import math
import sys
import time
from pathlib import Path

import jinja2
import numpy as np
import soundfile
from PIL import Image

from common import new_figure, sha256_file, write_atomic
from gates import WORTH, read_verdict, read_worth, verdict_files  # noqa: F401  the template has them too
from lists import read_llava
from media import IMAGE_FORMATS, MAX_PIXELS, BadSamples, upright_rgb
from shards import read_manifest

STAGES = ['a1', 'a11', 'a2', 'b1', 'b2', 'b3', 'b4', 'other']   # other: a folder with gates
STAGE_OF_FILE = {'sweep.json': 'a11', 'index.json': 'b2', 'plan.json': 'b2', 'token_space.json': 'b1',
                 'gates.json': 'other'}
N_IMAGES, N_SOUNDS = 12, 8     # golden examples a task; a second of sound at 16 kHz takes 43 kB of the page
N_CHECKPOINTS = 3              # the first, the last and one between
CLIP_SECONDS = 4               # longer sounds are cut
COLOURS = {'training': '#b9c4cf', 'held out': '#1f4e79', 'correct': '#1f4e79', 'shuffled': '#c0621b',
           'zero': '#7a7a7a', 'empty': '#7a7a7a', 'noise': '#8a5a9e', 'random': '#8a5a9e'}
CHART_STYLE = {'font.family': 'DejaVu Sans', 'font.size': 9, 'axes.titlesize': 10, 'axes.spines.top': False,
               'axes.spines.right': False, 'svg.hashsalt': 'nanograft',   # the salt: same log, same bytes
               'text.parse_math': False,                               # a $ in a setting is a $
               'axes.prop_cycle': "cycler(color=['#1f4e79', '#c0621b', '#4f7d5b', '#8a5a9e', '#7a7a7a', '#a3262a'])"}

# A file may hold anything: half a line, a list for an object, a picture cut short. These are what reading it raises;
# SyntaxError is Pillow's word for a damaged PNG, UndefinedError the template's for a key that is not there, SystemExit
# that of data.py for a list that cannot be read.
DAMAGED = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, EOFError, SyntaxError,
           RecursionError, Image.DecompressionBombError, soundfile.SoundFileError, jinja2.UndefinedError, SystemExit)


class Run:
    """The out dir of a stage. What cannot be read is empty here and a line in `notes`."""
    def __init__(self, path, stage=None):
        self.path = path
        self.stage = stage
        self.notes = {}                                # an ordered set: files are read more than once

    def note(self, line):
        self.notes[line] = True

    def json(self, name):
        """The object in a JSON file, {} where there is none."""
        path = self.path / name
        content = json_object(path.read_text(errors='replace')) if path.is_file() else {}
        if content is None:
            self.note(f'{name} is damaged: no JSON object.')
        return content or {}

    def lines(self, name):
        """The objects of a JSONL file, None where a line is damaged: a kill can leave half a line."""
        path = self.path / name
        content = path.read_text(errors='replace') if path.is_file() else ''
        records = [json_object(line) for line in content.splitlines()]
        if None in records:
            self.note(f'{name}: {records.count(None)} of {len(records)} lines are damaged.')
        return records

    def log(self, kind):
        return [record for record in self.lines('log.jsonl') if record and record.get('kind') == kind]

    def head(self):
        """Settings, commit, versions and hardware, wherever this stage keeps them."""
        if self.stage == 'a11':
            first = next((run.head() for run in self.sweep_runs()), {})
            return {**first, 'settings': self.json('sweep.json').get('settings', {})}
        if self.stage == 'b1':
            return self.json('report.json')
        if self.stage == 'b2':
            return self.json('index.json').get('provenance', {})
        return next(iter(self.log('run')), {})

    def sweep_runs(self):
        """The runs of a sweep, whose folders are called learning_rate=0.001,vision_ln=True and the like."""
        return [Run(path, 'a1') for path in sorted(self.path.glob('*=*')) if path.is_dir()]

    def training_seconds(self):
        """Without evaluations, of all runs where it is a sweep; 0 where a log does not have it."""
        windows = []
        for run in [self, *self.sweep_runs()]:
            windows += [record.get('seconds') for record in run.log('step')]
        return 0 if None in windows else sum(windows)  # a log of an older version has no seconds

    def last_written(self):
        times = [path.stat().st_mtime for path in self.path.iterdir() if path.is_file() and path.name != 'report.html']
        return time.strftime('%Y-%m-%d %H:%M', time.localtime(max(times))) if times else None

    def state(self):
        """passed, failed, running, stopped or unfinished."""
        state = self.json('status.json').get('state')
        if state in ('running', 'stopped'):
            return state
        sweep = self.json('sweep.json')
        if 'best' in sweep:                            # None: no run passed its gates
            return 'passed' if sweep['best'] else 'failed'
        if (self.path / 'gates.json').exists():
            return 'passed' if read_verdict(self.path / 'gates.json')[1] else 'failed'
        return 'unfinished'


def json_object(text):
    """The JSON object in a text; None where it is something else, or half of one."""
    try:
        content = json.loads(text)
        return content if isinstance(content, dict) else None
    except (ValueError, RecursionError):
        return None


def stage_of(folder):
    """The stage that has written a folder, None where none has."""
    names = {path.name for path in folder.iterdir()}
    if not names or 'config.json' in names:            # config.json: an exported model
        return None
    clues = [record.get('stage') for record in Run(folder).log('run')]   # the surest clue first
    clues += ['a11' for _ in folder.glob('*=*/log.jsonl')]
    clues += [folder.name.split('_')[0], *(stage for name, stage in STAGE_OF_FILE.items() if name in names)]
    return next((clue for clue in clues if clue in STAGES), None)


def runs_of(folder):
    """[Run] of the folder itself and of those in it, in the order of the stages."""
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir() and '=' not in path.name]   # a sweep's run
    found = [Run(path, stage_of(path)) for path in [folder, *inside]]
    return sorted((run for run in found if run.stage), key=lambda run: STAGES.index(run.stage))


def data_uri(kind, buffer):
    return f'data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}'


def picture(image, side=256):
    """A PIL image for the page, made smaller where it is larger than side x side."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError('too large')
    kind = 'png' if max(image.size) <= side else 'jpeg'   # a small one stays as it is, to the pixel
    image = upright_rgb(image)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=80)
    return {'picture': data_uri(f'image/{kind}', buffer), 'width': image.width, 'height': image.height}


def sound(path):
    """The first seconds of a sound, written anew as 16-bit WAV: every browser plays that."""
    with soundfile.SoundFile(path) as f:
        wave = f.read(CLIP_SECONDS * f.samplerate)
        rate = f.samplerate
        is_cut = f.frames > len(wave)
    if len(wave) == 0:
        raise ValueError('empty')
    buffer = io.BytesIO()
    soundfile.write(buffer, np.nan_to_num(wave), rate, format='WAV', subtype='PCM_16')
    return {'sound': data_uri('audio/wav', buffer), 'cut': is_cut}


def medium(path, label, caption='', is_sound=False, side=256):
    """A picture or a sound for the page, or why there is none. label: what it is, for who cannot look or listen."""
    content = {'label': label, 'caption': caption}
    try:
        if not path.is_file():                         # a pipe would keep us waiting
            raise FileNotFoundError
        content.update(sound(path) if is_sound else picture(Image.open(path, formats=IMAGE_FORMATS), side))
    except DAMAGED as e:
        content['gone'] = f'{path.name}: cannot be shown ({type(e).__name__})'
    return content


def pictures_of(record):
    """The files of a record of Track A: its image is a path, or a list of several."""
    images = record['image']
    return [Path(path) for path in (images if isinstance(images, list) else [images])]


def pairs(run):
    """The rows of B1's contact sheet, original and decoded side by side, a picture each."""
    with Image.open(run.path / 'pictures' / 'original_decoded.png', formats=IMAGE_FORMATS) as sheet:
        side = sheet.width // 2                        # both are square
        tops = range(0, sheet.height - side + 1, side)
        return [picture(sheet.crop((0, top, sheet.width, top + side)), 512) for top in tops]


def chart(title, lines, x='step', y='nats per label'):
    """An SVG of {name: (xs, ys)}; None where there is nothing to draw."""
    lines = {name: line for name, line in lines.items() if line}
    if not lines:
        return None
    figure = new_figure(4.8, 3.1)
    from matplotlib import rc_context                  # not above: new_figure makes this import safe
    buffer = io.BytesIO()
    with rc_context(CHART_STYLE):
        plot = figure.subplots()
        for name, (xs, ys) in lines.items():
            plot.plot(xs, ys, '-' if name == 'training' else 'o-', label=name, markersize=3.5, color=COLOURS.get(name))
        plot.set(title=title, xlabel=x, ylabel=y)
        if x == 'step':
            plot.xaxis.get_major_locator().set_params(integer=True)
        plot.grid(alpha=0.25, linewidth=0.5)
        plot.legend(fontsize=8, framealpha=0.8, edgecolor='none')
        figure.savefig(buffer, format='svg', metadata={'Date': None})
    ends = '; '.join(f'{name} from {ys[0]:.3g} to {ys[-1]:.3g}' for name, (_, ys) in lines.items())
    return {'uri': data_uri('image/svg+xml', buffer), 'label': f'{title} by {x}: {ends}'}


def log_chart(run, title, names, prefix='', y='nats per label'):
    """A chart of the log. names: of its lines; behind the prefix, keys of the evaluations."""
    records = run.log('step') + run.log('eval')
    lines = {}
    for name in names:
        key = {'training': 'window_loss', 'held out': 'correct'}.get(name, prefix + name)
        points = [(r['step'], r[key]) for r in records if isinstance(r.get(key), int | float)]
        lines[name] = list(zip(*points))
    return chart(title, lines, y=y)


def sweep_chart(sweep, title):
    """The score over the first setting of the grid, a line for each value of the others."""
    axis, *others = sweep['settings']['grid']          # {setting: its values}
    lines = {}
    for row in sorted(sweep['runs'], key=lambda row: row[axis]):
        name = ', '.join(f'{key} {row[key]}' for key in others) or 'score'
        xs, ys = lines.setdefault(name, ([], []))
        xs.append(str(row[axis]))                      # as text: evenly apart, whatever the values
        ys.append(row['score'])
    return chart(title, lines, axis, 'score')


def spread(items, n):
    """n of the items, evenly over all of them."""
    indices = np.linspace(0, len(items) - 1, min(n, len(items))).round().astype(int)
    return [items[index] for index in indices]


def originals(run, wanted):
    """{id: file} of media that B2 tokenized, by its settings. wanted: {id: sha256}; other bytes are another file."""
    shards_dir = Path(run.head().get('settings', {}).get('shards_dir', ''))
    beside = run.path.parent / shards_dir.name         # where both were moved
    shards = Run(beside if (beside / 'index.json').exists() else shards_dir, 'b2')
    settings = shards.head().get('settings', {})
    files = {}
    if settings.get('sound_dir'):                      # ids are file#caption_n there
        files = {id: Path(settings['sound_dir'], id.rsplit('#', 1)[0]) for id in wanted}
    left_out = BadSamples('', math.inf, active=False)      # B2 has listed them: here they are passed over
    if settings.get('data_json'):
        for item in read_llava(settings['data_json'], settings['image_root'], left_out, captions=True):
            files[item.id] = Path(item.images[0])
    for manifest in settings.get('manifests', ()):
        for captioned in read_manifest(manifest, left_out):
            files[captioned.id] = Path(captioned.path)
    found = [id for id in wanted if id in files and files[id].is_file()]
    return {id: files[id] for id in found if sha256_file(files[id]) == wanted[id]}


def golden(run, task=''):
    """The golden examples of a task ('' in track A, which has one) and what a few checkpoints made of them."""
    saved = sorted(run.path.glob('golden/step_*' if task else 'golden/step_*.jsonl'))
    dumps = {}                                         # {folder or file: {number of an example: its record}}
    for path in spread(saved, N_CHECKPOINTS):
        file = path / f'{task}.jsonl' if task else path
        dumps[path] = {n: record for n, record in enumerate(run.lines(file.relative_to(run.path))) if record}
    last = next(filter(None, reversed(dumps.values())), {})   # the last one that is not damaged altogether
    shown = spread(list(last), N_SOUNDS if 'a' in task else N_IMAGES)
    wanted = {last[n]['id']: last[n]['media_sha256'] for n in shown} if task else {}
    files = attempt('originals', originals, run, wanted) or {}
    return {'n_saved': len(saved), 'dumps': dumps, 'last': last, 'shown': shown, 'files': files}


def attempt(name, part, *args):
    """A part of a section; a line in the run's notes where the files hold something else."""
    try:
        return part(*args)
    except DAMAGED as e:
        args[0].note(f'{name}: cannot be shown, the files hold something else ({type(e).__name__}: {e})')
        return ''


def write_report(folder):
    """Write folder/report.html, where any stage has written there, and print its path."""
    folder = Path(folder)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.do'])
    environment.globals.update(globals())              # the template calls the functions above
    try:
        if runs := runs_of(folder):
            verdicts = [gate for path in verdict_files(folder) for gate in read_verdict(path)[0]]
            page = environment.get_template('report.html').render(folder=folder.resolve(), runs=runs, verdicts=verdicts)
            write_atomic(folder / 'report.html', page.lstrip().encode('utf-8', 'replace'))
            print(folder / 'report.html', file=sys.stderr)
    except (OSError, SystemExit) as e:                 # the verdict of gates.py stands without its page
        print(e, file=sys.stderr)


if __name__ == '__main__':
    if len(sys.argv) != 2 or sys.argv[1].startswith('-'):
        raise SystemExit(__doc__.strip())
    write_report(sys.argv[1])
