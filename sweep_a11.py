"""
Stage A1.1: the stability sweep. One A1 run for each point of a grid, same held-out items, scored where each run ends.

reads   what the base config names
writes  out_dir/{<run>/,sweep.csv,sweep.json,sweep.png,best.py}; best.py is a config for train_a1.py
done    when every run has ended and the best one's gates passed; exits 1 otherwise. A restart skips runs that have
        ended. A run that diverged, whose loss was no number, has the worst score

$ python sweep_a11.py configs/a11_small.py
$ python train_a1.py out/a11_small/best.py
"""
import csv
import io
import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gates
from common import first_line, lock_run, new_figure, write_atomic
from configure import configure, run_config

# -----------------------------------------------------------------------------
# settings; override any with a config file or --key=value
base_config = ''               # a config of train_a1.py: everything that the grid does not set
out_dir = 'out/a11'
grid = {'learning_rate': [5e-5, 1e-4, 2e-4], 'vision_ln': [False, True]}   # setting of train_a1.py -> its values
overrides = {}                 # more settings for every run, a shorter epoch for example
seed = 1                       # of every run
nproc_per_node = 1             # GPUs of each run; the runs follow one another
score_weight = 0.1             # score = held-out loss - score_weight * (d_shuffle + d_zero): lower is better
config = configure(globals(), required=('base_config',))
# -----------------------------------------------------------------------------

lock = lock_run(out_dir)
out = Path(out_dir)
if not Path(base_config).is_file():
    raise SystemExit(f'base_config = {base_config!r}: no such file; wanted a config of train_a1.py')
for key, values in grid.items():
    if not isinstance(values, list | tuple):
        raise SystemExit(f'grid = {grid!r}: {key} has {values!r}, wanted a list of values')
if nproc_per_node < 1:
    raise SystemExit(f'nproc_per_node = {nproc_per_node}: wanted at least 1')
points = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
if not grid or not points:
    raise SystemExit(f'grid = {grid!r} has no point: every setting in it needs at least one value')


def name_of(point):
    return ','.join(f'{key}={value}' for key, value in point.items())


def read_json(path):
    """What the file holds; {} where it is absent, damaged or something else than an object."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def end_of(folder):
    """'finished' or 'diverged'; '' when the run has not ended. Its exit status also says that a gate failed."""
    state = read_json(folder / 'status.json').get('state')
    if state == 'finished' and 'losses' not in read_json(folder / 'gates.json'):
        return ''                                      # its verdict is damaged: a resume judges it again
    return state if state in ('finished', 'diverged') else ''


def first_record(folder):
    path = folder / 'log.jsonl'
    try:
        with open(path) as f:
            record = json.loads(f.readline())
        return {name: record[name] for name in ('settings', 'epoch_samples')}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise SystemExit(f'{path}: its first line is damaged ({first_line(e)}); remove {folder} to run it again')


process = None                                         # the training that is going on
signals = []                                           # the names of those that came


def note(number, frame):
    """SIGTERM is passed on, so that the run saves before the sweep ends; a terminal's Ctrl-C reaches it without us."""
    signals.append(signal.Signals(number).name)
    if process is not None and number == signal.SIGTERM:
        process.terminate()


def leave_if_stopped():
    if signals:
        raise SystemExit(f'{signals[0]} stopped this sweep; start it again to go on with it')


signal.signal(signal.SIGTERM, note)
signal.signal(signal.SIGINT, note)

# the runs, one after the other; the first one's held-out items and length hold for all
launch = [sys.executable]
if nproc_per_node > 1:
    launch += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={nproc_per_node}']
script = str(Path(__file__).with_name('train_a1.py'))
split = None
epoch_samples = 0
for point in points:
    folder = out / name_of(point)
    leave_if_stopped()
    if end_of(folder):
        print(f'{folder}: {end_of(folder)} before')
    else:
        print(f'{folder}: running', flush=True)
        if split and not (folder / 'split.json').exists():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(split, folder / 'split.json')
        settings = {'seed': seed, **overrides, **point}
        if epoch_samples:
            settings.setdefault('epoch_samples', epoch_samples)
        flags = [f'--{key}={value}' for key, value in settings.items()]
        process = subprocess.Popen([*launch, script, base_config, *flags, f'--out_dir={folder}', '--resume=True'])
        if 'SIGTERM' in signals:                       # it came just before there was a process to pass it on to
            process.terminate()
        status = process.wait()
        process = None
        if not end_of(folder):
            leave_if_stopped()
            raise SystemExit(f'{folder}: the run ended early (exit status {status}) with the line above; start '
                             'the sweep again to go on with it')
    epoch_samples = first_record(folder)['epoch_samples']
    split = folder / 'split.json'

# scores, at the end of each run
results = []
for point in points:
    folder = out / name_of(point)
    loss = {'correct': math.inf, 'shuffled': math.inf, 'zero': math.inf}
    score = d_shuffle = d_zero = math.inf
    passed = False
    looked = False
    worth = dict.fromkeys(gates.WORTH, math.nan)
    if end_of(folder) == 'finished':
        loss = read_json(folder / 'gates.json')['losses']
        verdicts, passed = gates.read_verdict(folder / 'gates.json')
        looked = gates.looked(verdicts)
        worth = gates.read_worth(folder / 'gates.json').get('', worth)
        d_shuffle = loss['shuffled'] - loss['correct']
        d_zero = loss['zero'] - loss['correct']
        score = loss['correct'] - score_weight * (d_shuffle + d_zero)
    results.append({
        **point,
        **{name.replace(' ', '_'): value for name, value in worth.items()},
        'looked': looked,
        'score': score,
        'loss': loss['correct'],
        'd_shuffle': d_shuffle,
        'd_zero': d_zero,
        'status': end_of(folder),
        'gates_passed': passed,
        'folder': str(folder),
    })
results.sort(key=lambda result: result['score'])
best = next((result for result in results if result['gates_passed']), None)
write_atomic(out / 'sweep.json', json.dumps({'settings': config, 'runs': results, 'best': best}, indent=1))


def cell(value):
    """A value for a spreadsheet, which takes text that begins like a formula for one."""
    if isinstance(value, str) and value.startswith(('=', '+', '-', '@', '\t', '\r')):
        return f"'{value}"
    return value


table = io.StringIO()
writer = csv.writer(table)
writer.writerow(results[0])
writer.writerows([cell(value) for value in result.values()] for result in results)
write_atomic(out / 'sweep.csv', table.getvalue())
for result in results:
    point = {key: result[key] for key in grid}
    verdict = 'passed' if result['gates_passed'] else 'FAILED'
    if result['status'] == 'diverged':
        verdict = 'not judged, it diverged'
    elif not result['looked']:
        verdict += ', it did not look'
    print(f'removed {result["share_removed"]:.3f}  found {result["input_found"]:.2f} {result["output_found"]:.2f}  '
          f'score {result["score"]:8.4f}  loss {result["loss"]:.4f}  d_shuffle {result["d_shuffle"]:.3f}  '
          f'd_zero {result["d_zero"]:.3f}  gates {verdict}  {name_of(point)}')

# the winner as a config
if best is None:
    raise SystemExit(f'{out_dir}: no run passed its gates, so there is no best.py')
# what the base config sets, and the point; not the overrides, which made the runs of the sweep short
settings, _ = run_config(base_config, first_record(Path(best['folder']))['settings'])
settings |= {key: best[key] for key in grid}
settings['out_dir'] = str(out / 'best')
lines = [
    f'# The best of {len(results)} runs: score {best["score"]:.4f}, held-out loss {best["loss"]:.4f}.',
    f'# $ python train_a1.py {out / "best.py"}',
]
lines += [f'{key} = {value!r}' for key, value in settings.items()]
write_atomic(out / 'best.py', '\n'.join(lines) + '\n')
print(f'{out}/best.py: {name_of({key: best[key] for key in grid})}')

# chart: the first knob along the axis, a line for each setting of the others
axis, *others = grid
figure = new_figure(6, 4)
plot = figure.subplots()
for values in itertools.product(*(grid[key] for key in others)):
    rest = dict(zip(others, values))
    scores = []
    for x in grid[axis]:
        point = {axis: x, **rest}
        scores += [result['score'] for result in results if point.items() <= result.items()]
    plot.plot([str(x) for x in grid[axis]], scores, 'o-', label=name_of(rest) or None)
plot.set(xlabel=axis, ylabel='score (lower is better)', title='A1.1 sweep, at the end of each run')
if others:
    plot.legend()
picture = io.BytesIO()
figure.savefig(picture, dpi=110)
write_atomic(out / 'sweep.png', picture.getvalue())
