"""
Stage A1.1: the stability sweep. One A1 run for each point of a grid, same held-out items, scored where each run ends.

reads   what the base config names
writes  out_dir/{<run>/,sweep.csv,sweep.json,sweep.png,best.py}; best.py is a config for train_a1.py
done    when every run has ended and the best one's gates passed; exits 1 otherwise. A restart skips finished runs

$ python sweep_a11.py configs/a11_small.py
$ python train_a1.py out/a11_small/best.py
"""
import csv
import itertools
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from common import lock_run, write_atomic
from configure import configure

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
points = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
if not grid or not points:
    raise SystemExit(f'grid = {grid!r} has no point: every setting in it needs at least one value')


def name_of(point):
    return ','.join(f'{key}={value}' for key, value in point.items())


def is_finished(folder):
    """A run's exit status also says that a gate failed; its status file says that it came to its end."""
    path = folder / 'status.json'
    return path.exists() and json.loads(path.read_text())['state'] == 'finished'


def run_training(command):
    """Its exit status. SIGTERM is passed on, so that the run saves before the sweep ends; a terminal's Ctrl-C reaches
    it without our help, and is waited for."""
    process = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    signal.signal(signal.SIGINT, lambda number, frame: None)
    return process.wait()


# the runs, one after the other; the first one's held-out items and length hold for all
launch = [sys.executable]
if nproc_per_node > 1:
    launch += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={nproc_per_node}']
script = str(Path(__file__).with_name('train_a1.py'))
split = None
epoch_samples = 0
for point in points:
    folder = out / name_of(point)
    if is_finished(folder):
        print(f'{folder}: finished before')
    else:
        print(f'{folder}: running', flush=True)
        if split and not (folder / 'split.json').exists():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(split, folder / 'split.json')
        settings = {'seed': seed, **overrides, **point}
        if epoch_samples:
            settings.setdefault('epoch_samples', epoch_samples)
        flags = [f'--{key}={value}' for key, value in settings.items()]
        status = run_training([*launch, script, base_config, *flags, f'--out_dir={folder}', '--resume=True'])
        if not is_finished(folder):
            raise SystemExit(f'{folder}: the run ended early (exit status {status}); '
                             'start the sweep again to go on with it')
    first_record = json.loads((folder / 'log.jsonl').read_text().splitlines()[0])
    epoch_samples = first_record['epoch_samples']
    split = folder / 'split.json'

# scores, at the end of each run
results = []
for point in points:
    folder = out / name_of(point)
    verdict = json.loads((folder / 'gates.json').read_text())
    loss = verdict['losses']
    d_shuffle = loss['shuffled'] - loss['correct']
    d_zero = loss['zero'] - loss['correct']
    results.append({
        **point,
        'score': loss['correct'] - score_weight * (d_shuffle + d_zero),
        'loss': loss['correct'],
        'd_shuffle': d_shuffle,
        'd_zero': d_zero,
        'gates_passed': verdict['passed'],
        'folder': str(folder),
    })
results.sort(key=lambda result: result['score'])
passed = [result for result in results if result['gates_passed']]
best = passed[0] if passed else None
write_atomic(out / 'sweep.json', json.dumps({'settings': config, 'runs': results, 'best': best}, indent=1))
with open(out / 'sweep.csv', 'w', newline='') as f:
    writer = csv.DictWriter(f, results[0])
    writer.writeheader()
    writer.writerows(results)
for result in results:
    point = {key: result[key] for key in grid}
    verdict = 'passed' if result['gates_passed'] else 'FAILED'
    print(f'{result["score"]:8.4f}  loss {result["loss"]:.4f}  d_shuffle {result["d_shuffle"]:.3f}  '
          f'd_zero {result["d_zero"]:.3f}  gates {verdict}  {name_of(point)}')

# the winner as a config
if best is None:
    raise SystemExit(f'{out_dir}: no run passed its gates, so there is no best.py')
first_record = json.loads((Path(best['folder']) / 'log.jsonl').read_text().splitlines()[0])
settings = {**first_record['settings'], 'out_dir': str(out / 'best'), 'resume': False}
lines = [
    f'# The best of {len(results)} runs: score {best["score"]:.4f}, held-out loss {best["loss"]:.4f}.',
    f'# $ python train_a1.py {out / "best.py"}',
]
lines += [f'{key} = {value!r}' for key, value in settings.items()]
write_atomic(out / 'best.py', '\n'.join(lines) + '\n')
print(f'{out}/best.py: {name_of({key: best[key] for key in grid})}')

# chart: the first knob along the axis, a line for each setting of the others
from matplotlib.figure import Figure  # noqa: E402  after the runs: drawing is all it is for

axis, *others = grid
figure = Figure(figsize=(6, 4), layout='constrained')
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
figure.savefig(out / 'sweep.png', dpi=110)
