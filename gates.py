"""
Gates: numbers in, verdicts out. Each stage measures, this file judges, and the stage's exit status says.

As a script, the report card of one stage or of every stage below a folder, as a table and as a page to look at:

reads   DIR/gates.json, DIR/*/gates.json; for the page whatever else the stages have left there so far
writes  DIR/report.html
done    when every gate found has passed; exits 1 when one has not, or when there is none

$ python gates.py out
$ python gates.py out/a1_small
"""
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import write_atomic


class Gate(NamedTuple):
    """value: what was measured; bar: in words, what was wanted; passed: the verdict."""
    name: str
    value: float
    bar: str
    passed: bool


def at_most(name, value, bar):
    """Passes when value <= bar; NaN fails."""
    return Gate(name, float(value), f'<= {bar:g}', bool(value <= bar))


def at_least(name, value, bar):
    """Passes when value >= bar; NaN fails."""
    return Gate(name, float(value), f'>= {bar:g}', bool(value >= bar))


def exactly(name, value, wanted):
    return Gate(name, float(value), f'= {wanted:g}', bool(value == wanted))


def ablation(name, better, worse, counts, bar=0.0, min_win=0.0, n_bootstrap=2000):
    """Is the loss `worse` above `better` by more than `bar` nats a label, with 95 % confidence over the items?

    better, worse: summed loss of each item under the two conditions; counts: labels of each item. The difference is
    token weighted, sum / count, and bootstrapped over items. Returns (Gate, {'d', 'low', 'high', 'win'}); win: share of
    items in which worse > better. Too few items (under 8) or a NaN fail.
    """
    better, worse, counts = (np.asarray(x, dtype=np.float64) for x in (better, worse, counts))
    difference, n = worse - better, len(counts)
    if n == 0 or counts.sum() == 0:
        nothing = {'d': math.nan, 'low': math.nan, 'high': math.nan, 'win': math.nan}
        return Gate(name, math.nan, 'items to measure on', False), nothing
    picks = np.random.default_rng(0).integers(n, size=(n_bootstrap, n))
    samples = difference[picks].sum(1) / np.maximum(counts[picks].sum(1), 1)
    low, high = np.quantile(samples, [0.025, 0.975])
    measured = {'d': difference.sum() / counts.sum(), 'low': low, 'high': high, 'win': float((worse > better).mean())}
    measured = {k: round(float(v), 5) for k, v in measured.items()}
    passed = bool(n >= 8 and low > bar and (worse > better).mean() >= min_win)
    wanted = ('' if n >= 8 else f'{n} items, wanted 8; ') + f'95 % interval above {bar:g}'
    wanted += f', win >= {min_win:g}' if min_win else ''
    return Gate(name, measured['d'], f"{wanted}; [{low:.3f}, {high:.3f}], win {measured['win']:.3f}", passed), measured


def no_regression(measured, baseline, same, slack):
    """One gate for each measure that the baseline holds: no worse by more than its slack, an absolute drop where that
    is negative, a share of the baseline's where it is positive (a distance, which must not rise). same: {name: value}
    of what both must have been measured on; where one differs nothing can be compared, and that gate fails."""
    gates = []
    for name, value in same.items():
        gates.append(exactly(f'{name} is not that of the baseline', int(baseline.get(name) != value), 0))
    for name, by in slack.items():
        if name in baseline and by < 0:
            gates.append(at_least(f'{name} against the baseline', measured.get(name, math.nan), baseline[name] + by))
        elif name in baseline:
            bar = baseline[name] * (1 + by)
            gates.append(at_most(f'{name} against the baseline', measured.get(name, math.nan), bar))
    return gates


def trained_set(declared, trainable, with_gradient, before, after):
    """The three gates on what was trained: declared, trainable and with_gradient are sets of names; before and after
    the sha256 of everything frozen."""
    return [exactly('parameters trained but not declared, or declared but not trained',
                    len(set(declared) ^ set(trainable)), 0),
            exactly('trained parameters without a gradient', len(set(trainable) - set(with_gradient)), 0),
            exactly('frozen weights changed (sha256)', int(before != after), 0)]


def tokenized(shards, wrong_shards, ids, media, checked, wrong_decodes, mismatches, rows, unlabelled, truncated):
    """The gates on tokenized shards. ids, media: {split: [id or sha256 of the media file of everything in it]}; the
    others count what was looked at and what of it was wrong. What was not looked at has not passed."""
    def share(name, n, wrong):
        return exactly(f'share of {name}', (n - wrong) / n if n else math.nan, 1)

    def twice(parts):
        keys = [key for part in parts.values() for key in part]
        return len(keys) - len(set(keys)) if keys else math.nan
    return [share('shards with the right sha256 and token space', shards, wrong_shards),
            exactly('ids in two splits, or twice in one', twice(ids), 0),
            exactly('media in two splits, or twice in one', twice(media), 0),
            share('checked media that decode to the right size, finite', checked, wrong_decodes),
            exactly('checked media that give other ids when encoded again', mismatches if checked else math.nan, 0),
            exactly('rows without a label', unlabelled if rows else math.nan, 0),
            exactly('truncated rows', truncated if rows else math.nan, 0)]


def written(task, codes, first, end, golden, shapes, n_golden):
    """The gates on what was drawn or sounded: every id of codes (items, N) in its place's range [first, end), and each
    of the n_golden golden items decoded to its shape, finite."""
    codes = np.asarray(codes)
    outside = ((codes < first) | (codes >= end)).sum() if codes.size else math.nan
    right = sum(np.shape(made) == tuple(shape) and bool(np.isfinite(made).all()) for made, shape in zip(golden, shapes))
    return [exactly(f'{task}: generated ids outside their range', outside, 0),
            exactly(f'{task}: golden items that decode', right, n_golden)]


def collapse(task, codes, made, distinct, pixel_std=None, rms=None, spectral_std=None):
    """The gates that a model fails which draws or sounds the same thing, or nothing, whatever it is asked for.

    codes: (items, N); made: pictures (3, H, W) 0 to 255, or waves; distinct: least share of different outputs;
    pixel_std: of a picture's pixels, mean over the pictures; rms: mean over the sounds; spectral_std: deviation of a
    sound's spectrum from its mean over frequency in dB, mean over the sounds: about 5 for noise.
    """
    codes, n = np.asarray(codes), max(len(codes), 1)
    gates = [at_least(f'{task}: distinct outputs', len({row.tobytes() for row in codes}) / n, distinct)]

    def mean(of):
        return np.mean([of(np.asarray(x, dtype=np.float64)) for x in made]) if len(made) else math.nan

    def spectrum(wave):
        power = np.abs(np.fft.rfft(wave * np.hanning(len(wave)))) ** 2
        return (10 * np.log10(power + 1e-12)).std()
    for name, of, bar in (('pixel deviation', np.std, pixel_std), ('RMS', lambda w: np.sqrt((w ** 2).mean()), rms),
                          ('spectral deviation in dB', spectrum, spectral_std)):
        gates += [at_least(f'{task}: {name}', mean(of), bar)] if bar is not None else []
    return gates


def table(gates):
    width = max((len(g.name) for g in gates), default=0)
    return '\n'.join(f"{'pass' if g.passed else 'FAIL'}  {g.name:<{width}}  {g.value:10.4f}  {g.bar}" for g in gates)


def conclude(out_dir, gates, **measured):
    """Write out_dir/gates.json, print the verdicts, and return the exit status: 0 when all passed, else 1."""
    passed = bool(gates) and all(g.passed for g in gates)
    record = {'passed': passed, 'gates': [g._asdict() for g in gates], **measured}
    write_atomic(Path(out_dir) / 'gates.json', json.dumps(record, indent=1))
    failed = [g.name for g in gates if not g.passed] or ['no gate was measured']
    verdict = f'{len(gates)} gates passed' if passed else f'FAILED at: {"; ".join(failed)}'
    print(table(gates) + f'\n{out_dir}: {verdict}')
    return 0 if passed else 1


def curves(log, png, conditions=('noise', 'zero', 'shuffled', 'correct')):
    """Draw a training log: the loss, and that on held-out items under each condition."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    records = [json.loads(line) for line in Path(log).read_text().splitlines()]
    steps, evals = ([r for r in records if r['kind'] == kind] for kind in ('step', 'eval'))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout='constrained')
    left.plot([r['step'] for r in steps], [r['window_loss'] for r in steps])
    left.set(title='training loss', xlabel='step', ylabel='nats a label')
    for condition in conditions:
        right.plot([r['step'] for r in evals], [r[condition] for r in evals], 'o-', label=condition)
    right.set(title='held-out loss', xlabel='step')
    right.legend()
    figure.savefig(png, dpi=110)
    plt.close(figure)


def require_passed(folder, allow_failed_gates):
    """A stage takes only an input whose gates passed, unless the user says otherwise."""
    path = Path(folder) / 'gates.json'
    problem = None
    if not Path(folder).is_dir():
        raise SystemExit(f'{folder}: no such folder; run the stage that writes it first')
    if not path.exists():
        problem = 'has no gates.json: its stage did not finish'
    else:
        record = json.loads(path.read_text())
        failed = [g['name'] for g in record['gates'] if not g['passed']]
        failed = failed or ['no gate was measured'] * (not record['passed'])
        if failed:
            problem = f'failed its gate "{failed[0]}"' + (f' and {len(failed) - 1} more' if len(failed) > 1 else '')
    if problem and not allow_failed_gates:
        raise SystemExit(f'{folder} {problem}; mend it, or set allow_failed_gates = True to go on all the same')


def verdict_files(folder):
    """The gates.json of a folder and of those in it."""
    return [p for p in [Path(folder) / 'gates.json', *sorted(Path(folder).glob('*/gates.json'))] if p.exists()]


def read_verdict(path):
    """([Gate], passed) of a gates.json; a damaged one is a gate that failed."""
    try:
        record = json.loads(path.read_text())
        verdicts = [Gate(str(g['name']), float(g['value']), str(g['bar']), bool(g['passed'])) for g in record['gates']]
        return verdicts, bool(record['passed'])
    except (OSError, ValueError, KeyError, TypeError) as e:
        return [Gate(f'{path.name} is whole', math.nan, f'not damaged ({type(e).__name__}: {e})', False)], False


def report_card(folder):
    """Print the gates of every stage found in a folder; True when there are some and all passed."""
    paths = verdict_files(folder)
    if not paths:
        raise SystemExit(f'{folder}: no gates.json here or one level below; run a stage first')
    ok = True
    for path in paths:
        verdicts, passed = read_verdict(path)
        ok &= passed
        print(f'{path.parent}\n{table(verdicts)}\n')
    return ok


if __name__ == '__main__':
    if len(sys.argv) != 2 or sys.argv[1].startswith('-'):
        raise SystemExit(__doc__.strip())
    from tools.report import write_report                    # only here: it stands above this module
    write_report(sys.argv[1])
    sys.exit(0 if report_card(sys.argv[1]) else 1)
