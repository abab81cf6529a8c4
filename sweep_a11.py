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
nproc_per_node = 1             # GPUs of each run; the runs follow one another
score_weight = 0.1             # score = held-out loss - score_weight * (d_shuffle + d_zero): lower is better
config = configure(globals(), required=('base_config',))
# -----------------------------------------------------------------------------

lock, out = lock_run(out_dir), Path(out_dir)
points = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
if not Path(base_config).is_file():
    raise SystemExit(f'base_config = {base_config!r}: no such file; wanted a config of train_a1.py')
if not grid or not points:
    raise SystemExit(f'grid = {grid!r} has no point: every setting in it needs at least one value')


def name_of(point):
    return ','.join(f'{key}={value}' for key, value in point.items())


def state_of(folder):
    return json.loads((folder / 'status.json').read_text())['state'] if (folder / 'status.json').exists() else 'new'


launch = [sys.executable] if nproc_per_node == 1 else [
    sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={nproc_per_node}']
script, shared = str(Path(__file__).with_name('train_a1.py')), {}
for point in points:
    folder = out / name_of(point)
    if state_of(folder) == 'finished':
        print(f'{folder}: finished before')
    else:
        if shared.get('split') and not (folder / 'split.json').exists():   # the same held-out items for every run
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(shared['split'], folder / 'split.json')
        settings = {'epoch_samples': shared.get('epoch_samples', 0), **overrides, **point}
        if not settings['epoch_samples']:
            del settings['epoch_samples']              # the first run's choice, by config or measured, holds for all
        print(f'{folder}: running', flush=True)
        code = subprocess.run([*launch, script, base_config, *(f'--{k}={v}' for k, v in settings.items()),
                               f'--out_dir={folder}', '--resume=True']).returncode
        if state_of(folder) != 'finished':
            raise SystemExit(f'{folder}: the run ended early (exit status {code}); '
                             'start the sweep again to go on with it')
    first = json.loads((folder / 'log.jsonl').read_text().splitlines()[0])
    shared = {'split': folder / 'split.json', 'epoch_samples': first['epoch_samples']}

# scores
table = []
for point in points:
    folder = out / name_of(point)
    result = json.loads((folder / 'gates.json').read_text())
    loss = result['losses']
    d_shuffle, d_zero = loss['shuffled'] - loss['correct'], loss['zero'] - loss['correct']
    table.append({**point, 'score': loss['correct'] - score_weight * (d_shuffle + d_zero), 'loss': loss['correct'],
                  'd_shuffle': d_shuffle, 'd_zero': d_zero, 'gates_passed': result['passed'], 'folder': str(folder)})
table.sort(key=lambda row: row['score'])
good = [row for row in table if row['gates_passed']]
write_atomic(out / 'sweep.json',
             json.dumps({'settings': config, 'runs': table, 'best': good[0] if good else None}, indent=1))
with open(out / 'sweep.csv', 'w', newline='') as f:
    writer = csv.DictWriter(f, table[0])
    writer.writeheader()
    writer.writerows(table)
for row in table:
    print(f"{row['score']:8.4f}  loss {row['loss']:.4f}  d_shuffle {row['d_shuffle']:.3f}  d_zero {row['d_zero']:.3f}  "
          f"gates {'passed' if row['gates_passed'] else 'FAILED'}  {name_of({k: row[k] for k in grid})}")

# chart: the first knob along the axis, a line for each setting of the others
import matplotlib  # noqa: E402  after the runs: drawing is all it is for

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

axis, *others = grid
figure, plot = plt.subplots(figsize=(6, 4), layout='constrained')
for values in itertools.product(*(grid[k] for k in others)):
    line = [next(r for r in table if r[axis] == x and all(r[k] == v for k, v in zip(others, values)))
            for x in grid[axis]]
    plot.plot([str(x) for x in grid[axis]], [r['score'] for r in line], 'o-',
              label=name_of(dict(zip(others, values))) or None)
plot.set(xlabel=axis, ylabel='score (lower is better)', title='A1.1 sweep, at the end of each run')
if others:
    plot.legend()
figure.savefig(out / 'sweep.png', dpi=110)

# the winner as a config
if not good:
    raise SystemExit(f'{out_dir}: no run passed its gates, so there is no best.py')
best = good[0]
settings = json.loads((Path(best['folder']) / 'log.jsonl').read_text().splitlines()[0])['settings']
lines = [f'# The best of {len(table)} runs: score {best["score"]:.4f}, held-out loss {best["loss"]:.4f}.',
         f'# $ python train_a1.py {out / "best.py"}']
lines += [f'{k} = {v!r}' for k, v in {**settings, 'out_dir': str(out / 'best'), 'resume': False}.items()]
write_atomic(out / 'best.py', '\n'.join(lines) + '\n')
print(f'{out}/best.py: {name_of({k: best[k] for k in grid})}')
